//! The filters that hold and inject, in front of a file.

mod support;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use support::{Ask, Client, file, in_memory, until};
use vbd_core::file::{Backend, Fault, Options};
use vbd_core::filter::{Action, Filter, Hold, Inject, Rule, Verdict};
use vbd_core::{Error, ErrorKind, Operation, Request};
use vbd_ring::{EngineKind, Op};

const SIZE: u64 = 1 << 20;

fn client(backend: &Arc<Backend>, filter: &Arc<impl Filter>) -> Client {
    let (backend, filter) = (backend.clone(), filter.clone());
    Client::new(EngineKind::Auto, move |local| filter.wrap(backend.channel(local, Arc::new(())), local))
}

/// A backend that has no room until the flag is cleared.
fn full(dir: &tempfile::TempDir) -> (Arc<Backend>, Arc<std::sync::atomic::AtomicBool>) {
    let full = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let inside = full.clone();
    let faults = move |op: &Op| {
        let hit = matches!(op, Op::Write { .. }) && inside.load(std::sync::atomic::Ordering::SeqCst);
        hit.then_some(Fault::Fail(libc::ENOSPC))
    };
    (file(dir.path(), SIZE, Options { faults: Some(Arc::new(faults)), ..Options::default() }), full)
}

fn park_when_full(_: &Request, error: &Error) -> Verdict {
    if error.kind() == ErrorKind::NoSpace { Verdict::Park } else { Verdict::Report }
}

#[test]
fn a_request_that_found_no_room_waits_and_goes_on_by_itself_when_resumed() {
    let dir = in_memory();
    let (backend, is_full) = full(&dir);
    let hold = Hold::new(park_when_full);
    let clients = [client(&backend, &hold), client(&backend, &hold)];
    let answers: Vec<_> =
        clients.iter().zip([0, 4096]).map(|(one, at)| one.submit(Ask::write(at, vec![5; 4096]))).collect();
    until("parking", || hold.waiting() == 2);
    assert_eq!(clients[0].read(0, 4096), vec![0; 4096], "others go on meanwhile");
    // Still full: they come back to the list.
    hold.resume();
    until("parking again", || hold.waiting() == 2);
    is_full.store(false, std::sync::atomic::Ordering::SeqCst);
    hold.resume();
    for answer in answers {
        answer.recv_timeout(Duration::from_secs(10)).expect("an answer").result.expect("written");
    }
    assert_eq!(hold.waiting(), 0);
    assert_eq!(clients[1].read(0, 8192), vec![5; 8192]);
}

#[test]
fn parked_requests_can_be_cancelled_by_policy_and_by_their_front_end() {
    let dir = in_memory();
    let (backend, _full) = full(&dir);
    let hold = Hold::new(park_when_full);
    let client = client(&backend, &hold);
    let cancelled = |answer: std::sync::mpsc::Receiver<support::Answer>| {
        let error =
            answer.recv_timeout(Duration::from_secs(10)).expect("an answer").result.expect_err("failed");
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert_eq!(hold.waiting(), 0);
    };
    let answer = client.submit(Ask::write(0, vec![5; 512]));
    until("parking", || hold.waiting() == 1);
    hold.cancel();
    cancelled(answer);
    let answer = client.submit(Ask::write(0, vec![5; 512]));
    until("parking", || hold.waiting() == 1);
    client.channel(|channel| channel.cancel_waiting());
    cancelled(answer);
    let answer = client.submit(Ask::write(0, vec![5; 512]));
    until("parking", || hold.waiting() == 1);
    drop(client);
    cancelled(answer);
}

#[test]
fn a_paused_disk_keeps_requests_and_loses_none() {
    let dir = in_memory();
    let backend = file(dir.path(), SIZE, Options::default());
    let hold = Hold::new(|_: &Request, _: &Error| Verdict::Report);
    let client = client(&backend, &hold);
    hold.pause();
    let answers: Vec<_> = (0..8).map(|at| client.submit(Ask::write(at * 512, vec![3; 512]))).collect();
    until("holding", || hold.waiting() == 8);
    hold.resume();
    answers.into_iter().for_each(|answer| {
        answer.recv_timeout(Duration::from_secs(10)).expect("an answer").result.expect("written");
    });
    assert_eq!(client.read(0, 4096), vec![3; 4096]);
}

#[test]
fn injected_errors_hit_what_their_rule_names_and_nothing_else() {
    let dir = in_memory();
    let backend = file(dir.path(), SIZE, Options::default());
    let second = Rule {
        range: 4096..8192,
        skip: 1,
        times: 1,
        ..Rule::always(Operation::Write, Action::Fail(ErrorKind::Io))
    };
    let inject = Inject::new(vec![second]);
    let client = client(&backend, &inject);
    assert_eq!(client.kind(Ask::write(0, vec![1; 512])), None);
    assert_eq!(client.kind(Ask::write(4096, vec![1; 512])), None);
    assert_eq!(client.kind(Ask::write(4608, vec![1; 512])), Some(ErrorKind::Io));
    assert_eq!(client.read(4608, 512), vec![0; 512], "what failed did nothing");
    assert_eq!(client.kind(Ask::write(4608, vec![1; 512])), None, "the rule is spent");
    inject.set(vec![Rule::always(Operation::Flush, Action::Fail(ErrorKind::NoSpace))]);
    assert_eq!(client.kind(Ask::new(Operation::Flush, 0, 0)), Some(ErrorKind::NoSpace));
    inject.set(vec![Rule::always(Operation::Write, Action::Torn(3))]);
    assert_eq!(client.kind(Ask { piece: 1024, ..Ask::write(0, vec![9; 4096]) }), Some(ErrorKind::Io));
    assert_eq!(client.read(0, 4096), [vec![9; 1536], vec![0; 2560]].concat(), "torn after three sectors");
}

#[test]
fn a_delayed_request_is_overtaken_and_can_be_given_up() {
    let dir = in_memory();
    let backend = file(dir.path(), SIZE, Options::default());
    let first = Rule { times: 1, ..Rule::always(Operation::Write, Action::Delay(Duration::from_millis(50))) };
    let never = Rule::always(Operation::Discard, Action::Delay(Duration::from_secs(3600)));
    let client = client(&backend, &Inject::new(vec![first, never]));
    let late = client.submit(Ask::write(0, vec![1; 512]));
    client.write(0, vec![2; 512]);
    assert_eq!(client.read(0, 512), vec![2; 512]);
    late.recv().expect("an answer").result.expect("written");
    assert_eq!(client.read(0, 512), vec![1; 512]);
    let waiting = client.submit(Ask::new(Operation::Discard, 0, 4096));
    client.channel(|channel| channel.cancel_waiting());
    let error = waiting.recv_timeout(Duration::from_secs(10)).expect("an answer").result.expect_err("failed");
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}

/// A request that somebody drops is answered all the same, and a debug build says whose fault it is.
#[test]
fn a_request_that_is_dropped_is_answered() {
    struct Answers(std::cell::Cell<Option<ErrorKind>>);
    impl vbd_core::Sink for Answers {
        fn complete(self: Rc<Self>, _: Request, result: vbd_core::Result<()>) {
            self.0.set(result.err().map(|error| error.kind()));
        }
    }
    let sink = Rc::new(Answers(std::cell::Cell::new(None)));
    let request = Request::new(Operation::Read, 0, 512, std::time::Instant::now(), sink.clone());
    let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(request)));
    assert_eq!(dropped.is_err(), cfg!(debug_assertions));
    assert_eq!(sink.0.get(), Some(ErrorKind::Io));
}
