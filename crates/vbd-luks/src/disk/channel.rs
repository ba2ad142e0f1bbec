//! A queue's way to encrypted data: through memory of its own, since a guest must never see what is not decrypted, and
//! its memory must not be encrypted under it.

use std::rc::Rc;
use std::sync::Arc;

use vbd_core::ask::{Ask, Pending, ask};
use vbd_core::memory::{Buffer, copy};
use vbd_core::{Channel, Error, ErrorKind, Extent, ExtentKind, Flags, IoVec, Operation, Request, Result};
use vbd_ring::Local;

use super::{LuksSession, Shared};
use vbd_core::Session as _;

/// The most bytes in memory for one request at a time.
const MOST_AT_ONCE: u64 = 1 << 20;
/// More than this is encrypted on another thread: this one has other queues to serve.
const MOST_HERE: u64 = 64 << 10;
/// The unit in which the cipher numbers sectors.
const SECTOR: u64 = 512;

pub(super) struct LuksChannel {
    session: Arc<LuksSession>,
    inner: Rc<dyn Channel>,
    local: Local,
}

/// What is written.
#[derive(Clone, Copy)]
enum Source<'a> {
    Memory(&'a [IoVec]),
    Zeroes,
}

impl LuksChannel {
    pub(super) fn new(session: Arc<LuksSession>, inner: Rc<dyn Channel>, local: &Local) -> Rc<Self> {
        Rc::new(LuksChannel { session, inner, local: local.clone() })
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.session.shared
    }

    fn check(&self, request: &Request) -> Result<()> {
        if request.operation == Operation::Flush {
            return Ok(());
        }
        if request.operation.is_write() && self.session.capabilities().read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the disk is read-only"));
        }
        let size = self.session.geometry().size;
        if request.offset.checked_add(request.len).is_none_or(|end| end > size) {
            return Err(Error::new(ErrorKind::OutOfRange, format!("the disk ends at {size}")));
        }
        let transfers = matches!(request.operation, Operation::Read | Operation::Write);
        if transfers && request.memory.iter().map(|piece| piece.iov_len as u64).sum::<u64>() != request.len {
            return Err(Error::new(ErrorKind::OutOfRange, "the memory given is not as long as the range"));
        }
        if request.operation == Operation::WriteZeroes && request.flags.fast_only {
            return Err(Error::new(ErrorKind::Unsupported, "zeroes are encrypted as everything else"));
        }
        Ok(())
    }

    /// Whole sectors around a range: first byte and length.
    fn around(&self, offset: u64, len: u64) -> (u64, u64) {
        let sector = self.shared().cipher.sector_size();
        let start = offset / sector * sector;
        (start, (offset + len).next_multiple_of(sector) - start)
    }

    async fn read(&self, offset: u64, len: u64, memory: &[IoVec]) -> Result<()> {
        let mut done = 0;
        while done < len {
            let (start, whole) = self.around(offset + done, (len - done).min(MOST_AT_ONCE));
            let buffer = self.decrypted(start, whole).await?;
            let within = offset + done - start;
            let count = (len - done).min(whole - within);
            // SAFETY: the request's guard keeps its memory valid.
            unsafe { copy(buffer.piece(bytes(within), bytes(count)), memory, bytes(done), true) };
            done += count;
        }
        Ok(())
    }

    /// Reads and decrypts whole sectors.
    async fn decrypted(&self, start: u64, len: u64) -> Result<Buffer> {
        let buffer = Arc::new(Buffer::new(bytes(len)));
        let at = start + self.shared().offset;
        let read = Ask::transfer(Operation::Read, at, vec![buffer.whole()], Some(buffer.clone()));
        ask(&self.inner, read, self.local.now()).await?;
        // The request has come back, and its guard with it.
        let buffer = Arc::try_unwrap(buffer).unwrap_or_else(|shared| {
            let mut own = Buffer::new(shared.len());
            // SAFETY: the read has come back.
            own.bytes_mut().copy_from_slice(unsafe { shared.bytes() });
            own
        });
        Ok(self.transform(buffer, start, |cipher, number, data| cipher.decrypt(number, data)).await)
    }

    /// Encrypts or decrypts a buffer of whole sectors.
    async fn transform(
        &self,
        mut buffer: Buffer,
        start: u64,
        work: fn(&crate::SectorCipher, u64, &mut [u8]),
    ) -> Buffer {
        let shared = self.shared().clone();
        let number = shared.first_number.wrapping_add(start / SECTOR);
        if buffer.len() as u64 <= MOST_HERE {
            work(&shared.cipher, number, buffer.bytes_mut());
            return buffer;
        }
        let done = self.local.unblock(move || {
            work(&shared.cipher, number, buffer.bytes_mut());
            buffer
        });
        done.await
    }

    async fn write(&self, offset: u64, len: u64, source: Source<'_>, flags: Flags) -> Result<()> {
        let mut done = 0;
        while done < len {
            let (start, whole) = self.around(offset + done, (len - done).min(MOST_AT_ONCE));
            let within = offset + done - start;
            let count = (len - done).min(whole - within);
            // Others wait: what is read here to be changed in part must not be older than what they write.
            let _lock = self.shared().writes.lock(start..start + whole).await;
            let mut buffer = if within == 0 && count == whole {
                Buffer::new(bytes(whole))
            } else {
                self.decrypted(start, whole).await?
            };
            match source {
                // SAFETY: the request's guard keeps its memory valid.
                Source::Memory(memory) => unsafe {
                    copy(buffer.piece(bytes(within), bytes(count)), memory, bytes(done), false);
                },
                Source::Zeroes => buffer.bytes_mut()[bytes(within)..][..bytes(count)].fill(0),
            }
            let buffer =
                self.transform(buffer, start, |cipher, number, data| cipher.encrypt(number, data)).await;
            let buffer = Arc::new(buffer);
            let at = start + self.shared().offset;
            let write = Ask::transfer(Operation::Write, at, vec![buffer.whole()], Some(buffer.clone()));
            ask(&self.inner, write.durable(flags.fua), self.local.now()).await?;
            done += count;
        }
        Ok(())
    }
}

fn bytes(len: u64) -> usize {
    usize::try_from(len).expect("a 64-bit host")
}

impl Channel for LuksChannel {
    fn submit(self: Rc<Self>, mut request: Request) {
        if let Err(error) = self.check(&request) {
            return request.fail(error.of(&self.shared().label));
        }
        match request.operation {
            Operation::Flush => return self.inner.clone().submit(request),
            // Advice, which is not taken.
            Operation::Discard => return request.complete(Ok(())),
            // Holes below would read as noise: there are none that could be told.
            Operation::Extents => {
                request.extents.push(Extent { len: request.len, kind: ExtentKind::Data });
                return request.complete(Ok(()));
            }
            _ => {}
        }
        let mut pending = Pending::new(request);
        self.local.clone().spawn(async move {
            let request = pending.request();
            request.issued_at = Some(self.local.now());
            let (offset, len, flags) = (request.offset, request.len, request.flags);
            let memory = request.memory.clone();
            let result = match request.operation {
                Operation::Read => self.read(offset, len, &memory).await,
                Operation::Write => self.write(offset, len, Source::Memory(&memory), flags).await,
                _ => self.write(offset, len, Source::Zeroes, flags).await,
            };
            pending.complete(result.map_err(|error| error.of(&self.shared().label)));
        });
    }

    fn cancel_waiting(&self) {
        self.inner.cancel_waiting();
    }
}
