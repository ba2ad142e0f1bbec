//! A front-end for tests: submits requests on a reactor and waits for their results.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use vbd_core::file::Backend;
use vbd_core::{Channel, ErrorKind, Extent, Flags, IoVec, Operation, Request, Result, Session, Sink};
use vbd_ring::{EngineKind, Handle, Local, Reactor, Settings};

/// What a request came back with.
pub struct Answer {
    /// Whether it was done.
    pub result: Result<()>,
    /// What was read, or written.
    pub data: Vec<u8>,
    /// What the range consists of.
    pub extents: Vec<Extent>,
}

/// A request for `Client::submit`. Data is cut into pieces of `piece` bytes, which start `skew` bytes off a page.
#[derive(Clone)]
pub struct Ask {
    /// What for.
    pub operation: Operation,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// How.
    pub flags: Flags,
    /// What to write.
    pub data: Vec<u8>,
    /// Bytes of each piece of memory.
    pub piece: usize,
    /// Bytes from the start of a page to the first piece.
    pub skew: usize,
}

impl std::fmt::Debug for Ask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Ask { operation, offset, len, flags, piece, skew, .. } = self;
        write!(f, "{operation} of {len} at {offset} ({flags:?}, pieces of {piece}, skew {skew})")
    }
}

impl Ask {
    /// In one piece, at the start of a page.
    pub fn new(operation: Operation, offset: u64, len: u64) -> Self {
        let flags = Flags::default();
        Ask { operation, offset, len, flags, data: Vec::new(), piece: usize::MAX, skew: 0 }
    }

    /// A write of these bytes.
    pub fn write(offset: u64, data: Vec<u8>) -> Self {
        Ask { len: data.len() as u64, data, ..Ask::new(Operation::Write, offset, 0) }
    }
}

struct Collector {
    sender: SyncSender<Answer>,
    memory: RefCell<Option<Arc<Memory>>>,
}

/// Page-aligned memory with the data some bytes in.
struct Memory {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Memory {
    fn new(len: usize, skew: usize, data: &[u8]) -> Self {
        let mut bytes = vec![0u8; len + skew + 4096];
        let start = bytes.as_ptr().align_offset(4096) + skew;
        bytes[start..start + data.len()].copy_from_slice(data);
        Memory { bytes, start, len }
    }

    fn pieces(&self, piece: usize) -> Vec<IoVec> {
        let base = self.bytes.as_ptr().wrapping_add(self.start).cast_mut();
        let starts = (0..self.len).step_by(piece.min(self.len.max(1)));
        starts
            .map(|at| IoVec { iov_base: base.wrapping_add(at).cast(), iov_len: piece.min(self.len - at) })
            .collect()
    }
}

impl Sink for Collector {
    fn complete(self: Rc<Self>, mut request: Request, result: Result<()>) {
        let memory = self.memory.borrow_mut().take();
        let data = memory.map_or_else(Vec::new, |memory| memory.bytes[memory.start..][..memory.len].to_vec());
        let extents = std::mem::take(&mut request.extents);
        let _ = self.sender.send(Answer { result, data, extents });
    }
}

thread_local! {
    static CHANNEL: RefCell<Option<Rc<dyn Channel>>> = const { RefCell::new(None) };
}

/// The channel of the client on this thread, for requests that a test builds itself within [`Handle::post`].
///
/// # Panics
/// There is none.
pub fn channel_of_this_thread() -> Rc<dyn Channel> {
    CHANNEL.with_borrow(Clone::clone).expect("open")
}

/// Whether a client that ends has given its channel up: on its reactor.
pub fn is_closed() -> bool {
    CHANNEL.with_borrow(Option::is_none)
}

/// One queue of a disk, on a reactor of its own.
pub struct Client {
    reactor: Option<Reactor>,
}

impl Client {
    /// A client on the channel that `open` makes.
    pub fn new(engine: EngineKind, open: impl FnOnce(&Local) -> Rc<dyn Channel> + Send + 'static) -> Self {
        Client::with(Settings { engine, ..Settings::default() }, open)
    }

    /// The same on a reactor with these settings.
    pub fn with(settings: Settings, open: impl FnOnce(&Local) -> Rc<dyn Channel> + Send + 'static) -> Self {
        let reactor = Reactor::spawn("test", settings).expect("a reactor");
        let opened = move |local: &Local| CHANNEL.set(Some(open(local)));
        reactor.handle().call(opened).expect("the reactor runs");
        Client { reactor: Some(reactor) }
    }

    /// A client on a file.
    pub fn on_file(engine: EngineKind, backend: &Arc<Backend>) -> Self {
        let backend = backend.clone();
        Client::new(engine, move |local| backend.channel(local, Arc::new(())))
    }

    /// A client of an open disk.
    pub fn on_disk(engine: EngineKind, session: &Arc<dyn Session>) -> Self {
        let session = session.clone();
        Client::new(engine, move |local| session.channel(local).expect("a channel"))
    }

    /// Its reactor.
    ///
    /// # Panics
    /// It has ended.
    pub fn handle(&self) -> Handle {
        self.reactor.as_ref().expect("alive").handle()
    }

    /// Sends a request on its way; the answer comes to the receiver.
    ///
    /// # Panics
    /// The reactor has ended.
    pub fn submit(&self, ask: Ask) -> Receiver<Answer> {
        let (sender, receiver) = sync_channel(1);
        let posted = self.handle().post(move |local| {
            let sink = Rc::new(Collector { sender, memory: RefCell::new(None) });
            let mut request = Request::new(ask.operation, ask.offset, ask.len, local.now(), sink.clone());
            request.flags = ask.flags;
            if matches!(ask.operation, Operation::Read | Operation::Write) {
                let len = usize::try_from(ask.len).expect("small");
                let memory = Arc::new(Memory::new(len, ask.skew, &ask.data));
                request.memory = memory.pieces(ask.piece);
                request.guard = Some(memory.clone());
                *sink.memory.borrow_mut() = Some(memory);
            }
            channel_of_this_thread().submit(request);
        });
        assert!(posted, "the reactor runs");
        receiver
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Panics
    /// It does not come within a minute.
    pub fn ask(&self, ask: Ask) -> Answer {
        self.submit(ask).recv_timeout(std::time::Duration::from_secs(60)).expect("an answer")
    }

    /// Reads.
    ///
    /// # Panics
    /// That fails.
    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let answer = self.ask(Ask::new(Operation::Read, offset, len));
        answer.result.expect("readable");
        answer.data
    }

    /// Writes.
    ///
    /// # Panics
    /// That fails.
    pub fn write(&self, offset: u64, data: Vec<u8>) {
        self.ask(Ask::write(offset, data)).result.expect("writable");
    }

    /// The kind of error that a request comes back with, if it does.
    pub fn kind(&self, ask: Ask) -> Option<ErrorKind> {
        self.ask(ask).result.err().map(|error| error.kind())
    }

    /// Runs `work` with the channel, on its thread.
    ///
    /// # Panics
    /// The reactor has ended.
    pub fn channel<T: Send + 'static>(&self, work: impl FnOnce(&dyn Channel) -> T + Send + 'static) -> T {
        let work = move |_: &Local| CHANNEL.with_borrow(|channel| work(&**channel.as_ref().expect("open")));
        self.handle().call(work).expect("the reactor runs")
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.handle().call(|_| CHANNEL.set(None));
        self.reactor.take();
    }
}
