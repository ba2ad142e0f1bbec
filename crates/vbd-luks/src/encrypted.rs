//! A queue's way to encrypted data, in whatever file that is: through memory of its own, since a guest must never see what
//! is not decrypted, and its memory must not be encrypted under it.

use std::rc::Rc;
use std::sync::Arc;

use vbd_core::ask::{Ask, Pending, ask};
use vbd_core::memory::{Buffer, copy};
use vbd_core::{Channel, Error, ErrorKind, Extent, ExtentKind, Flags, IoVec, Operation, Request, Result};
use vbd_ring::Local;

use vbd_core::range_lock::RangeLocks;

use crate::SectorCipher;

/// The most bytes in memory for one request at a time.
const MOST_AT_ONCE: u64 = 1 << 20;
/// More than this is encrypted on another thread: this one has other queues to serve.
const MOST_HERE: u64 = 64 << 10;
/// The unit in which the cipher numbers sectors.
const SECTOR: u64 = 512;

/// Encrypted data in a file, and what its channels share.
pub struct Encrypted {
    cipher: SectorCipher,
    /// Where the data begins in what is below, in bytes.
    offset: u64,
    /// The number of its first sector.
    first_number: u64,
    /// What messages are about.
    label: String,
    /// Sectors that are being written: nobody may read one to change it meanwhile.
    writes: Arc<RangeLocks>,
}

impl Encrypted {
    /// Data that begins `offset` bytes into what is below with the sector of this number. `label` is for messages.
    pub fn new(cipher: SectorCipher, offset: u64, first_number: u64, label: String) -> Arc<Self> {
        Arc::new(Encrypted { cipher, offset, first_number, label, writes: Arc::default() })
    }

    /// A channel to the data through one to what is below.
    ///
    /// It takes every request but two: discards are advice that is not taken, since what was given back would read as noise,
    /// and zeroes cannot be had without writing them. Whether a range is inside is for the channel below to say.
    pub fn channel(self: &Arc<Self>, inner: Rc<dyn Channel>, local: &Local) -> Rc<dyn Channel> {
        Rc::new(EncryptedChannel { shared: self.clone(), inner, local: local.clone() })
    }

    pub(crate) fn label(&self) -> &str {
        &self.label
    }

    pub(crate) fn sector_size(&self) -> u64 {
        self.cipher.sector_size()
    }

    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }
}

struct EncryptedChannel {
    shared: Arc<Encrypted>,
    inner: Rc<dyn Channel>,
    local: Local,
}

/// What is written.
#[derive(Clone, Copy)]
enum Source<'a> {
    Memory(&'a [IoVec]),
    Zeroes,
}

impl EncryptedChannel {
    /// Whole sectors around a range: first byte and length.
    fn around(&self, offset: u64, len: u64) -> (u64, u64) {
        let sector = self.shared.cipher.sector_size();
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
        let at = start + self.shared.offset;
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
        let shared = self.shared.clone();
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
            let _lock = self.shared.writes.lock(start..start + whole).await;
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
            let at = start + self.shared.offset;
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

impl Channel for EncryptedChannel {
    fn submit(self: Rc<Self>, mut request: Request) {
        match request.operation {
            Operation::WriteZeroes if request.flags.fast_only => {
                let error = Error::new(ErrorKind::Unsupported, "zeroes are encrypted as everything else");
                return request.fail(error.of(&self.shared.label));
            }
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
            pending.complete(result.map_err(|error| error.of(&self.shared.label)));
        });
    }

    fn cancel_waiting(&self) {
        self.inner.cancel_waiting();
    }
}
