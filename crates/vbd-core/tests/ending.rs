//! A reactor that ends with I/O in flight: who holds the lease outlives what is in the kernel.
//!
//! The thread-pool engine behind a pool whose threads are all taken holds an operation back for as long as a test
//! wants: started and not landed, as on storage that hangs.

mod support;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use support::{Answer, Ask, Client, file, on_disk, until};
use vbd_core::file::{Backend, Cache, Fault, Options};
use vbd_core::{ErrorKind, Operation};
use vbd_ring::{Completion, EngineKind, Op, Reactor, Settings};

/// More calls than the pool has threads: what comes after them waits for all of them.
const MANY: usize = 200;
/// Ends within a sector, so that the last one takes a way of its own.
const SIZE: u64 = (1 << 20) + 100;
const OLD: u8 = 9;
const NEW: u8 = 7;

struct Nothing;

impl Completion for Nothing {
    fn complete(self: Rc<Self>, _token: u64, _result: i32) {}
}

/// Takes every thread of the pool, until the sender is dropped.
fn take_all_threads(reactor: &Reactor) -> Sender<()> {
    let (release, wait) = channel::<()>();
    let wait = Arc::new(Mutex::new(wait));
    let all = move |local: &vbd_ring::Local| {
        for _ in 0..MANY {
            let wait = wait.clone();
            let call = move || i32::from(wait.lock().is_ok_and(|wait| wait.recv().is_ok()));
            local.blocking(call, Rc::new(Nothing), 0);
        }
    };
    reactor.handle().call(all).expect("runs");
    release
}

/// One request on its way to the storage.
struct Case {
    name: &'static str,
    ask: Ask,
    cache: Cache,
    /// What happens to its first operation.
    fault: Option<Fault>,
    /// The last of so many operations is the one that is held back.
    operations: usize,
    /// A byte that has changed when that has landed, and into what.
    lands: (u64, u8),
}

impl Case {
    fn new(name: &'static str, ask: Ask, lands: (u64, u8)) -> Self {
        Case { name, ask, cache: Cache::None, fault: None, operations: 1, lands }
    }
}

/// All that the slow paths have in the kernel.
fn slow() -> Vec<Case> {
    let unaligned = Ask { skew: 3, ..Ask::write(4096, vec![NEW; 4096]) };
    let short = Case::new("the rest of a short write", Ask::write(0, vec![NEW; 8192]), (4096, NEW));
    vec![
        Case::new("the end of the file", Ask::write(1 << 20, vec![NEW; 512]), (1 << 20, NEW)),
        Case { fault: Some(Fault::Short(4096)), operations: 2, cache: Cache::Writeback, ..short },
        Case {
            fault: Some(Fault::Fail(libc::EINTR)),
            operations: 2,
            ..Case::new("through a bounce buffer", unaligned, (4096, NEW))
        },
        Case::new("a discard", Ask::new(Operation::Discard, 0, 65536), (0, 0)),
        Case::new("zeroes", Ask::new(Operation::WriteZeroes, 0, 65536), (0, 0)),
    ]
}

/// A case whose last operation is in flight until `release` is dropped.
struct Held {
    _dir: tempfile::TempDir,
    path: PathBuf,
    backend: Arc<Backend>,
    client: Client,
    answer: Receiver<Answer>,
    release: Sender<()>,
    /// Stands for the lease: what the channel was given to keep.
    owner: Weak<()>,
    _pool: Reactor,
}

impl Held {
    fn new(case: &Case, stop_within: Duration) -> Self {
        let dir = on_disk();
        let (seen, fault) = (Arc::new(AtomicUsize::new(0)), case.fault);
        let count = seen.clone();
        let faults = move |_: &Op| if count.fetch_add(1, Ordering::SeqCst) == 0 { fault } else { None };
        let options = Options { cache: case.cache, faults: Some(Arc::new(faults)), ..Options::default() };
        let backend = file(dir.path(), SIZE, options);
        let path = dir.path().join("disk");
        let contents = std::fs::File::options().write(true).open(&path).expect("there");
        contents.write_all_at(&vec![OLD; usize::try_from(SIZE).expect("small")], 0).expect("filled");
        contents.sync_all().expect("on disk");

        let pool = Reactor::spawn("pool", Settings::default()).expect("a reactor");
        let release = take_all_threads(&pool);
        let owner = Arc::new(());
        let weak = Arc::downgrade(&owner);
        let settings = Settings { engine: EngineKind::Threads, stop_within, ..Settings::default() };
        let shared = backend.clone();
        let client = Client::with(settings, move |local| shared.channel(local, owner));
        let answer = client.submit(case.ask.clone());
        until(case.name, || seen.load(Ordering::SeqCst) == case.operations);
        // Answered between two turns: what the turn that was seen has begun, it has handed on.
        client.handle().call(|_| ()).expect("runs");
        let held = Held { _dir: dir, path, backend, client, answer, release, owner: weak, _pool: pool };
        assert!(!held.landed(case), "{}: nothing holds it back", case.name);
        held
    }

    fn landed(&self, case: &Case) -> bool {
        landed(&self.path, case)
    }
}

fn landed(path: &std::path::Path, case: &Case) -> bool {
    let mut byte = [0];
    std::fs::File::open(path).and_then(|file| file.read_exact_at(&mut byte, case.lands.0)).expect("readable");
    byte[0] == case.lands.1
}

#[test]
fn a_reactor_that_stops_keeps_the_lease_until_its_slow_io_has_landed() {
    for case in slow() {
        let held = Held::new(&case, Duration::from_secs(60));
        let (handle, owner) = (held.client.handle(), held.owner.clone());
        let ending = std::thread::spawn(move || drop(held.client));
        let answer = held.answer.recv_timeout(Duration::from_secs(10)).expect("an answer");
        let error = answer.result.expect_err("the disk stops");
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{}", case.name);
        // The task is gone, and with it the channel; the reactor still turns, for the sake of the operation.
        assert!(handle.call(|_| ()).is_some(), "{}: the reactor did not wait", case.name);
        assert!(!landed(&held.path, &case), "{}: landed too early", case.name);
        assert!(owner.upgrade().is_some(), "{}: the lease went before the I/O had landed", case.name);
        drop(held.release);
        ending.join().expect("ended");
        assert!(landed(&held.path, &case), "{}: never landed", case.name);
        assert!(owner.upgrade().is_none(), "{}: the lease stays behind", case.name);
    }
}

#[test]
fn so_does_the_fast_path_whose_request_is_answered_by_what_it_came_to() {
    let case = Case::new("an aligned write", Ask::write(4096, vec![NEW; 4096]), (4096, NEW));
    let held = Held::new(&case, Duration::from_secs(60));
    let (handle, owner) = (held.client.handle(), held.owner.clone());
    let ending = std::thread::spawn(move || drop(held.client));
    until("the stop", || handle.call(|_| support::is_closed()).unwrap_or(true));
    assert!(held.answer.recv_timeout(Duration::from_millis(100)).is_err(), "it is not known yet");
    assert!(owner.upgrade().is_some(), "the lease went before the I/O had landed");
    drop(held.release);
    ending.join().expect("ended");
    held.answer.recv().expect("an answer").result.expect("written");
    assert!(landed(&held.path, &case) && owner.upgrade().is_none());
}

/// Storage that hangs for longer than a stop may take: the lease stays for the rest of the process.
#[test]
fn a_reactor_that_gives_up_on_io_never_gives_the_lease_back() {
    for case in slow() {
        let held = Held::new(&case, Duration::from_millis(10));
        drop(held.client);
        assert!(!landed(&held.path, &case), "{}: landed too early", case.name);
        assert!(held.owner.upgrade().is_some(), "{}: the lease went before the I/O had landed", case.name);
        drop(held.release);
        until(case.name, || landed(&held.path, &case));
        assert!(held.owner.upgrade().is_some(), "{}", case.name);
    }
}

/// The first write of a part waits for whole ones that went without a lock; a stop does not wait with it.
#[test]
fn a_stop_ends_the_wait_of_the_first_part_for_whole_writes() {
    let whole = || Case::new("an aligned write", Ask::write(4096, vec![NEW; 4096]), (4096, NEW));
    let part = || Ask::write(4100, vec![1; 10]);
    let given_up = |answer: Receiver<Answer>, whose: &str| {
        let answer = answer.recv_timeout(Duration::from_secs(10));
        let error = answer.expect("an answer").result.expect_err("the disk stops");
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{whose}");
    };

    let case = whole();
    let held = Held::new(&case, Duration::from_secs(60));
    if !held.backend.is_direct() {
        return; // Nothing is a part there, and nothing waits.
    }
    // On a queue of its own, which ends at once, however long the other's write takes.
    let other = Client::on_file(EngineKind::Auto, &held.backend);
    let waits = other.submit(part());
    assert!(waits.recv_timeout(Duration::from_millis(50)).is_err(), "it does not wait");
    drop(other);
    given_up(waits, "another queue");
    assert!(!held.landed(&case), "nothing was held back");

    // On the queue of the whole write, which ends when that has landed.
    let waits = held.client.submit(part());
    assert!(waits.recv_timeout(Duration::from_millis(50)).is_err(), "it does not wait");
    let ending = std::thread::spawn(move || drop(held.client));
    given_up(waits, "the same queue");
    assert!(held.answer.recv_timeout(Duration::from_millis(50)).is_err(), "the whole write has not landed");
    drop(held.release);
    ending.join().expect("ended");
    held.answer.recv().expect("an answer").result.expect("written");

    // Nothing is left of those that gave up.
    let after = Client::on_file(EngineKind::Auto, &held.backend);
    after.write(4100, vec![2; 10]);
    assert_eq!(after.read(4096, 16), [vec![NEW; 4], vec![2; 10], vec![NEW; 2]].concat());
}
