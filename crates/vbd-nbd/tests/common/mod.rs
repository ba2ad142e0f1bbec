//! A disk in memory, a server for it, and a client that speaks the protocol byte by byte.

#![allow(dead_code, reason = "each test uses a part of this")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tempfile::TempDir;
use vbd_core::{
    Capabilities, Channel, Disk, Error, ErrorKind, Event, Extent, ExtentKind, Geometry, Operation, Request,
    Result, Session, Statistics, Watchers,
};
use vbd_nbd::{ExportOptions, Listen, Options, Server};
use vbd_ring::{EngineKind, Local, Reactor, Settings};

/// A disk in memory. It refuses what the contract forbids, and counts.
pub(crate) struct Memory {
    pub(crate) bytes: Mutex<Vec<u8>>,
    pub(crate) flushes: AtomicUsize,
    pub(crate) durable_writes: AtomicUsize,
    /// Sessions that are open.
    pub(crate) sessions: AtomicUsize,
    /// Requests are kept until the number here is raised above 0.
    pub(crate) held: Mutex<bool>,
    capabilities: Capabilities,
    statistics: Statistics,
    watchers: Watchers,
    this: std::sync::Weak<Memory>,
}

impl Memory {
    pub(crate) fn new(size: usize) -> Arc<Self> {
        Self::with(
            size,
            Capabilities {
                read_only: false,
                write_cache: true,
                discard: true,
                fast_zeroes: true,
                grow: false,
            },
        )
    }

    pub(crate) fn with(size: usize, capabilities: Capabilities) -> Arc<Self> {
        Arc::new_cyclic(|this| Memory {
            bytes: Mutex::new(vec![0; size]),
            flushes: AtomicUsize::new(0),
            durable_writes: AtomicUsize::new(0),
            sessions: AtomicUsize::new(0),
            held: Mutex::new(false),
            capabilities,
            statistics: Statistics::default(),
            watchers: Watchers::default(),
            this: this.clone(),
        })
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.content().len() as u64,
            block_size: 512,
            physical_block_size: 4096,
            optimal_size: 0,
            discard_granularity: 512,
            max_discard: 1 << 20,
            max_zeroes: 1 << 20,
        }
    }
}

impl Disk for Memory {
    fn name(&self) -> &str {
        "memory"
    }

    fn open(&self) -> Result<Arc<dyn Session>> {
        self.sessions.fetch_add(1, Ordering::SeqCst);
        Ok(Arc::new(Open(self.this.upgrade().expect("it is alive"))))
    }

    fn inspect(&self) -> Result<(Geometry, Capabilities)> {
        Ok((self.geometry(), self.capabilities))
    }

    fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    fn watch(&self, watcher: Box<dyn Fn(Event) + Send + Sync>) -> Arc<dyn Send + Sync> {
        self.watchers.add(watcher)
    }
}

struct Open(Arc<Memory>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.sessions.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Session for Open {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.0.capabilities
    }

    fn channel(self: Arc<Self>, local: &Local) -> Result<Rc<dyn Channel>> {
        Ok(Rc::new(Lane(self, local.clone())))
    }

    fn grow(&self, _size: u64) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "memory does not grow"))
    }
}

struct Lane(Arc<Open>, Local);

impl Channel for Lane {
    fn submit(self: Rc<Self>, mut request: Request) {
        if *self.0.0.held.lock().unwrap_or_else(PoisonError::into_inner) {
            let (this, local) = (self.clone(), self.1.clone());
            local.clone().spawn(async move {
                local.sleep(Duration::from_millis(5)).await;
                this.submit(request);
            });
            return;
        }
        // Every other request completes later, from a task.
        if request.token % 2 == 1 {
            let (this, local) = (self.clone(), self.1.clone());
            local.spawn(async move {
                let result = this.carry_out(&mut request);
                request.complete(result);
            });
            return;
        }
        let result = self.carry_out(&mut request);
        request.complete(result);
    }
}

impl Lane {
    fn carry_out(&self, request: &mut Request) -> Result<()> {
        let disk = &self.0.0;
        let mut bytes = disk.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, len) = (usize::try_from(request.offset).unwrap(), usize::try_from(request.len).unwrap());
        let by_sectors = matches!(request.operation, Operation::Discard | Operation::Extents);
        assert!(!by_sectors || (start | len).is_multiple_of(512), "{request:?}");
        if request.operation == Operation::Flush {
            disk.flushes.fetch_add(1, Ordering::SeqCst);
            return Ok(());
        }
        let Some(range) = bytes.get_mut(start..start + len) else {
            return Err(Error::new(ErrorKind::OutOfRange, "beyond the end"));
        };
        if request.operation.is_write() && request.flags.fua {
            disk.durable_writes.fetch_add(1, Ordering::SeqCst);
        }
        match request.operation {
            Operation::Read | Operation::Write => {
                let mut at = 0;
                for piece in &request.memory {
                    let memory = piece.iov_base.cast::<u8>();
                    assert!((memory as usize).is_multiple_of(4096), "memory is aligned for O_DIRECT");
                    // SAFETY: the request keeps its memory valid, and it is as long as it says.
                    let memory = unsafe { std::slice::from_raw_parts_mut(memory, piece.iov_len) };
                    let part = &mut range[at..at + piece.iov_len];
                    match request.operation {
                        Operation::Read => memory.copy_from_slice(part),
                        _ => part.copy_from_slice(memory),
                    }
                    at += piece.iov_len;
                }
                assert_eq!(at, len);
            }
            Operation::Discard | Operation::WriteZeroes => {
                assert!(len <= 1 << 20, "longer than this disk takes");
                range.fill(0);
            }
            Operation::Extents => {
                for sector in range.chunks(512) {
                    let zero = sector.iter().all(|byte| *byte == 0);
                    let kind = if zero { ExtentKind::Hole } else { ExtentKind::Data };
                    request.extents.push(Extent { len: 512, kind });
                }
            }
            Operation::Flush => {}
        }
        Ok(())
    }
}

/// A server on a unix socket in a directory of its own.
pub(crate) struct Served {
    pub(crate) server: Server,
    pub(crate) socket: PathBuf,
    pub(crate) directory: TempDir,
    pub(crate) reactors: Vec<Reactor>,
}

pub(crate) fn serve(options: Options) -> Served {
    serve_with(options, EngineKind::Auto)
}

pub(crate) fn serve_with(options: Options, engine: EngineKind) -> Served {
    let directory = TempDir::new().unwrap();
    let socket = directory.path().join("nbd.sock");
    let settings = Settings { engine, ..Settings::default() };
    let reactors: Vec<_> =
        (0..2).map(|number| Reactor::spawn(&format!("nbd{number}"), settings.clone()).unwrap()).collect();
    let handles = reactors.iter().map(Reactor::handle).collect();
    let server = Server::bind(Listen::Unix(socket.clone()), options, handles).unwrap();
    Served { server, socket, directory, reactors }
}

/// A server with one disk named `disk`.
pub(crate) fn serve_disk(disk: Arc<dyn Disk>) -> Served {
    let served = serve(Options::default());
    served.server.add_export("disk", disk, ExportOptions::default()).unwrap();
    served
}

impl Served {
    pub(crate) fn connect(&self) -> Client<UnixStream> {
        Client::greeted(UnixStream::connect(&self.socket).unwrap())
    }

    pub(crate) fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket.display())
    }
}

/// How replies are framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Simple,
    Structured,
    Extended,
}

pub(crate) struct Client<S> {
    pub(crate) stream: S,
    pub(crate) style: Style,
    cookie: u64,
}

pub(crate) const MAGIC: u64 = 0x4e42444d41474943;
pub(crate) const IHAVEOPT: u64 = 0x49484156454f5054;
pub(crate) const OPT_REPLY: u64 = 0x3e889045565a9;

/// A reply to a command, its chunks put together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) error: u32,
    pub(crate) data: Vec<u8>,
    /// Lengths and flags.
    pub(crate) extents: Vec<(u64, u64)>,
}

impl<S: Read + Write> Client<S> {
    /// Has said nothing yet.
    pub(crate) fn new(stream: S) -> Self {
        Client { stream, style: Style::Simple, cookie: 100 }
    }

    /// Exchanges greetings.
    pub(crate) fn greeted(stream: S) -> Self {
        let mut client = Client::new(stream);
        assert_eq!(client.u64(), MAGIC);
        assert_eq!(client.u64(), IHAVEOPT);
        assert_eq!(client.u16(), 3);
        client.send(&3u32.to_be_bytes());
        client
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.bytes(2).try_into().unwrap())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes(4).try_into().unwrap())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.bytes(8).try_into().unwrap())
    }

    /// The server has closed: nothing more comes.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => rest.is_empty(),
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    pub(crate) fn option(&mut self, option: u32, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        self.send(&[&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes(), data].concat());
    }

    /// One reply to an option: its type and data.
    pub(crate) fn option_reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(self.u64(), OPT_REPLY);
        assert_eq!(self.u32(), option);
        let (kind, len) = (self.u32(), self.u32());
        (kind, self.bytes(len as usize))
    }

    /// All replies to an option up to the last: an ACK or an error.
    pub(crate) fn ask(&mut self, option: u32, data: &[u8]) -> (Vec<(u32, Vec<u8>)>, u32) {
        self.option(option, data);
        let mut replies = Vec::new();
        loop {
            let (kind, data) = self.option_reply(option);
            if kind == 1 || kind >= 1 << 31 {
                return (replies, kind);
            }
            replies.push((kind, data));
        }
    }

    /// Agrees on a style, selects base:allocation where there can be one, and chooses an export: its size and flags.
    pub(crate) fn go(&mut self, style: Style, name: &str) -> Result<(u64, u16), u32> {
        self.style = style;
        match style {
            Style::Simple => {}
            Style::Structured => assert_eq!(self.ask(8, &[]).1, 1),
            Style::Extended => assert_eq!(self.ask(11, &[]).1, 1),
        }
        if style != Style::Simple {
            let query = [&string(name)[..], &1u32.to_be_bytes(), &string("base:allocation")].concat();
            self.ask(10, &query);
        }
        let (replies, last) = self.ask(7, &[&string(name)[..], &[0, 0]].concat());
        if last != 1 {
            return Err(last);
        }
        let info = &replies.iter().find(|(_, data)| data[..2] == [0, 0]).unwrap().1;
        let size = u64::from_be_bytes(info[2..10].try_into().unwrap());
        Ok((size, u16::from_be_bytes(info[10..12].try_into().unwrap())))
    }

    pub(crate) fn request(&mut self, command: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> u64 {
        self.cookie += 1;
        let mut bytes = Vec::new();
        if self.style == Style::Extended {
            bytes.extend(0x21e41c71u32.to_be_bytes());
            bytes.extend((flags | if command == 1 { 1 << 5 } else { 0 }).to_be_bytes());
        } else {
            bytes.extend(0x25609513u32.to_be_bytes());
            bytes.extend(flags.to_be_bytes());
        }
        bytes.extend(command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        if self.style == Style::Extended {
            bytes.extend(len.to_be_bytes());
        } else {
            bytes.extend(u32::try_from(len).unwrap().to_be_bytes());
        }
        bytes.extend(payload);
        self.send(&bytes);
        self.cookie
    }

    /// The next message: the cookie, whether it is the last of its reply, and what it adds to it.
    fn message(&mut self, read_len: usize, offset: u64, reply: &mut Reply) -> (u64, bool) {
        let magic = self.u32();
        if magic == 0x67446698 {
            assert_ne!(self.style, Style::Extended);
            reply.error = self.u32();
            let cookie = self.u64();
            if reply.error == 0 && self.style == Style::Simple {
                reply.data = self.bytes(read_len);
            }
            return (cookie, true);
        }
        let expected = if self.style == Style::Extended { 0x6e8a278c } else { 0x668e33ef };
        assert_eq!(magic, expected);
        let (flags, kind, cookie) = (self.u16(), self.u16(), self.u64());
        let len = if self.style == Style::Extended {
            assert_eq!(self.u64(), offset, "the offset that was asked for");
            self.u64()
        } else {
            u64::from(self.u32())
        };
        let payload = self.bytes(usize::try_from(len).unwrap());
        match kind {
            0 => assert!(payload.is_empty() && flags & 1 != 0),
            1 => {
                let at = u64::from_be_bytes(payload[..8].try_into().unwrap()) - offset;
                let at = usize::try_from(at).unwrap();
                reply.data.resize(reply.data.len().max(at + payload.len() - 8), 0);
                reply.data[at..at + payload.len() - 8].copy_from_slice(&payload[8..]);
            }
            5 => {
                assert_eq!(payload[..4], 1u32.to_be_bytes());
                for entry in payload[4..].chunks_exact(8) {
                    let part =
                        |range: std::ops::Range<usize>| u32::from_be_bytes(entry[range].try_into().unwrap());
                    reply.extents.push((part(0..4).into(), part(4..8).into()));
                }
            }
            6 => {
                let count = u32::from_be_bytes(payload[4..8].try_into().unwrap());
                assert_eq!(payload.len(), 8 + 16 * count as usize);
                for entry in payload[8..].chunks_exact(16) {
                    let part =
                        |range: std::ops::Range<usize>| u64::from_be_bytes(entry[range].try_into().unwrap());
                    reply.extents.push((part(0..8), part(8..16)));
                }
            }
            kind if kind == (1 << 15) + 1 => {
                reply.error = u32::from_be_bytes(payload[..4].try_into().unwrap());
                let len = u16::from_be_bytes(payload[4..6].try_into().unwrap());
                assert_eq!(payload.len(), 6 + usize::from(len));
                assert_ne!(reply.error, 0);
            }
            other => panic!("a chunk of type {other}"),
        }
        (cookie, flags & 1 != 0)
    }

    /// The reply to the one request that is out.
    pub(crate) fn reply(&mut self, cookie: u64, read_len: usize, offset: u64) -> Reply {
        let mut reply = Reply::default();
        loop {
            let (found, last) = self.message(read_len, offset, &mut reply);
            assert_eq!(found, cookie);
            if last {
                return reply;
            }
        }
    }

    /// A command and its reply.
    pub(crate) fn command(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u64,
        payload: &[u8],
    ) -> Reply {
        let cookie = self.request(command, flags, offset, len, payload);
        let read_len = if command == 0 { usize::try_from(len).unwrap() } else { 0 };
        self.reply(cookie, read_len, offset)
    }

    pub(crate) fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let reply = self.command(0, 0, offset, len, &[]);
        assert_eq!((reply.error, reply.data.len() as u64), (0, len));
        reply.data
    }

    /// Writes; the error that comes back.
    pub(crate) fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        self.command(1, flags, offset, data.len() as u64, data).error
    }
}

/// A string as options have it.
pub(crate) fn string(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text.as_bytes()].concat()
}

/// Waits until something holds that other threads bring about.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{what} did not come about");
}
