//! A ring on its reactor: takes requests, gives them to the disk, and answers them when they come back.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use vbd_core::{Channel, Error, ErrorKind, IoVec, Operation, QueueCounters, Request, Result, Session, Sink};
use vbd_ring::{Completion, FileHandle, Handle, Local, Op, OpId, Place, Poller};

use crate::abi::Status;
use crate::intake::{Core, Step};
use crate::slots::{Done, Part};
use crate::sys::EventChannel;

/// Everything that a queue needs to run; made on a thread that may block.
pub(crate) struct Setup {
    /// The device and the queue's number, for messages.
    pub(crate) label: String,
    pub(crate) core: Core,
    pub(crate) event: Box<dyn EventChannel>,
    pub(crate) session: Arc<dyn Session>,
    pub(crate) counters: Arc<QueueCounters>,
    pub(crate) numbers: Arc<Numbers>,
    /// Called once, when the front-end has broken the rules.
    pub(crate) broken: Box<dyn Fn(String) + Send>,
}

/// A queue's counts, read from other threads.
#[derive(Default)]
pub(crate) struct Numbers {
    pub(crate) requests: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) in_flight: AtomicU64,
}

/// After so many requests the front-end is shown which of them are done already.
const SHOW_AFTER: u32 = 16;
/// So many requests are copied in and given to the disk together.
const BATCH: usize = 8;

/// A queue as seen from other threads.
pub(crate) struct Remote(vbd_ring::Remote<Queue>);

impl Remote {
    /// Starts a queue on a reactor. Nothing is taken from its ring before [`go`](Self::go).
    ///
    /// # Errors
    /// There is no channel to be had, or the reactor has ended.
    pub(crate) fn start(handle: &Handle, setup: Setup) -> std::result::Result<Self, String> {
        vbd_ring::Remote::new(handle, |local, place| Queue::start(local, place, setup)).map(Remote)
    }

    /// Takes requests from now on.
    pub(crate) fn go(&self) {
        self.0.post(|queue| {
            queue.core.borrow_mut().paused = false;
            // The front-end may wait for an answer that a queue before this one gave and could not tell of.
            queue.notify();
            queue.wake();
        });
    }

    /// Takes nothing more, and tells when all that was taken is answered. With `keep`, what is cancelled stays in the
    /// record for a successor instead.
    pub(crate) fn stop(&self, keep: bool, done: SyncSender<()>) {
        self.0.post(move |queue| {
            if keep {
                queue.core.borrow_mut().leave();
            }
            *queue.stopping.borrow_mut() = Some(done);
            queue.wake();
        });
    }

    /// Fails requests that wait for something other than the storage.
    pub(crate) fn cancel_waiting(&self) {
        self.0.post(|queue| {
            let channel = queue.channel.borrow().clone();
            if let Some(channel) = channel {
                channel.cancel_waiting();
            }
        });
    }
}

pub(crate) struct Queue {
    place: Place,
    label: String,
    local: Local,
    counters: Arc<QueueCounters>,
    numbers: Arc<Numbers>,
    broken: Box<dyn Fn(String) + Send>,
    event: Box<dyn EventChannel>,
    /// None when the queue has stopped.
    channel: RefCell<Option<Rc<dyn Channel>>>,
    /// Looked at by the reactor.
    active: Cell<bool>,
    kick: RefCell<Option<Rc<Kick>>>,
    waiting: Cell<Option<OpId>>,
    /// To stop, and whom to tell.
    stopping: RefCell<Option<SyncSender<()>>>,
    core: RefCell<Core>,
    /// Last, so that it is dropped when all else has been given back.
    ended: RefCell<Option<Ended>>,
}

/// Tells that a queue has gone, with its mappings and its event channel.
struct Ended(SyncSender<()>);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.try_send(());
    }
}

impl Queue {
    fn start(local: &Local, place: Place, setup: Setup) -> std::result::Result<Rc<Queue>, String> {
        let channel = setup.session.channel(local).map_err(|error| error.to_string())?;
        let queue = Rc::new(Queue {
            place,
            label: setup.label,
            local: local.clone(),
            counters: setup.counters,
            numbers: setup.numbers,
            broken: setup.broken,
            event: setup.event,
            channel: RefCell::new(Some(channel)),
            active: Cell::new(false),
            kick: RefCell::default(),
            waiting: Cell::new(None),
            stopping: RefCell::default(),
            core: RefCell::new(setup.core),
            ended: RefCell::default(),
        });
        let kick = Rc::new(Kick { queue: queue.clone(), file: local.file(queue.event.descriptor()) });
        *queue.kick.borrow_mut() = Some(kick.clone());
        kick.wait();
        Ok(queue)
    }

    fn wake(self: &Rc<Self>) {
        if !self.active.replace(true) {
            self.local.activate(self.clone());
        }
    }

    fn notify(&self) {
        // What can go wrong is that the domain is gone, which xenstore tells.
        if let Err(error) = self.event.notify() {
            tracing::debug!("{}: cannot notify the domain: {error}", self.label);
        }
    }

    fn break_down(&self, core: &mut Core, reason: String) {
        if !std::mem::replace(&mut core.broken, true) {
            (self.broken)(reason);
        }
    }

    /// Takes what is there, up to a ring's length; true if there was something.
    fn take_all(self: &Rc<Self>) -> bool {
        let Some(channel) = self.channel.borrow().clone() else { return false };
        let stopping = self.stopping.borrow().is_some();
        let mut worked = false;
        let most = self.core.borrow().ring.entries();
        for taken in 1..=most {
            let many = {
                let core = &mut *self.core.borrow_mut();
                match core.next(!stopping) {
                    Step::Nothing => break,
                    Step::Broken(violation) => {
                        self.break_down(core, violation.to_string());
                        break;
                    }
                    Step::Taken => worked = true,
                }
                core.ready.len() >= BATCH
            };
            if !many && taken % SHOW_AFTER != 0 {
                continue;
            }
            self.launch(&channel);
            if taken % SHOW_AFTER == 0 && self.publish() {
                self.local.flush();
            }
        }
        self.launch(&channel) || worked
    }

    /// Copies data in, in one go, and gives requests to the disk; true if there were some.
    fn launch(self: &Rc<Self>, channel: &Rc<dyn Channel>) -> bool {
        let mut ready = {
            let core = &mut *self.core.borrow_mut();
            core.advance();
            if core.ready.is_empty() {
                return false;
            }
            core.copy_in();
            std::mem::take(&mut core.ready)
        };
        for slot in ready.drain(..) {
            let request = {
                let core = &mut *self.core.borrow_mut();
                core.part(slot).map(|(part, memory)| self.request(core, slot, part, memory))
            };
            if let Some(request) = request {
                channel.clone().submit(request);
            }
        }
        let core = &mut *self.core.borrow_mut();
        if core.ready.is_empty() {
            core.ready = ready;
        }
        true
    }

    #[inline]
    fn request(self: &Rc<Self>, core: &Core, slot: u16, part: Part, memory: Vec<IoVec>) -> Request {
        let mut request = Request::new(part.operation, part.offset, part.len, self.local.now(), self.clone());
        request.token = u64::from(slot);
        request.flags.fua = part.durable;
        request.guard = Some(core.guard(slot));
        request.memory = memory;
        request
    }

    /// Shows the front-end what was answered; true if there was something.
    fn publish(&self) -> bool {
        let core = &mut *self.core.borrow_mut();
        core.copy_out();
        let Some(notify) = core.publish() else { return false };
        if notify {
            self.notify();
        }
        let add = |counter: &AtomicU64, value: u64| counter.store(value, Ordering::Relaxed);
        add(&self.numbers.requests, core.answered);
        add(&self.numbers.errors, core.failed);
        true
    }

    /// Ends, if that was asked for and nothing is out any more.
    fn end_if_done(&self) {
        let stopping = self.stopping.borrow().is_some();
        if !stopping || self.core.borrow().out > 0 {
            return;
        }
        *self.ended.borrow_mut() = self.stopping.borrow_mut().take().map(Ended);
        self.core.borrow_mut().paused = true;
        *self.kick.borrow_mut() = None;
        if let Some(id) = self.waiting.take() {
            self.local.cancel(id);
        }
        // With the channel goes its hold on the session, and with the last of them the lease.
        *self.channel.borrow_mut() = None;
        self.place.leave();
    }

    #[cold]
    fn complain(&self, error: &Error) {
        match error.kind().is_guest_made() || error.kind() == ErrorKind::Cancelled {
            true => tracing::debug!("{}: {error}", self.label),
            false => tracing::error!("{}: {error}", self.label),
        }
    }
}

impl Sink for Queue {
    fn complete(self: Rc<Self>, mut request: Request, result: Result<()>) {
        let now = self.local.now();
        // What was issued in this turn has taken some of it.
        let now = if request.issued_at.is_none_or(|at| at < now) { now } else { Instant::now() };
        self.counters.record(&request, now, result.is_err());
        let core = &mut *self.core.borrow_mut();
        let Ok(slot) = u16::try_from(request.token) else { return };
        let pieces = std::mem::take(&mut request.memory);
        core.take_back(slot, request.operation, pieces);
        let status = match &result {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.complain(error);
                Status::from(error.kind())
            }
        };
        // The guard goes first: with it may go the mapping, before the answer.
        drop(request);
        if core.keep && matches!(&result, Err(error) if error.kind() == ErrorKind::Cancelled) {
            // Never to be answered here: whoever serves the ring next does it again.
            core.out -= 1;
        } else {
            core.completed(Done { slot, status });
        }
        self.numbers.in_flight.store(core.out as u64, Ordering::Relaxed);
        if !self.active.replace(true) {
            self.local.activate(self.clone());
        }
    }
}

impl Poller for Queue {
    fn poll(self: Rc<Self>) -> bool {
        let mut worked = self.publish();
        if self.take_all() {
            worked = true;
            self.numbers.in_flight.store(self.core.borrow().out as u64, Ordering::Relaxed);
            self.publish();
        }
        self.end_if_done();
        worked
    }

    fn arm(self: Rc<Self>) -> bool {
        let core = &mut *self.core.borrow_mut();
        if core.has_answers() || core.wants_turn() {
            return true;
        }
        if core.may_take() && self.stopping.borrow().is_none() && core.ring.arm() {
            return true;
        }
        self.active.set(false);
        false
    }
}

/// Waits for the front-end's notifications.
struct Kick {
    queue: Rc<Queue>,
    file: FileHandle,
}

impl Kick {
    fn wait(self: &Rc<Self>) {
        let op = Op::Poll { events: libc::POLLIN };
        // SAFETY: a poll has no pointers.
        let id = unsafe { self.queue.local.submit(&self.file, &op, self.clone(), 0) };
        self.queue.waiting.set(Some(id));
    }
}

impl Completion for Kick {
    fn complete(self: Rc<Self>, _token: u64, result: i32) {
        let queue = self.queue.clone();
        let current = queue.kick.borrow().as_ref().is_some_and(|kick| Rc::ptr_eq(kick, &self));
        let mut core = queue.core.borrow_mut();
        // A broken queue is not kicked alive, however often it is tried.
        if !current || core.broken || result == -libc::ECANCELED {
            return;
        }
        let drained = if result < 0 || result & i32::from(libc::POLLIN) == 0 {
            Err(std::io::Error::from_raw_os_error(libc::EIO))
        } else {
            queue.event.drain()
        };
        if let Err(error) = drained {
            queue.break_down(&mut core, format!("its event channel does not work any more: {error}"));
            return;
        }
        drop(core);
        self.wait();
        queue.wake();
    }
}

/// Which operations transfer data.
pub(crate) fn transfers(operation: Operation) -> bool {
    matches!(operation, Operation::Read | Operation::Write)
}
