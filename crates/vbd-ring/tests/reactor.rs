//! The reactor through its public face, on both engines.

use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use vbd_ring::{Completion, EngineKind, IoVec, Local, Op, Place, Poller, Reactor, Remote, Settings};

const LONG: Duration = Duration::from_secs(20);

fn both(test: impl Fn(&Reactor)) {
    for engine in [EngineKind::Uring, EngineKind::Threads] {
        let settings = Settings { engine, stop_within: Duration::from_secs(2), ..Settings::default() };
        let reactor = Reactor::spawn("test", settings).expect("a reactor");
        assert_eq!(reactor.handle().call(|local| local.is_uring()), Some(engine == EngineKind::Uring));
        test(&reactor);
        reactor.join();
    }
}

/// Sends each result to the test.
struct Tell(Sender<(u64, i32)>);

impl Completion for Tell {
    fn complete(self: Rc<Self>, token: u64, result: i32) {
        let _ = self.0.send((token, result));
    }
}

fn temporary() -> Arc<OwnedFd> {
    Arc::new(tempfile::tempfile().expect("a file").into())
}

#[test]
fn file_operations_do_what_the_system_calls_do() {
    both(|reactor| {
        let file = temporary();
        let (inside, handle) = (file.clone(), reactor.handle());
        let (done, results) = channel();
        handle.post(move |local| {
            let local = local.clone();
            let file = local.file(inside);
            local.clone().spawn(async move {
                let mut data = vec![vec![1u8; 512], vec![2u8; 1024]];
                let iov: Vec<IoVec> = data
                    .iter_mut()
                    .map(|part| IoVec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() })
                    .collect();
                let write = Op::Write { iov: iov.as_ptr(), count: 2, offset: 4096, dsync: true };
                // SAFETY: the data and the pieces are lent for as long as it takes.
                let (written, lent) = unsafe { local.perform(&file, &write, (data, iov)) }.await;
                let read = Op::Read { iov: lent.1.as_ptr(), count: 1, offset: 4096 + 512 };
                // SAFETY: as above.
                let (read, lent) = unsafe { local.perform(&file, &read, lent) }.await;
                let punch = Op::Fallocate { mode: libc::FALLOC_FL_ZERO_RANGE, offset: 0, len: 8192 };
                // SAFETY: no memory is named.
                let zeroed = unsafe { local.perform(&file, &punch, ()) }.await.0;
                // SAFETY: as above.
                let synced = unsafe { local.perform(&file, &Op::Sync, ()) }.await.0;
                let _ = done.send((written, read, lent.0[0][0], zeroed, synced));
            });
        });
        let (written, read, first, zeroed, synced) = results.recv_timeout(LONG).expect("an answer");
        assert_eq!((written, read, first, synced), (1536, 512, 2, 0));
        // A filesystem may lack it, but then it says so.
        assert!(zeroed == 0 || zeroed == -libc::EOPNOTSUPP, "{zeroed}");
    });
}

#[test]
fn a_socket_waits_without_holding_up_others() {
    both(|reactor| {
        let (mut ours, theirs) = UnixStream::pair().expect("sockets");
        let theirs: Arc<OwnedFd> = Arc::new(theirs.into());
        let (done, results) = channel();
        reactor.handle().post(move |local| {
            let socket = local.file(theirs);
            let local = local.clone();
            local.clone().spawn(async move {
                loop {
                    let mut buffer = vec![0u8; 64];
                    let receive = Op::Recv { buffer: buffer.as_mut_ptr(), len: 64 };
                    // SAFETY: the buffer is lent.
                    let (len, buffer) = unsafe { local.perform(&socket, &receive, buffer) }.await;
                    if len <= 0 {
                        let _ = done.send(len);
                        return;
                    }
                    let mut piece =
                        Box::new(IoVec { iov_base: buffer.as_ptr().cast_mut().cast(), iov_len: 2 });
                    // SAFETY: all zeroes is a message without anything.
                    let mut message: Box<libc::msghdr> = Box::new(unsafe { std::mem::zeroed() });
                    message.msg_iov = &raw mut *piece;
                    message.msg_iovlen = 1;
                    let send = Op::Send { message: &raw const *message };
                    // SAFETY: message, piece and buffer are lent.
                    let sent = unsafe { local.perform(&socket, &send, (message, piece, buffer)) }.await.0;
                    let _ = done.send(sent);
                }
            });
        });
        assert!(results.recv_timeout(Duration::from_millis(50)).is_err(), "nothing to receive yet");
        assert!(reactor.handle().call(|_| ()).is_some(), "others go on");
        ours.write_all(b"hello").expect("sent");
        let mut answer = [0; 2];
        ours.read_exact(&mut answer).expect("answered");
        assert_eq!((&answer, results.recv_timeout(LONG)), (b"he", Ok(2)));
        drop(ours);
        assert_eq!(results.recv_timeout(LONG), Ok(0), "the end of the stream");
    });
}

#[test]
fn a_cancelled_operation_ends_and_a_dropped_future_cancels_its_own() {
    both(|reactor| {
        let (_ours, theirs) = UnixStream::pair().expect("sockets");
        let theirs: Arc<OwnedFd> = Arc::new(theirs.into());
        let (done, results) = channel();
        struct Alive(Sender<(u64, i32)>);
        impl Drop for Alive {
            fn drop(&mut self) {
                let _ = self.0.send((99, 0));
            }
        }
        reactor.handle().post(move |local| {
            let socket = local.file(theirs);
            // SAFETY: a poll names no memory.
            let id = unsafe {
                local.submit(&socket, &Op::Poll { events: libc::POLLIN }, Rc::new(Tell(done.clone())), 7)
            };
            local.cancel(id);
            let mut buffer = vec![0u8; 16];
            let receive = Op::Recv { buffer: buffer.as_mut_ptr(), len: 16 };
            let keep = (buffer, Alive(done));
            // SAFETY: the buffer is lent.
            drop(unsafe { local.perform(&socket, &receive, keep) });
        });
        let mut seen =
            [results.recv_timeout(LONG), results.recv_timeout(LONG)].map(|result| result.expect("ended"));
        seen.sort_unstable();
        assert_eq!(seen, [(7, -libc::ECANCELED), (99, 0)], "what was lent is given up at the completion");
    });
}

#[test]
fn more_operations_than_the_ring_holds_all_complete() {
    both(|reactor| {
        let (done, results) = channel();
        let file = temporary();
        rustix::fs::ftruncate(&file, 1 << 20).expect("sized");
        reactor.handle().post(move |local| {
            let file = local.file(file);
            struct Owner(
                #[allow(dead_code, reason = "owns what the pieces name")] Vec<u8>,
                Box<IoVec>,
                Sender<(u64, i32)>,
            );
            impl Completion for Owner {
                fn complete(self: Rc<Self>, token: u64, result: i32) {
                    let _ = self.2.send((token, result));
                }
            }
            for token in 0..10_000 {
                let mut buffer = vec![0u8; 512];
                let piece = IoVec { iov_base: buffer.as_mut_ptr().cast(), iov_len: 512 };
                let owner = Rc::new(Owner(buffer, Box::new(piece), done.clone()));
                let read = Op::Read { iov: &raw const *owner.1, count: 1, offset: token % 2048 * 512 };
                // SAFETY: the sink owns the buffer.
                unsafe { local.submit(&file, &read, owner, token) };
            }
        });
        let mut seen = vec![false; 10_000];
        for _ in 0..10_000 {
            let (token, result) = results.recv_timeout(LONG).expect("every one completes");
            assert_eq!(result, 512);
            let entry = &mut seen[usize::try_from(token).expect("small")];
            assert!(!std::mem::replace(entry, true), "completed twice");
        }
        assert!(results.recv_timeout(Duration::from_millis(10)).is_err());
    });
}

#[test]
fn timers_go_off_in_order_and_can_be_taken_back() {
    both(|reactor| {
        let (done, results) = channel();
        reactor.handle().post(move |local| {
            let sink = Rc::new(Tell(done));
            let at = |ms| Instant::now() + Duration::from_millis(ms);
            local.timer(at(30), sink.clone(), 2);
            local.timer(at(5), sink.clone(), 1);
            let never = local.timer(at(10), sink, 9);
            assert!(local.cancel_timer(never));
            assert!(!local.cancel_timer(never));
        });
        assert_eq!(results.recv_timeout(LONG), Ok((1, 0)));
        assert_eq!(results.recv_timeout(LONG), Ok((2, 0)));
        assert!(results.recv_timeout(Duration::from_millis(10)).is_err());
    });
}

#[test]
fn blocking_calls_run_elsewhere_and_a_panic_in_one_is_an_error() {
    both(|reactor| {
        let (done, results) = channel();
        let (release, wait) = channel::<()>();
        reactor.handle().post(move |local| {
            let sink = Rc::new(Tell(done));
            let block = move || if wait.recv().is_ok() { 5 } else { 6 };
            local.blocking(block, sink.clone(), 1);
            local.blocking(|| panic!("on purpose"), sink, 2);
        });
        assert_eq!(results.recv_timeout(LONG), Ok((2, -libc::EIO)));
        release.send(()).expect("waiting");
        assert_eq!(results.recv_timeout(LONG), Ok((1, 5)));
    });
}

/// A ring in shared memory, for the poller: a counter.
struct Counter {
    local: Local,
    arrived: Arc<std::sync::atomic::AtomicU64>,
    seen: Cell<u64>,
    armed: Cell<u32>,
    tell: Sender<(u64, u32)>,
}

impl Poller for Counter {
    fn poll(self: Rc<Self>) -> bool {
        let arrived = self.arrived.load(std::sync::atomic::Ordering::SeqCst);
        if arrived == self.seen.get() {
            return false;
        }
        self.seen.set(arrived);
        let _ = self.tell.send((arrived, self.armed.get()));
        true
    }

    fn arm(self: Rc<Self>) -> bool {
        self.armed.set(self.armed.get() + 1);
        self.poll()
    }
}

#[test]
fn a_poller_is_looked_at_until_armed_and_the_reactor_sleeps_without_cpu() {
    both(|reactor| {
        let arrived = Arc::new(std::sync::atomic::AtomicU64::new(1));
        let (tell, results) = channel();
        let inside = arrived.clone();
        let poller = Rc::new(RefCell::new(None::<Rc<Counter>>));
        drop(poller);
        let cpu = reactor
            .handle()
            .call(move |local| {
                let (local, seen, armed) = (local.clone(), Cell::new(0), Cell::new(0));
                let counter = Rc::new(Counter { local, arrived: inside, seen, armed, tell });
                counter.local.clone().activate(counter);
                thread_cpu()
            })
            .expect("runs");
        assert_eq!(results.recv_timeout(LONG), Ok((1, 0)));
        std::thread::sleep(Duration::from_millis(300));
        arrived.store(2, std::sync::atomic::Ordering::SeqCst);
        assert!(results.recv_timeout(Duration::from_millis(50)).is_err(), "armed pollers wait for a kick");
        let after = reactor.handle().call(|_| thread_cpu()).expect("runs");
        // Asleep for 300 ms: at most a few turns and one adaptive spin.
        assert!(after - cpu < Duration::from_millis(100), "{:?} of CPU while idle", after - cpu);
    });
}

fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec).expect("below a second"))
}

#[test]
fn a_reactor_that_ends_waits_for_its_io_and_refuses_new_posts() {
    for engine in [EngineKind::Uring, EngineKind::Threads] {
        let reactor = Reactor::spawn("test", Settings { engine, ..Settings::default() }).expect("a reactor");
        let handle = reactor.handle();
        let (done, results) = channel();
        let (_ours, theirs) = UnixStream::pair().expect("sockets");
        let theirs: Arc<OwnedFd> = Arc::new(theirs.into());
        handle.post(move |local| {
            let sink = Rc::new(Tell(done));
            let slow = || {
                std::thread::sleep(Duration::from_millis(100));
                3
            };
            local.blocking(slow, sink.clone(), 1);
            let socket = local.file(theirs);
            // SAFETY: a poll names no memory.
            unsafe { local.submit(&socket, &Op::Poll { events: libc::POLLIN }, sink, 2) };
        });
        assert!(handle.call(|_| ()).is_some());
        reactor.join();
        let mut seen: Vec<_> = results.iter().collect();
        seen.sort_unstable();
        assert_eq!(seen, [(1, 3), (2, -libc::ECANCELED)]);
        assert!(!handle.post(|_| ()));
        assert!(handle.call(|_| ()).is_none());
    }
}

#[test]
fn registered_files_are_given_back() {
    let reactor = Reactor::spawn("test", Settings::default()).expect("a reactor");
    let file = temporary();
    let inside = file.clone();
    reactor.handle().call(move |local| {
        // More than the ring's table has slots: none may leak.
        for _ in 0..10_000 {
            let handle = local.file(inside.clone());
            assert!(rustix::fs::fstat(handle.as_fd()).is_ok());
        }
    });
    reactor.handle().call(|_| ());
    assert_eq!(Arc::strong_count(&file), 1);
}

#[test]
fn a_command_that_a_file_does_not_know_is_an_error_and_holds_nothing_up() {
    both(|reactor| {
        let (sender, results) = channel();
        reactor.handle().post(move |local| {
            let file = local.plain_file(temporary());
            let op = Op::Command { op: 1, data: [0; 16] };
            // SAFETY: the command has no pointers.
            unsafe { local.submit(&file, &op, Rc::new(Tell(sender)), 7) };
        });
        assert_eq!(results.recv_timeout(LONG), Ok((7, -libc::EOPNOTSUPP)));
    });
}

#[test]
fn a_control_command_has_its_result() {
    let file = temporary();
    // SAFETY: the command has no pointers.
    let result = unsafe { vbd_ring::command::run(file.as_fd(), 1, [0; 80]) };
    assert_eq!(result.expect("a ring"), -libc::EOPNOTSUPP);
}

/// Counts, and tells when it is dropped.
struct Resident {
    count: Cell<u32>,
    place: Place,
    gone: Sender<()>,
}

impl Drop for Resident {
    fn drop(&mut self) {
        // Where it lives may still be used.
        self.place.leave();
        let _ = self.gone.send(());
    }
}

#[test]
fn an_object_on_a_reactor_is_reached_until_it_leaves() {
    both(|reactor| {
        let (gone, ended) = channel();
        let make = |gone: Sender<()>| {
            let made = move |_: &Local, place| Ok(Rc::new(Resident { count: Cell::new(0), place, gone }));
            Remote::new(&reactor.handle(), made).expect("made")
        };
        let (one, other) = (make(gone.clone()), make(gone));
        let again = one.clone();
        for _ in 0..3 {
            again.post(|object| object.count.set(object.count.get() + 1));
        }
        assert_eq!(one.with(|object| object.count.get()), Some(3));
        assert_eq!(other.with(|object| object.count.get()), Some(0));
        // Whoever holds it has it still; others do not find it.
        let during = one.with(|object| {
            object.place.leave();
            object.count.get()
        });
        assert_eq!(during, Some(3));
        ended.recv_timeout(LONG).expect("dropped");
        assert_eq!(one.with(|_| ()), None);
        one.post(|_| unreachable!("it is gone"));
        assert_eq!(other.with(|_| ()), Some(()));
        // The other is dropped with its thread.
        assert!(ended.try_recv().is_err());
    });
}

#[test]
fn an_object_that_is_not_made_or_leaves_at_once_leaves_nothing_behind() {
    both(|reactor| {
        let (gone, ended) = channel();
        let failed = Remote::<Resident>::new(&reactor.handle(), |_, _| Err("as the test wants it".into()));
        assert_eq!(failed.err().as_deref(), Some("as the test wants it"));
        let leaves = Remote::new(&reactor.handle(), move |_, place| {
            place.leave();
            Ok(Rc::new(Resident { count: Cell::new(0), place, gone }))
        });
        ended.recv_timeout(LONG).expect("dropped");
        assert_eq!(leaves.expect("made").with(|_| ()), None);
    });
    let reactor = Reactor::spawn("test", Settings::default()).expect("a reactor");
    let handle = reactor.handle();
    reactor.join();
    let late = Remote::new(&handle, |_, _| Ok(Rc::new(())));
    assert_eq!(late.err().as_deref(), Some("the reactor has ended"));
}
