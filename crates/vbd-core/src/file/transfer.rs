//! The slow path of reads and writes: what is too long, does not fit the alignment, or came back short.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vbd_ring::{FileHandle, IoVec, Op};

use super::channel::{FileChannel, MOST_PIECES, faulty};
use super::exclusion::Permit;
use crate::ask::Pending;
use crate::memory::{Buffer, copy, slice};
use crate::{Error, ErrorKind, Guard, Operation, Request, Result, SECTOR};

/// The most bytes that take the way through a bounce buffer at once.
const BOUNCE: u64 = 1 << 20;
/// How often an operation that made no headway is tried again.
const TRIES: u32 = 100;

/// A read or write on the slow path.
pub(super) struct Transfer {
    pub(super) write: bool,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) memory: Vec<IoVec>,
    pub(super) durable: bool,
    pub(super) guard: Option<Guard>,
}

/// What an operation in the kernel keeps alive.
type Keep = (Vec<IoVec>, Option<Guard>, Option<Arc<Buffer>>);

impl FileChannel {
    /// Does what is left of a read or write after the first `done` bytes.
    pub(super) fn transfer(self: Rc<Self>, mut request: Request, done: u64, permit: Option<Permit>) {
        let transfer = Transfer {
            write: request.operation == Operation::Write,
            offset: request.offset,
            len: request.len,
            memory: std::mem::take(&mut request.memory),
            durable: self.is_durable(&request),
            guard: request.guard.clone(),
        };
        let mut pending = Pending::new(request);
        self.local.clone().spawn(async move {
            let permit = match permit {
                None => self.permit(pending.request()).await,
                permit => permit,
            };
            pending.request().issued_at.get_or_insert(self.local.now());
            let result = self.transfer_all(&transfer, done).await;
            drop(permit);
            pending.request().memory = transfer.memory;
            pending.complete(result.map_err(|error| error.of(&self.backend.label)));
        });
    }

    /// Excludes others from the blocks of a request that changes them.
    pub(super) async fn permit(&self, request: &Request) -> Option<Permit> {
        let (backend, blocks) = (&*self.backend, self.blocks(request));
        // A discard leaves parts of blocks as they are.
        let is_whole =
            backend.alignment.fits(request.offset, request.len) || request.operation == Operation::Discard;
        match request.operation.is_write() {
            false => None,
            true if is_whole => Some(backend.writing.whole(&self.writes, blocks).await),
            true => Some(backend.writing.partial(blocks, &self.local).await),
        }
    }

    pub(super) async fn transfer_all(&self, transfer: &Transfer, mut done: u64) -> Result<()> {
        let mut tries = 0;
        while done < transfer.len {
            match self.step(transfer, done).await {
                Ok(0) => return Err(Error::new(ErrorKind::Corrupt, "the file ends early: it was truncated")),
                Ok(bytes) => {
                    done += bytes;
                    tries = 0;
                }
                Err(libc::EINTR | libc::EAGAIN) if tries < TRIES => {
                    tries += 1;
                    self.local.sleep(Duration::from_millis(u64::from(tries / 10))).await;
                }
                Err(errno) => {
                    return Err(Error::io("the storage failed", std::io::Error::from_raw_os_error(errno)));
                }
            }
        }
        Ok(())
    }

    /// One operation, or one round over the bounce buffer: the bytes of the request that are done by it.
    async fn step(&self, transfer: &Transfer, done: u64) -> Result<u64, i32> {
        let (alignment, tail) = (self.backend.alignment, self.backend.tail.load(Ordering::Acquire));
        let (position, end) = (transfer.offset + done, transfer.offset + transfer.len);
        if position >= tail {
            return self.tail_step(transfer, done).await;
        }
        let limit = end.min(tail);
        let whole = (limit - position) / alignment.offset * alignment.offset;
        if position % alignment.offset == 0 && whole > 0 {
            let (pieces, covered) =
                slice(&transfer.memory, bytes(done), bytes(whole.min(self.most_bytes())), MOST_PIECES);
            if pieces.iter().all(|piece| alignment.fits_memory(piece)) {
                let keep = (pieces, transfer.guard.clone(), None);
                let result = self.io(&self.data, transfer.write, position, transfer.durable, keep).await?;
                // What does not end on a block is asked for again from the block's start.
                let usable = result / alignment.offset * alignment.offset;
                return match usable {
                    0 if result > 0 => Err(libc::EAGAIN),
                    usable => Ok(usable.min(covered as u64)),
                };
            }
        }
        self.bounce_step(transfer, done, limit).await
    }

    /// Through memory of our own: for unaligned ranges, with what lies beside them, and for unaligned memory.
    async fn bounce_step(&self, transfer: &Transfer, done: u64, limit: u64) -> Result<u64, i32> {
        let block = self.backend.alignment.offset;
        let position = transfer.offset + done;
        let start = position / block * block;
        let stop = limit.next_multiple_of(block).min(start + BOUNCE.max(block));
        let wanted = limit.min(stop) - position;
        let span = stop - start;
        let buffer = Arc::new(Buffer::new(bytes(span)));
        let inside = buffer.piece(bytes(position - start), bytes(wanted));
        let whole = position == start && wanted == span;
        if !transfer.write || !whole {
            self.fill(&buffer, start, span).await?;
        }
        if !transfer.write {
            // SAFETY: the request's guard keeps its memory valid.
            unsafe { copy(inside, &transfer.memory, bytes(done), true) };
            return Ok(wanted);
        }
        // SAFETY: as above.
        unsafe { copy(inside, &transfer.memory, bytes(done), false) };
        let mut written = 0;
        while written < span {
            let piece = buffer.piece(bytes(written), bytes(span - written));
            let keep = (vec![piece], None, Some(buffer.clone()));
            let result = self.io(&self.data, true, start + written, transfer.durable, keep).await?;
            match result / block * block {
                0 => return Err(libc::EAGAIN),
                some => written += some,
            }
        }
        Ok(wanted)
    }

    /// Reads whole blocks into a buffer.
    async fn fill(&self, buffer: &Arc<Buffer>, start: u64, span: u64) -> Result<(), i32> {
        let block = self.backend.alignment.offset;
        let mut read = 0;
        while read < span {
            let piece = buffer.piece(bytes(read), bytes(span - read));
            let keep = (vec![piece], None, Some(buffer.clone()));
            let result = self.io(&self.data, false, start + read, false, keep).await?;
            match result / block * block {
                0 if result == 0 => return Err(libc::ENODATA),
                0 => return Err(libc::EAGAIN),
                some => read += some,
            }
        }
        Ok(())
    }

    /// The end of a file that does not fit the alignment: through the page cache, and durable at once, so that no dirty
    /// page is left that a direct write beside it could collide with.
    async fn tail_step(&self, transfer: &Transfer, done: u64) -> Result<u64, i32> {
        let position = transfer.offset + done;
        let left = (transfer.len - done).min(self.most_bytes());
        let (pieces, covered) = slice(&transfer.memory, bytes(done), bytes(left), MOST_PIECES);
        let keep = (pieces, transfer.guard.clone(), None);
        let result = self.io(&self.buffered, transfer.write, position, true, keep).await?;
        let missing = self.backend.size() - position;
        if result == 0 && !transfer.write && missing < SECTOR {
            // The file's last sector is partial: what it lacks reads as zeroes.
            let zeroes = Buffer::new(covered);
            // SAFETY: the request's guard keeps its memory valid.
            unsafe { copy(zeroes.piece(0, covered), &transfer.memory, bytes(done), true) };
            return Ok(covered as u64);
        }
        Ok(result)
    }

    /// One read or write: bytes transferred, or an errno.
    async fn io(
        &self,
        file: &FileHandle,
        write: bool,
        offset: u64,
        dsync: bool,
        keep: Keep,
    ) -> Result<u64, i32> {
        let (iov, count) = (keep.0.as_ptr(), u32::try_from(keep.0.len()).expect("bounded by MOST_PIECES"));
        let op =
            if write { Op::Write { iov, count, offset, dsync } } else { Op::Read { iov, count, offset } };
        let fault = self.backend.faults.as_ref().and_then(|faults| faults.before(&op));
        // SAFETY: `keep` owns the pieces and what keeps them valid.
        let seen = unsafe { self.backend.begun_op(&op) };
        let result = match fault {
            // SAFETY: `keep` owns the pieces and what keeps them valid.
            Some(fault) => unsafe { faulty(file, &op, &keep.0, fault) },
            // SAFETY: as above.
            None => unsafe { self.local.perform(file, &op, (keep, self.owner.clone())) }.await.0,
        };
        self.backend.ended(seen, result);
        u64::try_from(result).map_err(|_| -result)
    }
}

pub(super) fn bytes(len: u64) -> usize {
    usize::try_from(len).expect("a 64-bit host")
}
