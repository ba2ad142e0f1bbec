//! The fast path: aligned requests from guest memory to the ring and back, without an allocation.

use std::cell::RefCell;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vbd_ring::{Completion, FileHandle, IoVec, Local, Op, execute};

use super::exclusion::{Permit, Writes};
use super::record::Seen;
use super::{Backend, Cache, Fault};
use crate::memory::slice;
use crate::{Channel, Error, ErrorKind, Guard, Operation, Request, Result};

/// The most pieces of memory in one call (UIO_MAXIOV).
pub(super) const MOST_PIECES: usize = 1024;
/// The most bytes in one call; the kernel's own limit is just below 2 GiB.
const MOST_BYTES: u64 = 1 << 30;
/// The same for a file in memory, which is copied on the reactor's own thread while its other queues wait.
const MOST_BYTES_IN_MEMORY: u64 = 4 << 20;

/// A queue's way to a file.
pub struct FileChannel {
    pub(super) backend: Arc<Backend>,
    pub(super) local: Local,
    pub(super) data: FileHandle,
    pub(super) buffered: FileHandle,
    slots: RefCell<Slots>,
    pub(super) writes: Writes,
    /// Holds the lease: for as long as anything is in the kernel.
    pub(super) owner: Guard,
}

/// Requests in the kernel on the fast path; the slot's number is the operation's token.
#[derive(Default)]
struct Slots {
    all: Vec<Option<InFlight>>,
    free: Vec<usize>,
}

struct InFlight {
    request: Request,
    permit: Option<Permit>,
    seen: Seen,
}

impl Slots {
    fn put(&mut self, flight: InFlight) -> u64 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.all.push(None);
            self.all.len() - 1
        });
        self.all[slot] = Some(flight);
        slot as u64
    }

    fn take(&mut self, token: u64) -> Option<InFlight> {
        let slot = usize::try_from(token).ok()?;
        let flight = self.all.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(flight)
    }
}

impl FileChannel {
    pub(super) fn new(backend: Arc<Backend>, local: &Local, owner: Guard) -> Rc<Self> {
        let data = local.file(backend.data.clone());
        let buffered = if Arc::ptr_eq(&backend.data, &backend.buffered) {
            data.clone()
        } else {
            local.file(backend.buffered.clone())
        };
        Rc::new(FileChannel {
            writes: backend.writing.queue(),
            backend,
            local: local.clone(),
            data,
            buffered,
            slots: RefCell::default(),
            owner,
        })
    }

    /// Refuses what no storage could do.
    fn check(&self, request: &Request) -> Result<()> {
        let backend = &*self.backend;
        if request.operation == Operation::Flush {
            return Ok(());
        }
        if request.operation.is_write() && backend.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the disk is read-only"));
        }
        let end = request.offset.checked_add(request.len);
        if end.is_none_or(|end| end > backend.size()) {
            let message = format!("the disk ends at {}", backend.size());
            return Err(Error::new(ErrorKind::OutOfRange, message));
        }
        let transfers = matches!(request.operation, Operation::Read | Operation::Write);
        if transfers && request.memory.iter().map(|piece| piece.iov_len as u64).sum::<u64>() != request.len {
            return Err(Error::new(ErrorKind::OutOfRange, "the memory given is not as long as the range"));
        }
        Ok(())
    }

    /// The operation that does the whole of a read or write, if one can.
    fn direct_op(&self, request: &Request) -> Option<Op> {
        let (backend, memory) = (&*self.backend, &request.memory);
        let alignment = backend.alignment;
        let fits = alignment.fits(request.offset, request.len)
            && request.len <= self.most_bytes()
            && request.len > 0
            && request.offset + request.len <= backend.tail.load(Ordering::Acquire)
            && memory.len() <= MOST_PIECES
            && memory.iter().all(|piece| alignment.fits_memory(piece));
        fits.then(|| self.op(request, memory, request.offset))
    }

    /// The most bytes of one operation.
    pub(super) fn most_bytes(&self) -> u64 {
        if self.backend.in_memory { MOST_BYTES_IN_MEMORY } else { MOST_BYTES }
    }

    /// A read or write of these pieces as the request asks for it.
    pub(super) fn op(&self, request: &Request, pieces: &[IoVec], offset: u64) -> Op {
        let (iov, count) = (pieces.as_ptr(), u32::try_from(pieces.len()).expect("bounded by MOST_PIECES"));
        match request.operation {
            Operation::Read => Op::Read { iov, count, offset },
            _ => Op::Write { iov, count, offset, dsync: self.is_durable(request) },
        }
    }

    /// Whether a write is to be durable when it completes.
    pub(super) fn is_durable(&self, request: &Request) -> bool {
        request.flags.fua || self.backend.cache == Cache::Writethrough
    }

    fn start(self: Rc<Self>, mut request: Request, op: Op, permit: Option<Permit>) {
        request.issued_at = Some(self.local.now());
        // SAFETY: the request owns its pieces and their guard, and is alive.
        let seen = unsafe { self.backend.begun_op(&op) };
        let fault = self.backend.faults.as_ref().and_then(|faults| faults.before(&op));
        let flight = InFlight { request, permit, seen };
        match fault {
            Some(fault) => self.start_faulty(flight, op, fault),
            None if self.backend.in_memory => {
                // SAFETY: the request owns its pieces and their guard, and is alive.
                let result = unsafe { execute(self.data.as_fd(), &op) };
                self.finish(flight, result);
            }
            None => {
                let token = self.slots.borrow_mut().put(flight);
                let local = self.local.clone();
                let data = self.data.clone();
                // SAFETY: the slot owns the request until `complete`; the reactor owns this channel until then.
                unsafe { local.submit(&data, &op, self, token) };
            }
        }
    }

    fn start_faulty(self: Rc<Self>, flight: InFlight, op: Op, fault: Fault) {
        // SAFETY: as in `start`.
        let result = unsafe { faulty(&self.data, &op, &flight.request.memory, fault) };
        let token = self.slots.borrow_mut().put(flight);
        self.local.clone().defer(self, token, result);
    }

    /// A request on the fast path has come back from the kernel.
    fn finish(self: Rc<Self>, flight: InFlight, result: i32) {
        self.backend.ended(flight.seen, result);
        let request = flight.request;
        let transferred = u64::try_from(result).ok();
        match request.operation {
            Operation::Flush => {
                let result = self.flushed(result);
                complete(request, result.map_err(|error| error.of(&self.backend.label)));
            }
            _ if transferred == Some(request.len) => request.complete(Ok(())),
            // Short, or to be asked again: the slow path carries on where it stopped.
            _ if transferred.is_some() || result == -libc::EAGAIN || result == -libc::EINTR => {
                self.transfer(request, transferred.unwrap_or(0), flight.permit);
            }
            _ => {
                let error = Error::io("the storage failed", std::io::Error::from_raw_os_error(-result));
                request.fail(error.of(&self.backend.label));
            }
        }
    }

    /// What a flush has come to. One that failed says so for ever: the kernel drops the pages and forgets.
    pub(super) fn flushed(&self, result: i32) -> Result<()> {
        if result < 0 {
            self.backend.flush_failed.store(true, Ordering::SeqCst);
            return Err(Error::io("the storage failed to flush", std::io::Error::from_raw_os_error(-result)));
        }
        self.flush_lost()
    }

    /// An error where an earlier flush has failed.
    pub(super) fn flush_lost(&self) -> Result<()> {
        if self.backend.flush_failed.load(Ordering::SeqCst) {
            let message = "an earlier flush has failed, so writes may be lost; check the storage, then open the disk anew";
            return Err(Error::new(ErrorKind::FlushLost, message));
        }
        Ok(())
    }

    fn submit_checked(self: Rc<Self>, request: Request) {
        match request.operation {
            Operation::Flush => match self.flush_lost() {
                Ok(()) => self.start(request, Op::Sync, None),
                Err(error) => complete(request, Err(error.of(&self.backend.label))),
            },
            Operation::Read | Operation::Write => {
                let Some(op) = self.direct_op(&request) else { return self.transfer(request, 0, None) };
                if request.operation == Operation::Read {
                    return self.start(request, op, None);
                }
                match self.backend.writing.try_whole(&self.writes, || self.blocks(&request)) {
                    Some(permit) => self.start(request, op, Some(permit)),
                    None => self.transfer(request, 0, None),
                }
            }
            Operation::Discard => self.discard(request),
            Operation::WriteZeroes => self.write_zeroes(request),
            Operation::Extents => self.extents(request),
        }
    }

    /// The whole blocks that a request touches.
    pub(super) fn blocks(&self, request: &Request) -> std::ops::Range<u64> {
        let block = self.backend.alignment.offset;
        let start = request.offset / block * block;
        // The last block may be cut short by the end of the file, and still is one.
        start..(request.offset + request.len).next_multiple_of(block)
    }
}

/// Carries a file operation out with a fault: its result.
///
/// # Safety
/// As [`execute`]; `pieces` are the memory of a read or write.
pub(super) unsafe fn faulty(file: &FileHandle, op: &Op, pieces: &[IoVec], fault: Fault) -> i32 {
    let bytes = match fault {
        Fault::Fail(errno) => return -errno,
        Fault::Short(bytes) => bytes,
    };
    let (short, _) = slice(pieces, 0, bytes, MOST_PIECES);
    let (iov, count) = (short.as_ptr(), u32::try_from(short.len()).unwrap_or(0));
    let op = match *op {
        Op::Read { offset, .. } => Op::Read { iov, count, offset },
        Op::Write { offset, dsync, .. } => Op::Write { iov, count, offset, dsync },
        other => other,
    };
    // SAFETY: the pieces are parts of valid ones.
    unsafe { execute(file.as_fd(), &op) }
}

pub(super) fn complete(request: Request, result: Result<()>) {
    match result {
        Ok(()) => request.complete(Ok(())),
        Err(error) => request.fail(error),
    }
}

impl Channel for FileChannel {
    fn submit(self: Rc<Self>, request: Request) {
        match self.check(&request) {
            Ok(()) => self.submit_checked(request),
            Err(error) => request.fail(error.of(&self.backend.label)),
        }
    }
}

impl Completion for FileChannel {
    fn complete(self: Rc<Self>, token: u64, result: i32) {
        let flight = self.slots.borrow_mut().take(token);
        if let Some(flight) = flight {
            self.finish(flight, result);
        }
    }
}
