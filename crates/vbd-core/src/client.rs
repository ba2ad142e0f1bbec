//! Asking a disk from ordinary threads: calls that block, for work on whole disks and for tests.
//!
//! A [`Client`] has a channel on a reactor. Several threads may share it: each call is a request of its own, so as many
//! are under way as there are threads that ask. One thread has several under way with [`Client::start`].

use std::fmt;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use vbd_ring::sync::mpsc::{Receiver, SyncSender, sync_channel};
use vbd_ring::{Handle, Remote};

use crate::memory::Buffer as Memory;
use crate::{
    Channel, Error, ErrorKind, Extent, ExtentKind, Flags, Operation, Request, Result, Session, Sink,
};

/// What [`Client::read_at`] and [`Client::write_at`] move in one request, in bytes: they copy.
const BOUNCE: usize = 1 << 20;

/// Memory that requests transfer from and to, aligned so that storage takes it without another copy.
pub struct Buffer {
    memory: Arc<Memory>,
    len: usize,
}

impl Buffer {
    /// So many bytes, of zeroes.
    pub fn new(len: usize) -> Self {
        Buffer { memory: Arc::new(Memory::new(len)), len }
    }

    fn address(&self) -> *mut u8 {
        self.memory.piece(0, self.len).iov_base.cast()
    }
}

impl std::ops::Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the allocation is as long and was zeroed. A request has the memory only between `Client::start`, which
        // takes the buffer, and `Pending::wait`, which gives it back when the request has come back: others that hold
        // the memory then only keep it from going away.
        unsafe { std::slice::from_raw_parts(self.address(), self.len) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; and a buffer is not cloned, so there is one owner.
        unsafe { std::slice::from_raw_parts_mut(self.address(), self.len) }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer of {} bytes", self.len)
    }
}

/// What is asked of a disk.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// What to do.
    pub operation: Operation,
    /// First byte.
    pub offset: u64,
    /// Bytes; for a read or write, at most those of the buffer.
    pub len: u64,
    /// How to do it.
    pub flags: Flags,
}

impl Ask {
    /// An operation on a range, with no flags.
    pub fn new(operation: Operation, offset: u64, len: u64) -> Self {
        Ask { operation, offset, len, flags: Flags::default() }
    }
}

/// A disk as ordinary threads use it. Dropping it gives its channel back; after that, the lease depends on the other
/// owners of the session alone.
pub struct Client {
    reactor: Handle,
    session: Arc<dyn Session>,
    port: Remote<Port>,
}

/// The client's channel, on the reactor's thread.
struct Port {
    channel: Rc<dyn Channel>,
    place: vbd_ring::Place,
}

/// What came back of a request.
struct Answer {
    result: Result<()>,
    extents: Vec<Extent>,
}

/// Hands the outcome of one request to the thread that waits for it.
struct Waiting(SyncSender<Answer>);

impl Sink for Waiting {
    fn complete(self: Rc<Self>, mut request: Request, result: Result<()>) {
        let extents = std::mem::take(&mut request.extents);
        // Before the other side knows: it is to be the memory's only owner, as a rule.
        drop(request);
        // Where nobody waits any more, nobody wants the answer.
        let _ = self.0.try_send(Answer { result, extents });
    }
}

/// A request that is under way.
#[must_use = "its outcome is told by `wait`"]
pub struct Pending {
    answer: Receiver<Answer>,
    ask: Ask,
    buffer: Option<Buffer>,
    /// What others read, too, and nobody may change before the outcome is known.
    shared: Option<Arc<Buffer>>,
}

impl Drop for Pending {
    fn drop(&mut self) {
        // Not waited for: the buffer must never be anyone's alone again.
        std::mem::forget(self.shared.take());
    }
}

impl Pending {
    /// Waits for the outcome: what a read or write was lent, and the extents where they were asked for. The buffer is
    /// gone where the reactor has ended, since the kernel may still have it.
    ///
    /// # Errors
    /// Those of the request.
    pub fn wait(mut self) -> (Option<Buffer>, Result<Vec<Extent>>) {
        match self.answer.recv() {
            Ok(answer) => {
                drop(self.shared.take());
                (self.buffer.take(), answer.result.map(|()| answer.extents))
            }
            Err(_) => {
                let Ask { operation, offset, len, .. } = self.ask;
                let error = Error::new(ErrorKind::Cancelled, "the reactor has ended");
                (None, Err(error.at(operation, offset, len)))
            }
        }
    }
}

impl Client {
    /// A client of this session, with a channel on this reactor. Must not be called on a reactor's thread, as nothing
    /// of a client may.
    ///
    /// # Errors
    /// The session has no channel to give, or the reactor has ended.
    pub fn new(reactor: &Handle, session: Arc<dyn Session>) -> Result<Self> {
        let inside = session.clone();
        let (sender, refused) = sync_channel(1);
        let port = Remote::new(reactor, move |local, place| match inside.channel(local) {
            Ok(channel) => Ok(Rc::new(Port { channel, place })),
            Err(error) => {
                let _ = sender.try_send(error);
                Err(String::new())
            }
        });
        match port {
            Ok(port) => Ok(Client { reactor: reactor.clone(), session, port }),
            Err(_) => Err(refused
                .try_recv()
                .unwrap_or_else(|_| Error::new(ErrorKind::Cancelled, "the reactor has ended"))),
        }
    }

    /// The session.
    pub fn session(&self) -> &Arc<dyn Session> {
        &self.session
    }

    /// The disk's size now, in bytes.
    pub fn size(&self) -> u64 {
        self.session.geometry().size
    }

    /// Starts a request. `buffer` is what a read fills and a write takes, from its start.
    ///
    /// # Panics
    /// A read or write without a buffer of its length at least.
    pub fn start(&self, ask: Ask, buffer: Option<Buffer>) -> Pending {
        let memory = matches!(ask.operation, Operation::Read | Operation::Write).then(|| {
            let len = usize::try_from(ask.len).unwrap_or(usize::MAX);
            let buffer = buffer.as_ref().expect("a read or write has a buffer");
            assert!(len <= buffer.len, "a buffer as long as the range");
            (buffer.memory.clone(), 0..len)
        });
        Pending { answer: self.post(ask, memory), ask, buffer, shared: None }
    }

    /// Starts to write a part of a buffer that others may read meanwhile.
    ///
    /// # Panics
    /// The buffer has no such part.
    pub fn start_write(&self, offset: u64, buffer: &Arc<Buffer>, part: Range<usize>) -> Pending {
        assert!(part.start <= part.end && part.end <= buffer.len, "a part of the buffer");
        let ask = Ask::new(Operation::Write, offset, part.len() as u64);
        let answer = self.post(ask, Some((buffer.memory.clone(), part)));
        Pending { answer, ask, buffer: None, shared: Some(buffer.clone()) }
    }

    fn post(&self, ask: Ask, memory: Option<(Arc<Memory>, Range<usize>)>) -> Receiver<Answer> {
        let (sender, answer) = sync_channel(1);
        self.port.post(move |port| {
            let now = std::time::Instant::now();
            let sink = Rc::new(Waiting(sender));
            let mut request = Request::new(ask.operation, ask.offset, ask.len, now, sink);
            request.flags = ask.flags;
            if let Some((memory, part)) = memory {
                request.memory.push(memory.piece(part.start, part.len()));
                request.guard = Some(memory);
            }
            port.channel.clone().submit(request);
        });
        answer
    }

    /// Does one request that moves no data.
    ///
    /// # Errors
    /// Those of the request.
    pub fn ask(&self, ask: Ask) -> Result<Vec<Extent>> {
        self.start(ask, None).wait().1
    }

    /// Fills the first `len` bytes of the buffer from the disk.
    ///
    /// # Errors
    /// Those of the request; the buffer's content is then undefined.
    pub fn read(&self, offset: u64, buffer: &mut Buffer, len: usize) -> Result<()> {
        let ask = Ask::new(Operation::Read, offset, len as u64);
        self.transfer(ask, buffer)
    }

    /// Writes the first `len` bytes of the buffer to the disk.
    ///
    /// # Errors
    /// Those of the request.
    pub fn write(&self, offset: u64, buffer: &mut Buffer, len: usize) -> Result<()> {
        let ask = Ask::new(Operation::Write, offset, len as u64);
        self.transfer(ask, buffer)
    }

    /// Fills a part of the buffer from the disk.
    ///
    /// # Errors
    /// Those of the request; the part's content is then undefined.
    ///
    /// # Panics
    /// The buffer has no such part.
    pub fn read_part(&self, offset: u64, buffer: &mut Buffer, part: Range<usize>) -> Result<()> {
        self.transfer_part(Operation::Read, offset, buffer, part)
    }

    /// Writes a part of the buffer to the disk.
    ///
    /// # Errors
    /// Those of the request.
    ///
    /// # Panics
    /// The buffer has no such part.
    pub fn write_part(&self, offset: u64, buffer: &mut Buffer, part: Range<usize>) -> Result<()> {
        self.transfer_part(Operation::Write, offset, buffer, part)
    }

    fn transfer_part(
        &self,
        operation: Operation,
        offset: u64,
        buffer: &mut Buffer,
        part: Range<usize>,
    ) -> Result<()> {
        assert!(part.start <= part.end && part.end <= buffer.len, "a part of the buffer");
        let ask = Ask::new(operation, offset, part.len() as u64);
        self.lend(buffer, |lent| {
            let answer = self.post(ask, Some((lent.memory.clone(), part)));
            Pending { answer, ask, buffer: Some(lent), shared: None }
        })
    }

    fn transfer(&self, ask: Ask, buffer: &mut Buffer) -> Result<()> {
        self.lend(buffer, |lent| self.start(ask, Some(lent)))
    }

    fn lend(&self, buffer: &mut Buffer, start: impl FnOnce(Buffer) -> Pending) -> Result<()> {
        let len = buffer.len;
        let lent = std::mem::replace(buffer, Buffer { memory: Arc::new(Memory::new(0)), len: 0 });
        let (back, result) = start(lent).wait();
        *buffer = back.unwrap_or_else(|| Buffer::new(len));
        result.map(|_| ())
    }

    /// Fills `bytes` from the disk.
    ///
    /// # Errors
    /// Those of the requests.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let mut buffer = Buffer::new(bytes.len().min(BOUNCE));
        let mut at = offset;
        for piece in bytes.chunks_mut(BOUNCE) {
            self.read(at, &mut buffer, piece.len())?;
            piece.copy_from_slice(&buffer[..piece.len()]);
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Writes `bytes` to the disk.
    ///
    /// # Errors
    /// Those of the requests.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut buffer = Buffer::new(bytes.len().min(BOUNCE));
        let mut at = offset;
        for piece in bytes.chunks(BOUNCE) {
            buffer[..piece.len()].copy_from_slice(piece);
            self.write(at, &mut buffer, piece.len())?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes a range read as zeroes; `may_unmap` gives its space back where that can be.
    ///
    /// # Errors
    /// Those of the requests.
    pub fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        let most = self.session.geometry().max_zeroes;
        self.in_steps(Operation::WriteZeroes, offset, len, most, Flags { may_unmap, ..Flags::default() })
    }

    /// Gives up a range's content: advice.
    ///
    /// # Errors
    /// Those of the requests.
    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let most = self.session.geometry().max_discard;
        self.in_steps(Operation::Discard, offset, len, most, Flags::default())
    }

    fn in_steps(&self, operation: Operation, offset: u64, len: u64, most: u64, flags: Flags) -> Result<()> {
        // What tells no bound has none.
        let most = if most == 0 { u64::MAX } else { most };
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let len = left.min(most);
            self.ask(Ask { flags, ..Ask::new(operation, at, len) })?;
            at += len;
            left -= len;
        }
        Ok(())
    }

    /// Makes everything that has completed durable.
    ///
    /// # Errors
    /// What the flush has met.
    pub fn flush(&self) -> Result<()> {
        self.ask(Ask::new(Operation::Flush, 0, 0)).map(|_| ())
    }

    /// What a range consists of, from its start: at least one extent, perhaps not all of the range.
    ///
    /// # Errors
    /// Those of the request, or that the disk's answer makes no sense.
    pub fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let mut extents = self.ask(Ask::new(Operation::Extents, offset, len))?;
        let mut left = len;
        for extent in &mut extents {
            extent.len = extent.len.min(left);
            left -= extent.len;
        }
        extents.retain(|extent| extent.len > 0);
        if extents.is_empty() && len > 0 {
            let error = Error::new(ErrorKind::Corrupt, "the disk does not tell what it consists of");
            return Err(error.at(Operation::Extents, offset, len));
        }
        Ok(extents)
    }

    /// Calls `each` with every part (offset, length, what it is) of a range, in order; neighbours of one kind within an
    /// answer are one part.
    ///
    /// # Errors
    /// As [`extents`](Self::extents), and what `each` says.
    pub fn parts<E: From<Error>>(
        &self,
        offset: u64,
        len: u64,
        mut each: impl FnMut(u64, u64, ExtentKind) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let mut extents = self.extents(at, end - at)?.into_iter().peekable();
            while let Some(mut extent) = extents.next() {
                while let Some(next) = extents.next_if(|next| next.kind == extent.kind) {
                    extent.len += next.len;
                }
                each(at, extent.len, extent.kind)?;
                at += extent.len;
            }
        }
        Ok(())
    }

    /// Fails what waits for something other than the storage.
    pub fn cancel_waiting(&self) {
        self.port.post(|port| port.channel.cancel_waiting());
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.port.post(|port| port.place.leave());
        // The channel ends in that turn: only then is the session this thread's alone to close.
        self.reactor.call(|_| ());
    }
}
