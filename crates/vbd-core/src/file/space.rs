//! Giving space back, zeroing, and telling what is allocated.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE};
use vbd_ring::Op;

use super::SPACE_STEP;
use super::channel::FileChannel;
use super::transfer::{Transfer, bytes};
use crate::ask::Pending;
use crate::memory::Buffer;
use crate::{Error, ErrorKind, Extent, ExtentKind, Flags, Request, Result};

/// Zeroes that are written at once, and how often one buffer of them is named in one call.
const ZEROES: u64 = 256 << 10;
const REPEAT: u64 = 64;
/// The most extents in one answer.
const MOST_EXTENTS: usize = 1024;

impl FileChannel {
    /// Gives the whole blocks of a range back. Advice: storage that cannot says yes and does nothing.
    pub(super) fn discard(self: Rc<Self>, request: Request) {
        self.work(request, async |this, request| {
            let block = u64::from(this.backend.block);
            let start = request.offset.next_multiple_of(block);
            let end = match request.offset + request.len {
                // The last block of a file is given back whole.
                end if end == this.backend.size() && !this.backend.block_device => {
                    end.next_multiple_of(block)
                }
                end => end / block * block,
            };
            let mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
            match this.allocate(mode, start, end, &this.backend.can_punch).await {
                Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
                Err(error) => Err(error),
                Ok(()) => this.made_durable(request).await,
            }
        });
    }

    /// Makes a range read as zeroes: by the filesystem where it can, else by writing them.
    pub(super) fn write_zeroes(self: Rc<Self>, request: Request) {
        self.work(request, async |this, request| {
            let block = u64::from(this.backend.block);
            let (offset, end) = (request.offset, request.offset + request.len);
            let start = offset.next_multiple_of(block).min(end);
            let stop = (end / block * block).max(start);
            match this.zero_blocks(request.flags, start, stop).await {
                Err(error) if error.kind() == ErrorKind::Unsupported && !request.flags.fast_only => {
                    this.zero_by_writing(start, stop).await?;
                }
                result => result?,
            }
            this.zero_by_writing(offset, start).await?;
            this.zero_by_writing(stop, end).await?;
            this.made_durable(request).await
        });
    }

    async fn zero_blocks(&self, flags: Flags, start: u64, end: u64) -> Result<()> {
        let backend = &*self.backend;
        if flags.may_unmap {
            let mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
            match self.allocate(mode, start, end, &backend.can_punch).await {
                Err(error) if error.kind() == ErrorKind::Unsupported => {}
                result => return result,
            }
        }
        self.allocate(FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, start, end, &backend.can_zero).await
    }

    /// One fallocate after the other over a range of whole blocks, none longer than a step.
    async fn allocate(&self, mode: i32, start: u64, end: u64, can: &AtomicBool) -> Result<()> {
        if !can.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Unsupported, "the filesystem below cannot do this"));
        }
        let mut position = start;
        while position < end {
            let len = (end - position).min(SPACE_STEP);
            match self.space_op(Op::Fallocate { mode, offset: position, len }).await {
                result if result >= 0 => position += len,
                result if result == -libc::EINTR || result == -libc::EAGAIN => {}
                result if result == -libc::EOPNOTSUPP || result == -libc::ENOSYS => {
                    can.store(false, Ordering::Relaxed);
                    return Err(Error::new(ErrorKind::Unsupported, "the filesystem below cannot do this"));
                }
                result => {
                    let error = std::io::Error::from_raw_os_error(-result);
                    return Err(Error::io("the storage failed", error));
                }
            }
        }
        Ok(())
    }

    async fn zero_by_writing(&self, start: u64, end: u64) -> Result<()> {
        if start >= end {
            return Ok(());
        }
        let zeroes = Arc::new(Buffer::new(bytes((end - start).min(ZEROES))));
        let mut position = start;
        while position < end {
            let len = (end - position).min(ZEROES * REPEAT);
            let (whole, rest) = (len / ZEROES, len % ZEROES);
            let mut memory = vec![zeroes.piece(0, bytes(ZEROES.min(len))); bytes(whole)];
            if rest > 0 {
                memory.push(zeroes.piece(0, bytes(rest)));
            }
            let guard = Some(zeroes.clone() as _);
            let transfer = Transfer { write: true, offset: position, len, memory, durable: false, guard };
            self.transfer_all(&transfer, 0).await?;
            position += len;
        }
        Ok(())
    }

    /// For FUA on what has no flag of its own for it.
    async fn made_durable(&self, request: &Request) -> Result<()> {
        if !self.is_durable(request) {
            return Ok(());
        }
        self.flush_lost()?;
        let result = self.space_op(Op::Sync).await;
        self.flushed(result)
    }

    /// An operation without memory: its result.
    async fn space_op(&self, op: Op) -> i32 {
        let fault = self.backend.faults.as_ref().and_then(|faults| faults.before(&op));
        // SAFETY: the operation names no memory.
        let seen = unsafe { self.backend.begun_op(&op) };
        let result = match fault {
            Some(super::Fault::Fail(errno)) => -errno,
            // SAFETY: as above.
            _ => unsafe { self.local.perform(&self.data, &op, self.owner.clone()) }.await.0,
        };
        self.backend.ended(seen, result);
        result
    }

    /// Runs a slow operation as a task, with the range locked where that is needed.
    fn work<F>(self: Rc<Self>, request: Request, work: F)
    where
        F: AsyncFnOnce(&Self, &Request) -> Result<()> + 'static,
    {
        let mut pending = Pending::new(request);
        self.local.clone().spawn(async move {
            let permit = self.permit(pending.request()).await;
            pending.request().issued_at = Some(self.local.now());
            let result = work(&self, pending.request()).await;
            drop(permit);
            pending.complete(result.map_err(|error| error.of(&self.backend.label)));
        });
    }

    /// Tells what a range consists of, by SEEK_DATA and SEEK_HOLE. A block device is data.
    pub(super) fn extents(self: Rc<Self>, mut request: Request) {
        request.issued_at = Some(self.local.now());
        let (offset, end) = (request.offset, request.offset + request.len);
        if self.backend.block_device || request.len == 0 {
            request.extents.push(Extent { len: request.len, kind: ExtentKind::Data });
            return request.complete(Ok(()));
        }
        let mut pending = Pending::new(request);
        self.local.clone().spawn(async move {
            let file = self.backend.buffered.clone();
            let result = self.local.unblock(move || seek_extents(file.as_fd(), offset, end)).await;
            match result {
                Ok(extents) => {
                    pending.request().extents = extents;
                    pending.complete(Ok(()));
                }
                Err(error) => pending.complete(Err(Error::io("cannot seek", error).of(&self.backend.label))),
            }
        });
    }
}

fn seek_extents(file: BorrowedFd<'_>, offset: u64, end: u64) -> std::io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut position = offset;
    while position < end && extents.len() < MOST_EXTENTS {
        // Sectors are the unit: one that is data in part is data.
        let data =
            seek(file, position, libc::SEEK_DATA)?.map_or(end, |at| at / 512 * 512).clamp(position, end);
        if data > position {
            extents.push(Extent { len: data - position, kind: ExtentKind::Hole });
        }
        if data == end {
            break;
        }
        let hole =
            seek(file, data, libc::SEEK_HOLE)?.map_or(end, |at| at.next_multiple_of(512)).clamp(data, end);
        if hole == data {
            // The file ends within this sector's reach; the kernel sees nothing beyond.
            extents.push(Extent { len: end - data, kind: ExtentKind::Hole });
            break;
        }
        extents.push(Extent { len: hole - data, kind: ExtentKind::Data });
        position = hole;
    }
    Ok(extents)
}

/// Where data or a hole begins at or after `from`; none at the file's end.
fn seek(file: BorrowedFd<'_>, from: u64, whence: i32) -> std::io::Result<Option<u64>> {
    // SAFETY: no memory is involved. The file position is nobody's: all I/O names its offset.
    let at = unsafe { libc::lseek(file.as_raw_fd(), from.cast_signed(), whence) };
    match u64::try_from(at) {
        Ok(at) => Ok(Some(at)),
        Err(_) => match std::io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}
