//! A queue's way to an image that is read only.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use vbd_core::ask::{Ask, Pending, ask};
use vbd_core::memory::{Buffer, copy, slice, zero};
use vbd_core::{
    Channel, Error, ErrorKind, Extent, ExtentKind, Guard, IoVec, Operation, Request, Result, SECTOR,
};
use vbd_ring::Local;

use crate::disk::Image;
use crate::layout::{Place, find};
use crate::vmdk;

/// The most extents in one answer.
const MOST_EXTENTS: usize = 1024;

pub(crate) struct ForeignChannel {
    image: Arc<Image>,
    file: Rc<dyn Channel>,
    local: Local,
    /// The packed block that was unpacked last, by its place in the file: neighbours are often read one by one.
    unpacked: RefCell<Option<(u64, Rc<Vec<u8>>)>>,
}

impl ForeignChannel {
    /// A channel on this reactor, which keeps `session`, the image's, open.
    pub(crate) fn new(image: Arc<Image>, session: Guard, local: &Local) -> Rc<Self> {
        let file = image.backend.clone().channel(local, session);
        Rc::new(ForeignChannel { image, file, local: local.clone(), unpacked: RefCell::default() })
    }

    fn check(&self, request: &Request) -> Result<()> {
        if request.operation.is_write() {
            return Err(Error::new(ErrorKind::ReadOnly, "the disk is read-only"));
        }
        let size = self.image.layout.size();
        if request.operation != Operation::Flush
            && request.offset.checked_add(request.len).is_none_or(|end| end > size)
        {
            return Err(Error::new(ErrorKind::OutOfRange, format!("the disk ends at {size}")));
        }
        let len = request.memory.iter().map(|piece| piece.iov_len as u64).sum::<u64>();
        if request.operation == Operation::Read && len != request.len {
            return Err(Error::new(ErrorKind::OutOfRange, "the memory given is not as long as the range"));
        }
        Ok(())
    }

    async fn read(&self, offset: u64, len: u64, memory: &[IoVec], guard: Option<&Guard>) -> Result<()> {
        let mut done = 0;
        while done < len {
            let (place, run) = find(&*self.image.layout, offset + done, len - done);
            match place {
                Place::File(at) => {
                    self.within(at, run)?;
                    let pieces = slice(memory, bytes(done), bytes(run), usize::MAX).0;
                    let read = Ask::transfer(Operation::Read, at, pieces, guard.cloned());
                    ask(&self.file, read, self.local.now()).await?;
                }
                // SAFETY: the request's guard keeps its memory valid.
                Place::Hole | Place::Zero => unsafe { zero(memory, bytes(done), bytes(run)) },
                Place::Packed(at) => {
                    let content = self.unpack(at).await?;
                    let within = bytes((offset + done) % self.image.layout.block_size());
                    let part = content.get(within..within + bytes(run));
                    let part = part.ok_or_else(|| damaged("a compressed grain is too short"))?;
                    let flat = IoVec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
                    // SAFETY: `flat` is read only, and lives until here; the rest as above.
                    unsafe { copy(flat, memory, bytes(done), true) };
                }
            }
            done += run;
        }
        Ok(())
    }

    fn within(&self, at: u64, len: u64) -> Result<()> {
        match at.checked_add(len) {
            Some(end) if end <= self.image.backend.size() => Ok(()),
            _ => Err(damaged("a block lies beyond the end of the file: it was truncated")),
        }
    }

    /// The content of a packed block.
    async fn unpack(&self, at: u64) -> Result<Rc<Vec<u8>>> {
        if let Some((known, content)) = &*self.unpacked.borrow()
            && *known == at
        {
            return Ok(content.clone());
        }
        let grain = bytes(self.image.layout.block_size());
        let head = self.fetch(at, SECTOR).await?;
        let len = vmdk::packed_len(&head, grain as u64);
        let len = len.ok_or_else(|| damaged("the marker of a compressed grain cannot be"))?;
        let mut packed = head;
        let whole = ((vmdk::MARKER_LEN + len) as u64).next_multiple_of(SECTOR);
        if whole > SECTOR {
            packed.extend(self.fetch(at + SECTOR, whole - SECTOR).await?);
        }
        // On another thread: this one has other queues to serve.
        let content = self.local.unblock(move || vmdk::unpack(&packed, grain)).await;
        let content = Rc::new(content.ok_or_else(|| damaged("a compressed grain is damaged"))?);
        *self.unpacked.borrow_mut() = Some((at, content.clone()));
        Ok(content)
    }

    async fn fetch(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        self.within(at, len)?;
        let buffer = Arc::new(Buffer::new(bytes(len)));
        let read = Ask::transfer(Operation::Read, at, vec![buffer.whole()], Some(buffer.clone()));
        ask(&self.file, read, self.local.now()).await?;
        // SAFETY: the read has come back.
        Ok(unsafe { buffer.bytes() }.to_vec())
    }

    async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let (mut all, mut done): (Vec<Extent>, u64) = (Vec::new(), 0);
        while done < len && all.len() < MOST_EXTENTS {
            let (place, run) = find(&*self.image.layout, offset + done, len - done);
            let found = match place {
                Place::File(at) => {
                    self.within(at, run)?;
                    ask(&self.file, Ask::new(Operation::Extents, at, run), self.local.now()).await?
                }
                Place::Packed(_) => vec![Extent { len: run, kind: ExtentKind::Data }],
                Place::Zero => vec![Extent { len: run, kind: ExtentKind::Zero }],
                Place::Hole => vec![Extent { len: run, kind: ExtentKind::Hole }],
            };
            let mut told = 0;
            for extent in found {
                let len = extent.len.min(run - told);
                told += len;
                match all.last_mut() {
                    _ if len == 0 => {}
                    Some(last) if last.kind == extent.kind => last.len += len,
                    _ => all.push(Extent { len, kind: extent.kind }),
                }
            }
            done += told;
            if told < run {
                break;
            }
        }
        Ok(all)
    }
}

fn damaged(message: &str) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

fn bytes(len: u64) -> usize {
    usize::try_from(len).expect("a 64-bit host")
}

impl Channel for ForeignChannel {
    fn submit(self: Rc<Self>, request: Request) {
        if let Err(error) = self.check(&request) {
            return request.fail(error.of(&self.image.label));
        }
        if request.operation == Operation::Flush {
            return request.complete(Ok(()));
        }
        let mut pending = Pending::new(request);
        self.local.clone().spawn(async move {
            let request = pending.request();
            request.issued_at = Some(self.local.now());
            let (offset, len) = (request.offset, request.len);
            let result = match request.operation {
                Operation::Extents => {
                    self.extents(offset, len).await.map(|extents| pending.request().extents = extents)
                }
                _ => {
                    let (memory, guard) = (request.memory.clone(), request.guard.clone());
                    self.read(offset, len, &memory, guard.as_ref()).await
                }
            };
            pending.complete(result.map_err(|error| error.of(&self.image.label)));
        });
    }

    fn cancel_waiting(&self) {
        self.file.cancel_waiting();
    }
}
