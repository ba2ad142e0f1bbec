//! A queue on its reactor: the driver's commands wait in the ring, each comes back with a request, and goes out again
//! with its result.

use std::cell::{Cell, RefCell};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use vbd_core::{Channel, Guard, IoVec, QueueCounters, Request, Result, Session, Sink};
use vbd_ring::{Completion, FileHandle, Handle, Local, Op, Place};

use crate::abi::QueueCommand;
use crate::buffers::{Buffers, Descriptors};
use crate::device::Shared;
use crate::request::{Part, decode};

/// What the driver says when it takes a command back for good.
const ABORTED: i32 = -libc::ENODEV;

/// Everything that a queue needs to run.
pub(crate) struct Setup {
    pub(crate) shared: Arc<Shared>,
    pub(crate) number: u16,
    pub(crate) depth: u16,
    /// Longest read or write, in bytes.
    pub(crate) max_io: u32,
    /// Commands are numbered as ioctls are.
    pub(crate) encoded: bool,
    /// The device's node for its server.
    pub(crate) file: Arc<OwnedFd>,
    pub(crate) session: Arc<dyn Session>,
    pub(crate) counters: Arc<QueueCounters>,
    /// Told when the queue has ended.
    pub(crate) ended: SyncSender<()>,
}

/// A queue as seen from other threads.
pub(crate) struct Remote(vbd_ring::Remote<Queue>);

impl Remote {
    /// Starts a queue on a reactor: all its commands are with the driver then.
    ///
    /// # Errors
    /// Its memory cannot be had, there is no channel, or the reactor has no io_uring.
    pub(crate) fn start(handle: &Handle, setup: Setup) -> Result<Self, String> {
        vbd_ring::Remote::new(handle, |local, place| Queue::start(local, place, setup)).map(Remote)
    }

    /// Takes nothing more and ends when what was taken is done. What the driver hands over from now on is left for
    /// the next server.
    pub(crate) fn leave(&self) {
        self.0.post(Queue::leave);
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

struct Queue {
    place: Place,
    shared: Arc<Shared>,
    number: u16,
    max_io: u32,
    /// The number of the command that carries a result and asks for the next request.
    commit: u32,
    local: Local,
    file: FileHandle,
    /// None when the queue has ended.
    channel: RefCell<Option<Rc<dyn Channel>>>,
    counters: Arc<QueueCounters>,
    descriptors: Descriptors,
    /// The driver writes there while it has a command: this lives until the last has come back.
    buffers: Arc<Buffers>,
    guard: Guard,
    /// Every write is to be durable when it completes: the disk has no cache that could be flushed.
    durable: bool,
    /// Commands that the driver has.
    waiting: Cell<u32>,
    /// Requests that the disk has.
    out: Cell<u32>,
    leaving: Cell<bool>,
    spare: RefCell<Vec<Vec<IoVec>>>,
    ended: SyncSender<()>,
}

impl Queue {
    fn start(local: &Local, place: Place, setup: Setup) -> Result<Rc<Queue>, String> {
        if !local.is_uring() {
            return Err("the reactor runs without io_uring (see --engine), and ublk needs it".into());
        }
        let descriptors = Descriptors::map(&setup.file, setup.number, setup.depth);
        let descriptors =
            descriptors.map_err(|error| format!("its descriptors cannot be mapped: {error}"))?;
        let buffers = Buffers::new(setup.depth, setup.max_io);
        let buffers = Arc::new(buffers.map_err(|error| format!("no memory for its requests: {error}"))?);
        let durable = !setup.session.capabilities().write_cache;
        let channel = setup.session.channel(local).map_err(|error| error.to_string())?;
        let queue = Rc::new(Queue {
            place,
            shared: setup.shared,
            number: setup.number,
            max_io: setup.max_io,
            commit: QueueCommand::CommitAndFetch.number(setup.encoded),
            local: local.clone(),
            // The driver deletes the device when its node is closed, and whoever asked for that waits.
            file: local.plain_file(setup.file),
            channel: RefCell::new(Some(channel)),
            counters: setup.counters,
            descriptors,
            guard: buffers.clone(),
            buffers,
            durable,
            waiting: Cell::new(0),
            out: Cell::new(0),
            leaving: Cell::new(false),
            spare: RefCell::default(),
            ended: setup.ended,
        });
        let fetch = QueueCommand::Fetch.number(setup.encoded);
        for tag in 0..setup.depth {
            queue.send(fetch, tag, 0);
        }
        local.flush();
        Ok(queue)
    }

    /// Gives a command to the driver.
    fn send(self: &Rc<Self>, command: u32, tag: u16, result: i32) {
        let data = QueueCommand::data(self.number, tag, result, self.buffers.get(tag) as u64);
        let op = Op::Command { op: command, data };
        self.waiting.set(self.waiting.get() + 1);
        // SAFETY: the command names the tag's buffer, which the sink owns and nobody uses until the command is back.
        unsafe { self.local.submit(&self.file, &op, self.clone(), u64::from(tag)) };
    }

    /// Takes the request that the driver has put down for a tag.
    #[inline]
    fn take(self: &Rc<Self>, tag: u16) {
        let Some(channel) = self.channel.borrow().clone() else { return };
        let Some(descriptor) = self.descriptors.get(tag) else { return };
        match decode(descriptor, self.max_io) {
            Ok(part) => {
                self.out.set(self.out.get() + 1);
                channel.submit(self.request(tag, part));
            }
            Err(errno) => {
                tracing::debug!("{}: {descriptor:?} is refused", self.shared.name());
                self.send(self.commit, tag, -errno);
            }
        }
    }

    #[inline]
    fn request(self: &Rc<Self>, tag: u16, part: Part) -> Request {
        let mut request = Request::new(part.operation, part.offset, part.len, self.local.now(), self.clone());
        request.token = u64::from(tag);
        request.flags.may_unmap = part.may_unmap;
        request.flags.fua = part.fua || (self.durable && part.operation.is_write());
        let data = usize::try_from(part.data()).unwrap_or(0);
        if data > 0 {
            request.memory = self.spare.borrow_mut().pop().unwrap_or_default();
            request.memory.push(IoVec { iov_base: self.buffers.get(tag).cast(), iov_len: data });
            request.guard = Some(self.guard.clone());
        }
        request
    }

    fn leave(self: &Rc<Self>) {
        self.leaving.set(true);
        self.end_if_done();
    }

    /// Ends when nothing is out any more and nothing comes.
    fn end_if_done(&self) {
        if self.out.get() > 0 || (self.waiting.get() > 0 && !self.leaving.get()) {
            return;
        }
        // With the channel goes its hold on the session, and with the last of them the lease.
        if self.channel.borrow_mut().take().is_some() {
            self.place.leave();
            // Told later in the turn, when this queue has been dropped and with it its hold on the device's node.
            self.local.defer(Rc::new(Ended(self.ended.clone())), 0, 0);
        }
    }
}

/// Says that a queue has ended.
struct Ended(SyncSender<()>);

impl Completion for Ended {
    fn complete(self: Rc<Self>, _token: u64, _result: i32) {
        let _ = self.0.try_send(());
    }
}

impl Completion for Queue {
    fn complete(self: Rc<Self>, token: u64, result: i32) {
        self.waiting.set(self.waiting.get() - 1);
        match (u16::try_from(token), result) {
            (Ok(tag), 0) if !self.leaving.get() => self.take(tag),
            // Left with the driver, which hands it to the next server.
            (_, 0) => {}
            (_, ABORTED) => self.shared.aborted(),
            (_, error) => {
                let error = std::io::Error::from_raw_os_error(-error);
                self.shared
                    .complain(&format!("queue {}: the driver refuses a command: {error}", self.number));
            }
        }
        self.end_if_done();
    }
}

impl Sink for Queue {
    fn complete(self: Rc<Self>, mut request: Request, result: Result<()>) {
        let now = self.local.now();
        // What was issued in this turn has taken some of it.
        let now = if request.issued_at.is_none_or(|at| at < now) { now } else { std::time::Instant::now() };
        self.counters.record(&request, now, result.is_err());
        let answer = match &result {
            Ok(()) if request.memory.is_empty() => 0,
            Ok(()) => i32::try_from(request.len).unwrap_or(i32::MAX),
            Err(error) => {
                if error.kind().is_guest_made() {
                    tracing::debug!("{}: {error}", self.shared.name());
                } else {
                    self.shared.complain(&error.to_string());
                }
                -error.kind().errno()
            }
        };
        if request.memory.capacity() > 0 {
            let mut memory = std::mem::take(&mut request.memory);
            memory.clear();
            self.spare.borrow_mut().push(memory);
        }
        self.out.set(self.out.get() - 1);
        let Ok(tag) = u16::try_from(request.token) else { return };
        self.send(self.commit, tag, answer);
        self.end_if_done();
    }
}
