//! Who is under way: grace periods for clusters that were given up, and the state in which nobody is.
//!
//! A channel belongs to one thread, so it counts its operations without atomics. Others ask it by a message: the
//! message is handled between two operations' steps, and what it carries, a [`Token`], is dropped when every operation
//! of the channel that began before has ended. When the last copy of a token is dropped, on whatever thread, all
//! channels are past that point. A reactor that has ended drops its messages, and has no operations.
//!
//! States of an image: *running*; *draining*, where new requests are parked and a token is out; *exclusive*, where it
//! has come back and whoever asked for the state works alone; and running again, where what was parked is submitted.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::sync::{Arc, PoisonError};
use std::task::{Poll, Waker};

use vbd_core::range_lock::{RangeGuard, RangeLocks};
use vbd_ring::sync::atomic::{AtomicBool, Ordering};
use vbd_ring::sync::{Mutex, MutexGuard, thread_local};
use vbd_ring::{Handle, Local};

/// What waits for the last copy of a token to be dropped.
#[derive(Default)]
struct Signal {
    done: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Signal {
    fn waker(&self) -> MutexGuard<'_, Option<Waker>> {
        self.waker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn wait(self: Arc<Self>) {
        poll_fn(|context| {
            // Before the look, so that one of the two sees the other.
            *self.waker() = Some(context.waker().clone());
            if self.done.load(Ordering::SeqCst) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

/// Held by a channel until what was under way in it has ended.
#[derive(Clone)]
pub(super) struct Token(#[allow(dead_code, reason = "held")] Arc<Last>);

struct Last(Arc<Signal>);

impl Drop for Last {
    fn drop(&mut self) {
        self.0.done.store(true, Ordering::SeqCst);
        let waker = self.0.waker().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The operations of one channel that are under way, by generation: a token begins a new one.
#[derive(Default)]
pub(super) struct Operations {
    generation: Cell<u64>,
    current: Cell<usize>,
    /// Earlier generations that have some left, oldest first, with the tokens that wait for them and those before.
    earlier: RefCell<VecDeque<(usize, Vec<Token>)>>,
}

impl Operations {
    /// Counts an operation in: its generation.
    #[inline]
    pub(super) fn begin(&self) -> u64 {
        self.current.set(self.current.get() + 1);
        self.generation.get()
    }

    /// Counts it out.
    #[inline]
    pub(super) fn end(&self, generation: u64) {
        if generation == self.generation.get() {
            self.current.set(self.current.get() - 1);
        } else {
            self.end_earlier(generation);
        }
    }

    fn end_earlier(&self, generation: u64) {
        let mut passed = Vec::new();
        let mut earlier = self.earlier.borrow_mut();
        let back = usize::try_from(self.generation.get() - generation).unwrap_or(usize::MAX);
        if let Some(entry) = earlier.len().checked_sub(back).and_then(|index| earlier.get_mut(index)) {
            entry.0 -= 1;
        }
        while earlier.front().is_some_and(|(count, _)| *count == 0) {
            passed.extend(earlier.pop_front());
        }
        drop(earlier);
        // Whoever waits for these may be woken by this.
        drop(passed);
    }

    /// Keeps a token until all that is under way now has ended.
    pub(super) fn hold(&self, token: Token) {
        let mut earlier = self.earlier.borrow_mut();
        if self.current.get() > 0 {
            earlier.push_back((self.current.replace(0), vec![token]));
            self.generation.set(self.generation.get() + 1);
        } else if let Some((_, tokens)) = earlier.back_mut() {
            tokens.push(token);
        } else {
            drop(earlier);
            drop(token);
        }
    }
}

/// A channel as these messages reach it.
pub(super) trait Member {
    /// Holds the token until what is under way has ended; parks new requests from now on if asked to.
    fn hold(&self, token: Token, park: bool);
    /// Gives up its way to the image behind, until it resumes. Nothing is under way.
    fn leave_below(&self);
    /// Takes new requests again, and those that were parked. The tables and the image behind may be others.
    fn resume(self: Rc<Self>);
}

thread_local! {
    /// The channels of this thread.
    static MEMBERS: RefCell<HashMap<u64, Weak<dyn Member>>> = RefCell::default();
}

fn member(id: u64) -> Option<Rc<dyn Member>> {
    MEMBERS.with(|members| members.borrow().get(&id).and_then(Weak::upgrade))
}

/// The channels of one image.
#[derive(Default)]
pub(super) struct Members {
    state: Mutex<State>,
    /// One at a time is alone.
    alone: Arc<RangeLocks>,
}

#[derive(Default)]
struct State {
    all: Vec<(Handle, u64)>,
    parked: bool,
    /// No channel has a way to the image behind.
    without_below: bool,
}

/// How a channel begins.
pub(super) struct Entered {
    /// Its number.
    pub(super) id: u64,
    /// It parks its requests until it is resumed.
    pub(super) parked: bool,
    /// It has no way to the image behind until it is resumed.
    pub(super) without_below: bool,
}

impl Members {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a channel of this thread.
    pub(super) fn enter(&self, channel: &Rc<dyn Member>, local: &Local) -> Entered {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        MEMBERS.with(|members| members.borrow_mut().insert(id, Rc::downgrade(channel)));
        let mut state = self.state();
        state.all.push((local.handle(), id));
        Entered { id, parked: state.parked, without_below: state.without_below }
    }

    /// Takes a channel of this thread out, which has nothing under way.
    pub(super) fn leave(&self, id: u64) {
        self.state().all.retain(|(_, other)| *other != id);
        // Where the thread ends, the table goes with all that is in it.
        let _ = MEMBERS.try_with(|members| members.borrow_mut().remove(&id));
    }

    /// Whether there are any.
    pub(super) fn are_there(&self) -> bool {
        !self.state().all.is_empty()
    }

    fn tokens(&self, park: bool) -> Arc<Signal> {
        let signal = Arc::new(Signal::default());
        let token = Token(Arc::new(Last(signal.clone())));
        let mut state = self.state();
        if park {
            state.parked = true;
        }
        for (handle, id) in &state.all {
            let (token, id) = (token.clone(), *id);
            handle.post(move |_| {
                if let Some(member) = member(id) {
                    member.hold(token, park);
                }
            });
        }
        signal
    }

    /// Has every channel give up its way to the image behind, and waits until they have. Only in the exclusive state,
    /// with whose end they look for the one there is then.
    pub(super) async fn leave_below(&self) {
        let signal = Arc::new(Signal::default());
        let token = Token(Arc::new(Last(signal.clone())));
        {
            let mut state = self.state();
            state.without_below = true;
            for (handle, id) in &state.all {
                let (token, id) = (token.clone(), *id);
                handle.post(move |_| {
                    if let Some(member) = member(id) {
                        member.leave_below();
                    }
                    drop(token);
                });
            }
        }
        drop(token);
        signal.wait().await;
    }

    /// Waits until every operation that is under way now, on any channel, has ended.
    pub(super) async fn grace(&self) {
        self.tokens(false).wait().await;
    }

    /// Waits until nothing is under way on any channel, and keeps it so until the result is dropped.
    pub(super) async fn exclusive(self: &Arc<Self>) -> Exclusive {
        let turn = self.alone.lock(0..1).await;
        let signal = self.tokens(true);
        let exclusive = Exclusive { members: self.clone(), _turn: turn };
        signal.wait().await;
        exclusive
    }
}

/// Nothing is under way on any channel while this lives.
pub(super) struct Exclusive {
    members: Arc<Members>,
    _turn: RangeGuard,
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        let mut state = self.members.state();
        (state.parked, state.without_below) = (false, false);
        for (handle, id) in &state.all {
            let id = *id;
            handle.post(move |_| {
                if let Some(member) = member(id) {
                    member.resume();
                }
            });
        }
    }
}

#[cfg(all(test, shuttle))]
mod tests {
    //! Channels, reactors and the messages between them are the real ones; what an operation does is to wait.

    use std::future::Future;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::pin::Pin;
    use std::sync::Mutex;
    use std::task::Context;

    use vbd_ring::sync::mpsc::{Receiver, sync_channel};
    use vbd_ring::{Reactor, Settings};

    use super::*;

    /// What is going on, seen from above. Held for moments in which nobody else gets a turn.
    #[derive(Default)]
    struct World {
        state: Mutex<Seen>,
    }

    #[derive(Default)]
    struct Seen {
        /// Operations that have begun and not ended, by number.
        running: std::collections::BTreeSet<u64>,
        next: u64,
        alone: bool,
    }

    impl World {
        fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
            self.state.lock().unwrap()
        }
    }

    /// What a broken channel does.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Broken {
        Nothing,
        /// It gives tokens back at once.
        Hold,
        /// It goes on while it should park.
        Park,
        /// It forgets what it has parked.
        Resume,
    }

    struct Fake {
        world: Arc<World>,
        local: Local,
        operations: Operations,
        parked: RefCell<Vec<vbd_ring::sync::mpsc::SyncSender<()>>>,
        is_parked: Cell<bool>,
        broken: Broken,
    }

    impl Fake {
        /// An operation of several turns.
        fn submit(self: &Rc<Self>, done: vbd_ring::sync::mpsc::SyncSender<()>) {
            if self.is_parked.get() && self.broken != Broken::Park {
                return self.parked.borrow_mut().push(done);
            }
            let generation = self.operations.begin();
            let number = {
                let mut seen = self.world.seen();
                assert!(!seen.alone, "an operation begins while somebody is alone");
                seen.next += 1;
                let number = seen.next;
                seen.running.insert(number);
                number
            };
            let this = self.clone();
            self.local.spawn(async move {
                for _ in 0..2 {
                    this.local.unblock(|| ()).await;
                    assert!(!this.world.seen().alone, "an operation goes on while somebody is alone");
                }
                this.world.seen().running.remove(&number);
                this.operations.end(generation);
                let _ = done.send(());
            });
        }
    }

    impl Member for Fake {
        fn hold(&self, token: Token, park: bool) {
            if park {
                self.is_parked.set(true);
            }
            if self.broken != Broken::Hold {
                self.operations.hold(token);
            }
        }

        fn leave_below(&self) {}

        fn resume(self: Rc<Self>) {
            self.is_parked.set(false);
            let parked = std::mem::take(&mut *self.parked.borrow_mut());
            if self.broken != Broken::Resume {
                parked.into_iter().for_each(|done| self.submit(done));
            }
        }
    }

    /// A channel on a reactor, and its operations from another thread.
    struct Queue {
        channel: vbd_ring::Remote<(Rc<Fake>, u64, Arc<Members>, vbd_ring::Place)>,
        reactor: Handle,
    }

    impl Queue {
        fn new(reactor: &Reactor, members: &Arc<Members>, world: &Arc<World>, broken: Broken) -> Self {
            let (members, world) = (members.clone(), world.clone());
            let channel = vbd_ring::Remote::new(&reactor.handle(), move |local, place| {
                let fake = Rc::new(Fake {
                    world,
                    local: local.clone(),
                    operations: Operations::default(),
                    parked: RefCell::default(),
                    is_parked: Cell::new(false),
                    broken,
                });
                let member: Rc<dyn Member> = fake.clone();
                let Entered { id, parked, .. } = members.enter(&member, local);
                fake.is_parked.set(parked);
                Ok(Rc::new((fake, id, members, place)))
            });
            Queue { channel: channel.unwrap(), reactor: reactor.handle() }
        }

        fn start(&self) -> Receiver<()> {
            let (sender, receiver) = sync_channel(1);
            self.channel.post(move |channel| channel.0.submit(sender));
            receiver
        }
    }

    impl Drop for Queue {
        fn drop(&mut self) {
            self.channel.post(|channel| {
                channel.2.leave(channel.1);
                channel.3.leave();
            });
            self.reactor.call(|_| ());
        }
    }

    /// Waits for a future on this thread.
    fn block_on<T>(future: impl Future<Output = T>) -> T {
        struct Bell(vbd_ring::sync::mpsc::Sender<()>);
        impl std::task::Wake for Bell {
            fn wake(self: Arc<Self>) {
                let _ = self.0.send(());
            }
        }
        let (sender, receiver) = vbd_ring::sync::mpsc::channel();
        let waker = Waker::from(Arc::new(Bell(sender)));
        let mut future: Pin<Box<dyn Future<Output = T>>> = Box::pin(future);
        loop {
            match future.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(done) => return done,
                Poll::Pending => receiver.recv().unwrap(),
            }
        }
    }

    /// Two reactors with queues that come and go, one thread that waits for grace periods, two that want to be alone.
    fn run(broken: Broken) {
        let world = Arc::new(World::default());
        let members = Arc::new(Members::default());
        let reactors = [0, 1].map(|_| Reactor::spawn("queue", Settings::default()).unwrap());
        let first = Queue::new(&reactors[0], &members, &world, broken);
        let waits = {
            let (world, members) = (world.clone(), members.clone());
            vbd_ring::sync::thread::spawn(move || {
                for _ in 0..2 {
                    let before = world.seen().running.clone();
                    block_on(members.grace());
                    let left = before.intersection(&world.seen().running).count();
                    assert_eq!(left, 0, "a grace period ended before what had begun earlier");
                }
            })
        };
        let alone = [0, 1].map(|_| {
            let (world, members) = (world.clone(), members.clone());
            vbd_ring::sync::thread::spawn(move || {
                let exclusive = block_on(members.exclusive());
                {
                    let mut seen = world.seen();
                    assert!(seen.running.is_empty(), "alone with an operation");
                    assert!(!seen.alone, "two are alone");
                    seen.alone = true;
                }
                vbd_ring::sync::thread::yield_now();
                world.seen().alone = false;
                drop(exclusive);
            })
        });
        let mut out = vec![first.start(), first.start()];
        let second = Queue::new(&reactors[1], &members, &world, broken);
        for _ in 0..3 {
            out.extend([first.start(), second.start()]);
        }
        // Every operation ends, whoever was alone meanwhile.
        out.into_iter().for_each(|done| done.recv().expect("an operation was lost"));
        drop(second);
        waits.join().unwrap();
        alone.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(members.state().all.len() == 1 && !members.state().parked);
        drop(first);
    }

    fn in_orders(rounds: usize, broken: Broken) {
        let mut config = shuttle::Config::new();
        config.stack_size = 256 << 10;
        config.failure_persistence = shuttle::FailurePersistence::None;
        let random = shuttle::scheduler::RandomScheduler::new_from_seed(1, rounds);
        shuttle::Runner::new(random, config.clone()).run(move || run(broken));
        let late = shuttle::scheduler::PctScheduler::new_from_seed(1, 3, rounds);
        shuttle::Runner::new(late, config).run(move || run(broken));
    }

    #[test]
    fn nobody_is_disturbed_who_is_alone_and_nobody_waits_for_ever() {
        in_orders(600, Broken::Nothing);
    }

    /// The check can fail.
    #[test]
    fn broken_channels_are_found() {
        for broken in [Broken::Hold, Broken::Park, Broken::Resume] {
            let found = catch_unwind(AssertUnwindSafe(|| in_orders(600, broken)));
            assert!(found.is_err(), "a broken channel was not found");
        }
    }
}
