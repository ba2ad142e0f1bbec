//! The loop: deliver what has finished, look at active pollers, sleep when there is nothing.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crate::clock::Timers;
use crate::engine::{Engine, Flights};
use crate::file::Unregister;
use crate::op::Waits;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::task::{Awaited, AwaitedResult, Cancel, Tasks};
use crate::{Completion, EngineKind, FileHandle, Op, OpId, Poller, TimerId, pool};

/// How a reactor runs.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What carries operations out.
    pub engine: EngineKind,
    /// The longest time to look at active pollers before sleeping. Pauses that were longer end it, until there was
    /// a shorter one. Where work is [expected](Local::expect) it may be up to ten times as long.
    pub spin: Duration,
    /// After a stop was asked for, how long operations in flight may take before they are cancelled.
    pub stop_within: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            engine: EngineKind::Auto,
            spin: Duration::from_micros(100),
            stop_within: Duration::from_secs(10),
        }
    }
}

/// So many short pauses in a row make it worth spinning through the next. Storage that answers a batch in parts makes
/// short ones now and then, before a long one that would be spun through in vain.
const SHORT_IN_A_ROW: u32 = 8;

/// A result to deliver later in the turn.
type Deferred = (Rc<dyn Completion>, u64, i32);

type Post = Box<dyn FnOnce(&Local) + Send>;

/// What other threads have for a reactor.
#[derive(Default)]
struct Mail {
    posts: Vec<Post>,
    finished: Vec<(OpId, i32)>,
}

/// The part of a reactor that other threads reach.
pub(crate) struct Shared {
    mail: Mutex<Mail>,
    /// There is mail: looked at every turn, so that the lock is taken only then.
    some: AtomicBool,
    wake: OwnedFd,
    /// A wake-up is on its way: another is not needed.
    woken: AtomicBool,
    stop: AtomicBool,
    ended: AtomicBool,
    /// What the checker knows of the eventfd.
    #[cfg(shuttle)]
    pub(crate) bell: crate::simulated::Bell,
}

impl Shared {
    pub(crate) fn wake(&self) {
        if !self.woken.swap(true, Ordering::SeqCst) {
            // An eventfd refuses only at 2^64 - 1.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
            #[cfg(shuttle)]
            self.bell.ring();
        }
    }

    /// An operation that another thread carried out has ended.
    pub(crate) fn finished(&self, id: OpId, result: i32) {
        self.send(|mail| mail.finished.push((id, result)));
    }

    fn send(&self, put: impl FnOnce(&mut Mail)) {
        put(&mut self.mail.lock().unwrap_or_else(PoisonError::into_inner));
        self.some.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn take(&self) -> Mail {
        std::mem::take(&mut self.mail.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Reaches a reactor from any thread.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl PartialEq for Handle {
    /// Whether both reach the same reactor.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Handle {
    /// Runs `work` on the reactor's thread, soon. Gives it back dropped, with false, where the reactor has ended.
    pub fn post(&self, work: impl FnOnce(&Local) + Send + 'static) -> bool {
        if self.0.ended.load(Ordering::SeqCst) {
            return false;
        }
        self.0.send(|mail| mail.posts.push(Box::new(work)));
        true
    }

    /// Runs `work` on the reactor's thread and waits for its answer; none where the reactor has ended.
    /// Must not be called on a reactor's thread.
    pub fn call<T: Send + 'static>(&self, work: impl FnOnce(&Local) -> T + Send + 'static) -> Option<T> {
        let (sender, receiver) = crate::sync::mpsc::sync_channel(1);
        self.post(move |local| {
            let _ = sender.send(work(local));
        });
        receiver.recv().ok()
    }

    /// Asks the reactor to end: tasks are dropped, and it ends when nothing is in flight, cancelling what takes
    /// longer than [`Settings::stop_within`].
    pub fn stop(&self) {
        self.0.stop.store(true, Ordering::SeqCst);
        self.0.wake();
    }
}

/// A reactor that has panicked leaves queues that nobody serves and says nothing. A process that ends is noticed, and
/// what was in flight is repeated when it is back.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        // The checker tells of it in its own way.
        if std::thread::panicking() && !cfg!(shuttle) {
            eprintln!("vbd: a reactor has panicked; ending the process");
            std::process::abort();
        }
    }
}

/// A reactor's thread. Dropping it stops and joins the thread.
pub struct Reactor {
    handle: Handle,
    thread: Option<crate::sync::thread::JoinHandle<()>>,
}

impl Reactor {
    /// Starts a reactor on a thread of its own.
    ///
    /// # Errors
    /// No thread, eventfd or engine could be had.
    pub fn spawn(name: &str, settings: Settings) -> io::Result<Reactor> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let shared = Arc::new(Shared {
            mail: Mutex::default(),
            some: AtomicBool::new(false),
            wake: rustix::event::eventfd(0, flags)?,
            woken: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            #[cfg(shuttle)]
            bell: crate::simulated::Bell::default(),
        });
        let (sender, receiver) = crate::sync::mpsc::sync_channel(1);
        let inside = shared.clone();
        let thread = crate::sync::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // The ring belongs to the thread that uses it, so it is made there.
            match Local::new(settings, inside.clone()) {
                Ok(local) => {
                    let _ = sender.send(Ok(()));
                    let _watch = AbortOnPanic;
                    local.run();
                }
                Err(error) => {
                    let _ = sender.send(Err(error));
                }
            }
            inside.ended.store(true, Ordering::SeqCst);
            // Whoever waits for an answer learns that none will come.
            drop(inside.take());
        })?;
        let started = receiver.recv().unwrap_or_else(|_| Err(io::Error::other("the reactor's thread ended")));
        started.map(|()| Reactor { handle: Handle(shared), thread: Some(thread) })
    }

    /// A handle for other threads.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Stops the reactor and waits for its end.
    pub fn join(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.end();
    }
}

/// The reactor as code on its thread sees it. Cheap to clone.
#[derive(Clone)]
pub struct Local(Rc<Inner>);

struct Inner {
    settings: Settings,
    shared: Arc<Shared>,
    engine: RefCell<Engine>,
    flights: RefCell<Flights>,
    timers: RefCell<Timers>,
    deferred: RefCell<Vec<Deferred>>,
    active: RefCell<Vec<Rc<dyn Poller>>>,
    tasks: Tasks,
    now: Cell<Instant>,
    /// The reactor's own wait for a wake-up.
    wake_up: Cell<Option<OpId>>,
    spin: Cell<Duration>,
    /// Short pauses in a row.
    short: Cell<u32>,
    /// More work is [expected](Local::expect) after that of this turn.
    expecting: Cell<bool>,
    /// Slots of handles that were dropped while the engine was in use.
    unregister: RefCell<Vec<u32>>,
}

impl Unregister for Inner {
    fn unregister(&self, slot: u32) {
        match self.engine.try_borrow_mut() {
            Ok(mut engine) => engine.unregister(slot),
            Err(_) => self.unregister.borrow_mut().push(slot),
        }
    }
}

/// Clears the wake-up eventfd and waits for the next.
struct WakeUp(Local, FileHandle);

impl Completion for WakeUp {
    fn complete(self: Rc<Self>, _token: u64, result: i32) {
        self.0.0.wake_up.set(None);
        if result == -libc::ECANCELED {
            return;
        }
        // Cleared before the queues are read, so that a post after this wakes again.
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.1, &mut count);
        self.0.0.shared.woken.store(false, Ordering::SeqCst);
        self.wait();
    }
}

impl WakeUp {
    fn wait(self: Rc<Self>) {
        let (local, file) = (self.0.clone(), self.1.clone());
        // SAFETY: a poll has no pointers.
        let id = unsafe { local.submit(&file, &Op::Poll { events: libc::POLLIN }, self, 0) };
        local.0.wake_up.set(Some(id));
    }
}

impl Local {
    fn new(settings: Settings, shared: Arc<Shared>) -> io::Result<Self> {
        let engine = RefCell::new(Engine::new(settings.engine, &shared)?);
        Ok(Local(Rc::new(Inner {
            tasks: Tasks::new(shared.clone()),
            settings,
            shared,
            engine,
            flights: RefCell::default(),
            timers: RefCell::default(),
            deferred: RefCell::default(),
            active: RefCell::default(),
            now: Cell::new(Instant::now()),
            wake_up: Cell::new(None),
            spin: Cell::new(Duration::ZERO),
            short: Cell::new(0),
            expecting: Cell::new(false),
            unregister: RefCell::default(),
        })))
    }

    /// Makes a descriptor usable on this reactor. Sockets must be in blocking mode: the ring waits, not the thread.
    pub fn file(&self, fd: Arc<OwnedFd>) -> FileHandle {
        let slot = self.0.engine.borrow_mut().register(&fd);
        let inner: Weak<dyn Unregister> = Rc::downgrade(&(self.0.clone() as Rc<dyn Unregister>));
        FileHandle::new(fd, slot.map(|slot| (slot, inner)))
    }

    /// The same without a slot in the ring's table. Kernels before 6.13 keep a file whose slot was taken back open for
    /// as long as anything older is in flight on any slot: not for one whose closing somebody waits for.
    pub fn plain_file(&self, fd: Arc<OwnedFd>) -> FileHandle {
        FileHandle::new(fd, None)
    }

    /// Starts an operation; its result reaches `sink` with `token`, exactly once.
    ///
    /// # Safety
    /// The pointers in `op`, and the memory that its `iovec`s name, stay valid until then. The simple way: `sink`
    /// owns them, since the reactor owns `sink`.
    pub unsafe fn submit(&self, file: &FileHandle, op: &Op, sink: Rc<dyn Completion>, token: u64) -> OpId {
        let id = self.0.flights.borrow_mut().add(sink, token, op.waits(), Some(file.clone()));
        // SAFETY: the caller vouches for the pointers.
        unsafe { self.0.engine.borrow_mut().start(id, file, op) };
        id
    }

    /// Hands what was submitted to the kernel at once. Without this it goes when there are a few, or with the next sleep.
    pub fn flush(&self) {
        self.0.engine.borrow_mut().flush();
    }

    /// Says that more work is likely to come soon through the ring, and one by one, as from a socket with many requests
    /// under way: the reactor may spin before it sleeps next. It so stays on a processor of its own, where a peer that
    /// wakes it for each request would share one with it and both would work in turn.
    pub fn expect(&self) {
        self.0.expecting.set(true);
    }

    /// Asks the kernel to give an operation up. Its result comes all the same: -ECANCELED, or what it was.
    pub fn cancel(&self, id: OpId) {
        self.0.engine.borrow_mut().cancel(id);
    }

    /// Runs a call that may block on a thread of the pool; what it returns reaches `sink`.
    pub fn blocking(
        &self,
        work: impl FnOnce() -> i32 + Send + 'static,
        sink: Rc<dyn Completion>,
        token: u64,
    ) {
        let id = self.0.flights.borrow_mut().add(sink, token, Waits::Storage, None);
        let shared = self.0.shared.clone();
        pool::run(Box::new(move || {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(-libc::EIO);
            shared.finished(id, result);
        }));
    }

    /// Delivers `result` to `sink` later in this turn.
    pub fn defer(&self, sink: Rc<dyn Completion>, token: u64, result: i32) {
        self.0.deferred.borrow_mut().push((sink, token, result));
    }

    /// Delivers 0 to `sink` at a time, or soon after.
    pub fn timer(&self, at: Instant, sink: Rc<dyn Completion>, token: u64) -> TimerId {
        self.0.timers.borrow_mut().add(at, sink, token)
    }

    /// Takes a timer back; false if it has already gone off.
    pub fn cancel_timer(&self, id: TimerId) -> bool {
        self.0.timers.borrow_mut().cancel(id)
    }

    /// Looks at `poller` every turn until its [`arm`](Poller::arm) found nothing. Not to be called again before that.
    pub fn activate(&self, poller: Rc<dyn Poller>) {
        self.0.active.borrow_mut().push(poller);
    }

    /// The time at the start of this turn.
    pub fn now(&self) -> Instant {
        self.0.now.get()
    }

    /// A handle for other threads.
    pub fn handle(&self) -> Handle {
        Handle(self.0.shared.clone())
    }

    /// Whether this reactor has an io_uring (or else the thread pool).
    pub fn is_uring(&self) -> bool {
        self.0.engine.borrow().is_uring()
    }

    /// Runs a future on this thread. It is dropped, unfinished, when the reactor stops.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.0.tasks.spawn(Box::pin(task));
    }

    /// Awaits an operation. `keep` owns what its pointers point into and comes back with the result; where the
    /// future is dropped first the operation is cancelled and `keep` lives on until its completion.
    ///
    /// # Safety
    /// The pointers in `op` are valid as long as `keep` lives.
    pub unsafe fn perform<T: 'static>(
        &self,
        file: &FileHandle,
        op: &Op,
        keep: T,
    ) -> impl Future<Output = (i32, T)> + use<T> {
        let state = Awaited::new(Box::new(keep));
        // SAFETY: the sink owns `keep`.
        let id = unsafe { self.submit(file, op, state.clone(), 0) };
        let waiting = AwaitedResult { state, local: self.clone(), cancel: Cancel::Operation(id) };
        async move {
            let (result, keep) = waiting.await;
            (result, take_back(keep))
        }
    }

    /// Awaits a call that may block, run on a thread of the pool.
    pub fn unblock<T, F>(&self, work: F) -> impl Future<Output = T> + use<T, F>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let (sender, receiver) = crate::sync::mpsc::sync_channel(1);
        let state = Awaited::new(Box::new(()));
        let run = move || {
            let _ = sender.send(work());
            0
        };
        self.blocking(run, state.clone(), 0);
        let waiting = AwaitedResult { state, local: self.clone(), cancel: Cancel::Nothing };
        async move {
            waiting.await;
            receiver.try_recv().unwrap_or_else(|_| panic!("a blocking call panicked"))
        }
    }

    /// Awaits a time.
    pub fn sleep(&self, time: Duration) -> impl Future<Output = ()> + use<> {
        let state = Awaited::new(Box::new(()));
        let id = self.timer(Instant::now() + time, state.clone(), 0);
        let waiting = AwaitedResult { state, local: self.clone(), cancel: Cancel::Timer(id) };
        async move {
            waiting.await;
        }
    }

    fn run(&self) {
        if let Ok(wake) = self.0.shared.wake.as_fd().try_clone_to_owned() {
            let wake = self.file(Arc::new(wake));
            Rc::new(WakeUp(self.clone(), wake)).wait();
        }
        let mut done = Vec::with_capacity(256);
        // When there was nothing to do any more.
        let mut idle_since = None;
        let mut stopping: Option<Instant> = None;
        loop {
            self.0.now.set(Instant::now());
            self.0.engine.borrow_mut().reap(&mut done);
            let (bound, expecting) = (self.bound(), self.0.expecting.take());
            if self.turn(&mut done) {
                if let Some(since) = idle_since.take() {
                    self.adapt(self.0.now.get() - since, bound);
                }
                continue;
            }
            self.0.expecting.set(expecting);
            if self.0.shared.stop.load(Ordering::SeqCst) && self.may_end(&mut stopping) {
                break;
            }
            let now = self.0.now.get();
            let since = *idle_since.get_or_insert(now);
            let busy = self.0.expecting.get() || !self.0.active.borrow().is_empty();
            if busy && now < since + self.0.spin.get().min(self.bound()) {
                self.0.engine.borrow_mut().flush();
                std::hint::spin_loop();
                continue;
            }
            // Its own thread wakes a task without a wake-up.
            if self.arm_all() || self.0.tasks.are_woken() {
                continue;
            }
            if !busy {
                // Nobody waits for what comes next.
                idle_since = None;
            }
            let next = self.0.timers.borrow().next_at().map(|at| at.saturating_duration_since(now));
            let bound = stopping.map(|_| Duration::from_millis(20));
            let timeout = match (next, bound) {
                (Some(next), Some(bound)) => Some(next.min(bound)),
                (next, bound) => next.or(bound),
            };
            self.0.engine.borrow_mut().wait(timeout, &mut done);
        }
        self.0.tasks.clear();
        // What the kernel still holds after the bound keeps its memory for the rest of the process.
        if self.0.flights.borrow().len() > 0 {
            std::mem::forget(self.clone());
        }
    }

    /// Everything that is there to do now; false if there was nothing.
    fn turn(&self, done: &mut Vec<(OpId, i32)>) -> bool {
        let inner = &*self.0;
        let mut worked = self.deliver(done);
        // After the deliveries, one of which may have cleared the wake-up.
        if inner.shared.some.load(Ordering::Relaxed) && inner.shared.some.swap(false, Ordering::SeqCst) {
            let mut mail = inner.shared.take();
            worked = true;
            self.deliver(&mut mail.finished);
            mail.posts.into_iter().for_each(|post| post(self));
        }
        loop {
            let due = inner.timers.borrow_mut().pop_due(inner.now.get());
            let Some((sink, token)) = due else { break };
            worked = true;
            sink.complete(token, 0);
        }
        worked |= inner.tasks.run();
        let mut index = 0;
        loop {
            let poller = inner.active.borrow().get(index).cloned();
            let Some(poller) = poller else { break };
            worked |= poller.poll();
            index += 1;
        }
        let deferred = std::mem::take(&mut *inner.deferred.borrow_mut());
        for (sink, token, result) in deferred {
            worked = true;
            sink.complete(token, result);
        }
        let slots = std::mem::take(&mut *inner.unregister.borrow_mut());
        for slot in slots {
            inner.engine.borrow_mut().unregister(slot);
        }
        worked
    }

    fn deliver(&self, done: &mut Vec<(OpId, i32)>) -> bool {
        let some = !done.is_empty();
        for (id, result) in done.drain(..) {
            let flight = self.0.flights.borrow_mut().take(id);
            if let Some((sink, token)) = flight {
                sink.complete(token, result);
            }
        }
        some
    }

    /// Arms every active poller before sleeping; true if one of them found work.
    fn arm_all(&self) -> bool {
        let pollers = std::mem::take(&mut *self.0.active.borrow_mut());
        let mut found = false;
        for poller in pollers {
            if poller.clone().arm() {
                found = true;
                self.0.active.borrow_mut().push(poller);
            }
        }
        found
    }

    /// The longest that may be spun now.
    fn bound(&self) -> Duration {
        let most = self.0.settings.spin;
        if self.0.expecting.get() { most * 10 } else { most }
    }

    /// Sets the time to spin from how long a pause has lasted of which so much might have been spun.
    fn adapt(&self, pause: Duration, bound: Duration) {
        // Also where it was slept through: spinning would have found the work.
        let short = if pause <= bound { (self.0.short.get() + 1).min(SHORT_IN_A_ROW) } else { 0 };
        self.0.short.set(short);
        self.0.spin.set(if short == SHORT_IN_A_ROW { bound } else { Duration::ZERO });
    }

    /// Whether a reactor that was asked to stop can end; cancels what is late.
    fn may_end(&self, stopping: &mut Option<Instant>) -> bool {
        self.0.tasks.clear();
        let now = Instant::now();
        let since = *stopping.get_or_insert(now);
        let wake_up = self.0.wake_up.get();
        let others = self.0.flights.borrow().ending() - usize::from(wake_up.is_some());
        if others == 0 || now > since + self.0.settings.stop_within * 2 {
            wake_up.into_iter().for_each(|id| self.cancel(id));
            let mut done = Vec::new();
            self.0.engine.borrow_mut().wait(Some(Duration::from_millis(100)), &mut done);
            self.turn(&mut done);
            return true;
        }
        // Sockets and eventfds may wait for ever: they are cancelled at once, I/O when it is late.
        let late = now > since + self.0.settings.stop_within;
        let ids = self.0.flights.borrow().ids(late);
        ids.into_iter().filter(|id| Some(*id) != wake_up).for_each(|id| self.cancel(id));
        false
    }
}

fn take_back<T: 'static>(keep: Option<Box<dyn Any>>) -> T {
    let keep = keep.and_then(|keep| keep.downcast().ok());
    *keep.expect("what was lent comes back once, with its type")
}
