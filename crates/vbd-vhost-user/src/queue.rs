//! A virtqueue on its reactor: takes requests from the available ring, gives them to the disk, and puts them into the
//! used ring when they come back.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Instant;

use vbd_core::{
    Channel, Error, ErrorKind, Guard, IoVec, Operation, QueueCounters, Request, Result, Session, Sink,
};
use vbd_ring::{Completion, FileHandle, Handle, Local, Op, OpId, Place, Poller};

use crate::chain::{Intake, Violation};
use crate::config::feature;
use crate::dirty::DirtyLog;
use crate::inflight::Tracker;
use crate::memory::Memory;
use crate::notify::{self, Call};
use crate::request::{Action, Limits, Part, Status, decide};
use crate::ring::{Addresses, Ring};
use crate::server::Shared;
use crate::sigbus::Owner;

/// Everything that a queue needs to run.
pub(crate) struct Setup {
    pub(crate) server: Arc<Shared>,
    /// The queue's number.
    pub(crate) number: usize,
    pub(crate) addresses: Addresses,
    pub(crate) size: u16,
    /// Running index of the next available entry, where the in-flight region does not know better.
    pub(crate) base: u16,
    pub(crate) features: u64,
    pub(crate) memory: Arc<Memory>,
    pub(crate) owner: Arc<Owner>,
    pub(crate) kick: Arc<OwnedFd>,
    pub(crate) call: Option<Arc<OwnedFd>>,
    pub(crate) error: Option<Arc<OwnedFd>>,
    pub(crate) session: Arc<dyn Session>,
    pub(crate) counters: Arc<QueueCounters>,
    pub(crate) limits: Limits,
    pub(crate) writeback: Arc<AtomicBool>,
    pub(crate) tracker: Option<TrackerSetup>,
    pub(crate) log: Option<Logging>,
}

/// A tracker on its way to the reactor.
pub(crate) struct TrackerSetup(pub(crate) Tracker);

// SAFETY: the tracker's pointer is into a mapping that it holds, and only one thread uses it at a time.
unsafe impl Send for TrackerSetup {}

/// Where writes to guest memory are logged.
#[derive(Clone)]
pub(crate) struct Logging {
    pub(crate) log: Arc<DirtyLog>,
    /// Guest address of the used ring, if writes to it are logged.
    pub(crate) used: Option<u64>,
}

/// After so many requests the driver is shown which of them are done already, so that it works on its next ones
/// meanwhile instead of afterwards.
const SHOW_AFTER: u16 = 16;

/// A queue as seen from other threads.
pub(crate) type Remote = vbd_ring::Remote<Queue>;

/// A request that was taken and is not yet in the used ring.
#[derive(Clone, Copy)]
struct Slot {
    status: *mut u8,
    /// Bytes of data to report when all went well.
    written: u32,
    /// Operations that are still out.
    parts: u16,
    worst: Status,
}

const FREE: Slot = Slot { status: std::ptr::null_mut(), written: 0, parts: 0, worst: Status::Ok };

pub(crate) struct Queue {
    place: Place,
    server: Arc<Shared>,
    number: usize,
    local: Local,
    owner: Arc<Owner>,
    counters: Arc<QueueCounters>,
    writeback: Arc<AtomicBool>,
    /// Every write is to be durable, whatever the cache mode.
    durable: bool,
    event_index: bool,
    limits: Limits,
    /// None when the queue has stopped.
    channel: RefCell<Option<Rc<dyn Channel>>>,
    /// Looked at by the reactor.
    active: Cell<bool>,
    core: RefCell<Core>,
}

struct Core {
    intake: Intake,
    guard: Guard,
    slots: Vec<Slot>,
    /// Vectors of requests that have come back.
    spare: Vec<Vec<IoVec>>,
    parts: Vec<Part>,
    /// Running indices of the used ring: filled, and shown to the driver.
    used: u16,
    published: u16,
    /// Operations out, of all requests.
    out: usize,
    tracker: Option<Tracker>,
    logging: Option<Logging>,
    call: Option<Call>,
    error: Option<Call>,
    kick: Option<Rc<Kick>>,
    waiting: Option<OpId>,
    paused: bool,
    /// The ring's memory was taken away.
    uprooted: bool,
    broken: bool,
    /// The front-end is gone: what is cancelled stays in flight, for it to come back to.
    detached: bool,
    stopping: Option<SyncSender<u16>>,
}

/// What to do next.
enum Step {
    Submit(u16, Part, Vec<IoVec>),
    SubmitParts(u16),
    Answered,
    Nothing,
}

impl Queue {
    /// Starts a queue on a reactor.
    ///
    /// # Errors
    /// Its ring or its in-flight region is not what it should be, or there is no channel to be had.
    pub(crate) fn start(handle: &Handle, setup: Setup) -> Result<Remote, String> {
        Remote::new(handle, |local, place| Queue::new(local, place, setup))
    }

    fn new(local: &Local, place: Place, setup: Setup) -> Result<Rc<Queue>, String> {
        let ring = Ring::new(&setup.memory, setup.addresses, setup.size)?;
        let used = ring.used();
        let mut tracker = setup.tracker.map(|tracker| tracker.0);
        let again = match &mut tracker {
            Some(tracker) => tracker.recover(used, setup.base)?,
            None => None,
        };
        let base = match &again {
            Some(heads) => used.wrapping_add(u16::try_from(heads.len()).unwrap_or(0)),
            None => setup.base,
        };
        let channel = setup.session.channel(local).map_err(|error| error.to_string())?;
        let indirect = setup.features & feature::INDIRECT != 0;
        let mut intake = Intake::new(ring, setup.memory.clone(), base, indirect);
        intake.resubmit(again.unwrap_or_default());
        let queue = Rc::new(Queue {
            place,
            server: setup.server,
            number: setup.number,
            local: local.clone(),
            owner: setup.owner,
            counters: setup.counters,
            writeback: setup.writeback,
            durable: setup.features & feature::FLUSH == 0,
            event_index: setup.features & feature::EVENT_INDEX != 0,
            limits: setup.limits,
            channel: RefCell::new(Some(channel)),
            active: Cell::new(false),
            core: RefCell::new(Core {
                intake,
                guard: setup.memory,
                slots: vec![FREE; usize::from(setup.size)],
                spare: Vec::new(),
                parts: Vec::new(),
                used,
                published: used,
                out: 0,
                tracker,
                logging: setup.log,
                call: None,
                error: setup.error.map(|fd| Call::new(local, fd)),
                kick: None,
                waiting: None,
                paused: false,
                uprooted: false,
                broken: false,
                detached: false,
                stopping: None,
            }),
        });
        queue.set_call(setup.call);
        queue.set_kick(setup.kick);
        // Requests may have been waiting for long: no kick will tell of them.
        queue.wake();
        Ok(queue)
    }

    /// Uses another eventfd for interrupts, and sends one: the driver may have missed one on the old.
    pub(crate) fn set_call(&self, fd: Option<Arc<OwnedFd>>) {
        let call = fd.map(|fd| Call::new(&self.local, fd));
        if let Some(call) = &call {
            call.send(&self.local);
        }
        self.core.borrow_mut().call = call;
    }

    /// Uses another eventfd for errors.
    pub(crate) fn set_error(&self, fd: Option<Arc<OwnedFd>>) {
        self.core.borrow_mut().error = fd.map(|fd| Call::new(&self.local, fd));
    }

    /// Uses another eventfd for kicks.
    pub(crate) fn set_kick(self: &Rc<Self>, fd: Arc<OwnedFd>) {
        self.forget_kick();
        let kick = Rc::new(Kick { queue: self.clone(), file: self.local.file(fd) });
        self.core.borrow_mut().kick = Some(kick.clone());
        kick.wait();
        self.wake();
    }

    fn forget_kick(&self) {
        let mut core = self.core.borrow_mut();
        core.kick = None;
        let waiting = core.waiting.take();
        drop(core);
        if let Some(id) = waiting {
            self.local.cancel(id);
        }
    }

    /// Takes requests, or leaves them in the ring.
    pub(crate) fn set_enabled(self: &Rc<Self>, enabled: bool) {
        self.core.borrow_mut().paused = !enabled;
        self.wake();
    }

    /// Logs writes to guest memory from now on, or no more.
    pub(crate) fn set_logging(&self, logging: Option<Logging>) {
        self.core.borrow_mut().logging = logging;
    }

    /// Uses another memory table. Requests in flight keep the one they have.
    pub(crate) fn set_memory(self: &Rc<Self>, memory: &Arc<Memory>, addresses: Addresses) {
        let mut core = self.core.borrow_mut();
        let ring = Ring::new(memory, addresses, core.intake.ring().size());
        // Front-ends take a region away and add it again, changed. Until the ring is back nothing is taken; what is in
        // flight ends in the old memory, which stays mapped for as long as it is needed.
        core.uprooted = ring.is_err();
        if let Ok(ring) = ring {
            core.guard = memory.clone();
            core.intake.move_to(ring, memory.clone());
        }
        drop(core);
        self.wake();
    }

    /// Stops: takes nothing more, and tells the index of the next available entry when all is done.
    pub(crate) fn stop(self: &Rc<Self>, detach: bool, done: SyncSender<u16>) {
        let mut core = self.core.borrow_mut();
        core.stopping = Some(done);
        core.detached |= detach;
        drop(core);
        self.wake();
    }

    /// Fails requests that wait for something other than the storage.
    pub(crate) fn cancel_waiting(&self) {
        let channel = self.channel.borrow().clone();
        if let Some(channel) = channel {
            channel.cancel_waiting();
        }
    }

    /// The front-end is gone: what waits for something other than the storage is left in flight, for it to come back
    /// to.
    pub(crate) fn detach(&self) {
        self.core.borrow_mut().detached = true;
        self.cancel_waiting();
    }

    fn wake(self: &Rc<Self>) {
        if !self.active.replace(true) {
            self.core.borrow().intake.ring().no_kicks(self.event_index);
            self.local.activate(self.clone());
        }
    }

    fn break_down(&self, core: &mut Core, reason: &dyn std::fmt::Display) {
        if !std::mem::replace(&mut core.broken, true) {
            self.server.complain(&format!("queue {} is given up: {reason}", self.number));
            if let Some(error) = &core.error {
                error.send(&self.local);
            }
        }
    }

    /// Takes what is there, up to a queue's length; true if there was something.
    fn take_all(self: &Rc<Self>) -> bool {
        let Some(channel) = self.channel.borrow().clone() else { return false };
        let mut worked = false;
        let most = self.core.borrow().intake.ring().size();
        for taken in 0..most {
            if taken % SHOW_AFTER == SHOW_AFTER - 1 && self.publish() {
                // The interrupt, too.
                self.local.flush();
            }
            let step = self.next(&mut self.core.borrow_mut());
            match step {
                Step::Nothing => break,
                Step::Answered => {}
                Step::Submit(head, part, memory) => {
                    channel.clone().submit(self.request(head, part, memory));
                }
                Step::SubmitParts(head) => loop {
                    let mut core = self.core.borrow_mut();
                    let Some(part) = core.parts.pop() else { break };
                    drop(core);
                    channel.clone().submit(self.request(head, part, Vec::new()));
                },
            }
            worked = true;
        }
        worked
    }

    #[inline]
    fn request(self: &Rc<Self>, head: u16, part: Part, memory: Vec<IoVec>) -> Request {
        let mut request = Request::new(part.operation, part.offset, part.len, self.local.now(), self.clone());
        request.token = u64::from(head);
        request.flags.may_unmap = part.may_unmap;
        request.flags.fua =
            part.operation.is_write() && (self.durable || !self.writeback.load(Ordering::Relaxed));
        request.guard = Some(self.core.borrow().guard.clone());
        request.memory = memory;
        request
    }

    #[inline]
    fn next(&self, core: &mut Core) -> Step {
        let leaving = core.stopping.is_some() && (core.detached || !core.intake.has_again());
        if core.broken || core.paused || core.uprooted || leaving {
            return Step::Nothing;
        }
        let mut pieces = core.spare.pop().unwrap_or_default();
        let (chain, again) = match core.intake.take(&mut pieces) {
            Ok(Some(taken)) => taken,
            Ok(None) => {
                core.spare.push(pieces);
                return Step::Nothing;
            }
            Err(violation) => {
                self.violated(core, violation);
                return Step::Nothing;
            }
        };
        let head = chain.head;
        if let Some(tracker) = &mut core.tracker
            && !again
        {
            tracker.taken(head);
        }
        let action = decide(&chain, &mut pieces, &self.limits, &mut core.parts);
        let slot = &mut core.slots[usize::from(head)];
        *slot = Slot { status: chain.status, ..FREE };
        match action {
            Action::One(part) => {
                slot.parts = 1;
                core.out += 1;
                if part.operation == Operation::Read {
                    slot.written = u32::try_from(part.len).unwrap_or(u32::MAX - 1);
                }
                Step::Submit(head, part, pieces)
            }
            Action::Several => {
                core.recycle(pieces);
                let parts = core.parts.len();
                core.slots[usize::from(head)].parts = u16::try_from(parts).unwrap_or(u16::MAX);
                core.out += parts;
                Step::SubmitParts(head)
            }
            Action::Answer(status, written) => {
                (slot.worst, slot.written) = (status, written);
                let memory = core.intake.memory().clone();
                if core.logging.is_some() {
                    self.log_pieces(core, &memory, &pieces);
                }
                core.recycle(pieces);
                self.finish(core, head, &memory);
                Step::Answered
            }
        }
    }

    #[cold]
    fn violated(&self, core: &mut Core, violation: Violation) {
        // Reading memory that has vanished gives zeroes: that is not the guest's doing.
        match self.owner.is_lost() {
            true => core.broken = true,
            false => self.break_down(core, &violation),
        }
    }

    /// Puts a request into the used ring; [`publish`](Self::publish) shows it.
    #[inline]
    fn finish(&self, core: &mut Core, head: u16, memory: &Memory) {
        let slot = core.slots[usize::from(head)];
        // SAFETY: in memory that the caller holds, found when the chain was read.
        unsafe { slot.status.write_volatile(slot.worst as u8) };
        if core.logging.is_some() {
            self.log_pieces(core, memory, &[IoVec { iov_base: slot.status.cast(), iov_len: 1 }]);
        }
        let written = if slot.worst == Status::Ok { slot.written } else { 0 };
        core.intake.give_back(head);
        core.intake.ring().put_used(core.used, head, written + 1);
        if let Some(tracker) = &mut core.tracker {
            tracker.done(head);
        }
        core.used = core.used.wrapping_add(1);
    }

    #[cold]
    fn log_pieces(&self, core: &mut Core, memory: &Memory, pieces: &[IoVec]) {
        let Some(logging) = &core.logging else { return };
        let all = pieces.iter().all(|piece| {
            let address = memory.address_of(piece.iov_base.cast());
            address.is_some_and(|address| logging.log.mark(address, piece.iov_len as u64))
        });
        if !all {
            self.break_down(core, &"the log of dirty pages does not cover its memory");
        }
    }

    #[cold]
    fn log_used(&self, core: &mut Core, offset: u64, len: u64) {
        let Some(Logging { log, used: Some(used) }) = &core.logging else { return };
        if !log.mark(used.saturating_add(offset), len) {
            self.break_down(core, &"the log of dirty pages does not cover its used ring");
        }
    }

    /// Shows the driver what was put into the used ring; true if there was something.
    fn publish(&self) -> bool {
        let core = &mut *self.core.borrow_mut();
        let (old, new) = (core.published, core.used);
        if old == new {
            return false;
        }
        core.published = new;
        core.intake.ring().publish(new);
        if let Some(tracker) = &mut core.tracker {
            tracker.published(new);
        }
        if core.logging.is_some() {
            let len = 4 + 8 * u64::from(core.intake.ring().size());
            self.log_used(core, 0, len);
        }
        if core.intake.ring().wants_call(self.event_index, old, new)
            && let Some(call) = &core.call
        {
            call.send(&self.local);
        }
        true
    }

    /// Ends, if that was asked for and nothing is out any more.
    fn end_if_done(&self) {
        let mut core = self.core.borrow_mut();
        if core.out > 0 || core.stopping.is_none() {
            return;
        }
        let done = core.stopping.take();
        let next = core.intake.next();
        core.paused = true;
        drop(core);
        self.forget_kick();
        // With the channel goes its hold on the session, and with the last of them the lease.
        *self.channel.borrow_mut() = None;
        self.place.leave();
        if let Some(done) = done {
            let _ = done.try_send(next);
        }
    }

    #[cold]
    fn complain(&self, error: &Error) {
        match error.kind().is_guest_made() || error.kind() == ErrorKind::Cancelled {
            true => tracing::debug!("{}: queue {}: {error}", self.server.name(), self.number),
            false => self.server.storage_error(error),
        }
    }
}

impl Core {
    #[inline]
    fn recycle(&mut self, mut pieces: Vec<IoVec>) {
        if self.spare.len() < self.slots.len() {
            pieces.clear();
            self.spare.push(pieces);
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
        core.out -= 1;
        let pieces = std::mem::take(&mut request.memory);
        let memory = request.guard.as_ref().and_then(|guard| guard.downcast_ref::<Memory>());
        let Ok(head) = u16::try_from(request.token) else { return };
        let status = match &result {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.complain(error);
                Status::from(error.kind())
            }
        };
        if request.operation == Operation::Read
            && core.logging.is_some()
            && let Some(memory) = memory
        {
            // A failed read may have written some of it.
            self.log_pieces(core, memory, &pieces);
        }
        core.recycle(pieces);
        let slot = &mut core.slots[usize::from(head)];
        slot.parts -= 1;
        slot.worst = slot.worst.max(status);
        let last = slot.parts == 0;
        let kept = core.detached && matches!(&result, Err(error) if error.kind() == ErrorKind::Cancelled);
        if kept {
            // Never to be finished here: whoever serves the ring next takes it again.
            slot.parts = u16::MAX;
        } else if last && let Some(memory) = memory {
            self.finish(core, head, memory);
        }
        if !self.active.get() {
            self.wake_from(core);
        }
    }
}

impl Queue {
    /// As [`wake`](Self::wake), for a caller that has the core.
    fn wake_from(self: &Rc<Self>, core: &Core) {
        self.active.set(true);
        core.intake.ring().no_kicks(self.event_index);
        self.local.activate(self.clone());
    }
}

impl Poller for Queue {
    fn poll(self: Rc<Self>) -> bool {
        if self.owner.is_lost() {
            self.core.borrow_mut().broken = true;
        }
        let mut worked = self.publish();
        if self.take_all() {
            worked = true;
            self.publish();
        }
        self.end_if_done();
        worked
    }

    fn arm(self: Rc<Self>) -> bool {
        let core = &mut *self.core.borrow_mut();
        if core.used != core.published {
            return true;
        }
        if !core.broken && !core.paused && !core.uprooted && core.stopping.is_none() {
            let next = core.intake.next();
            if core.intake.ring().ask_for_kick(self.event_index, next) {
                core.intake.ring().no_kicks(self.event_index);
                return true;
            }
            if core.logging.is_some() {
                let offset = 4 + 8 * u64::from(core.intake.ring().size());
                self.log_used(core, 0, 2);
                self.log_used(core, offset, 2);
            }
        }
        self.active.set(false);
        false
    }
}

/// Waits for the driver's kicks.
struct Kick {
    queue: Rc<Queue>,
    file: FileHandle,
}

impl Kick {
    fn wait(self: &Rc<Self>) {
        let op = Op::Poll { events: libc::POLLIN };
        // SAFETY: a poll has no pointers.
        let id = unsafe { self.queue.local.submit(&self.file, &op, self.clone(), 0) };
        self.queue.core.borrow_mut().waiting = Some(id);
    }
}

impl Completion for Kick {
    fn complete(self: Rc<Self>, _token: u64, result: i32) {
        let queue = self.queue.clone();
        let mut core = queue.core.borrow_mut();
        let current = core.kick.as_ref().is_some_and(|kick| Rc::ptr_eq(kick, &self));
        // A broken queue is not kicked alive, however often it is tried.
        if !current || core.broken || result == -libc::ECANCELED {
            return;
        }
        if result < 0 || result & i32::from(libc::POLLIN) == 0 || !notify::drain(&self.file) {
            queue.break_down(&mut core, &"its kick descriptor is not an eventfd");
            return;
        }
        drop(core);
        self.wait();
        queue.wake();
    }
}
