//! A disk behind a socket. While nobody is connected it costs a socket and an operation that waits on a reactor.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vbd_core::{Disk, ErrorKind, Session};
use vbd_ring::{Completion, FileHandle, Handle, Local, Op, OpId};

use crate::connection;
use crate::log::Limiter;
use crate::path::{self, Claim};
use crate::request::SERIAL;

/// Why a server cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A server listens at this path.
    #[error("{}: another server is listening on this socket; stop it, or choose another path", .0.display())]
    InUse(PathBuf),
    /// Something that is no socket is at this path.
    #[error("{}: this exists and is not a socket; remove it, or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The socket cannot be made.
    #[error("{}: the socket cannot be made: {source}", .path.display())]
    Bind {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An option has a value that it cannot have.
    #[error("{0}")]
    Option(&'static str),
}

/// How a disk is served.
#[derive(Clone, Debug)]
pub struct Options {
    /// Queues to offer, 1 to 256. They cost nothing until a front-end uses them.
    pub queues: u16,
    /// Serial number that the guest sees: up to 20 bytes, the disk's name where it is empty.
    pub serial: String,
    /// How long requests in flight may take when a queue stops.
    pub drain: Duration,
    /// A disk that cannot be opened when its device starts is tried again every half second for this long, and every
    /// five seconds after that.
    pub open_within: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            queues: 128,
            serial: String::new(),
            drain: Duration::from_secs(10),
            open_within: Duration::from_secs(30),
        }
    }
}

/// How a server is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// A front-end is connected.
    pub connected: bool,
    /// The device runs: the disk is open and its lease is held.
    pub started: bool,
    /// Features that the front-end has accepted, as virtio numbers them.
    pub features: u64,
    /// What went wrong last, until it goes right.
    pub error: Option<String>,
}

#[derive(Default)]
struct State {
    status: Status,
    /// When a stop has to be over, once one was asked for.
    stop_until: Option<Instant>,
    /// The connection, to wake its thread.
    socket: Option<UnixStream>,
    /// An accept is on the reactor.
    listening: bool,
    accept: Option<OpId>,
    failures: u32,
    limiter: Limiter,
    /// Queues of earlier connections that the storage has not let go of.
    abandoned: Vec<Receiver<u16>>,
}

impl State {
    /// Whether the storage holds requests of an earlier connection.
    fn is_held(&mut self) -> bool {
        self.abandoned.retain(|ended| ended.try_recv() == Err(TryRecvError::Empty));
        !self.abandoned.is_empty()
    }
}

pub(crate) struct Shared {
    disk: Arc<dyn Disk>,
    reactors: Vec<Handle>,
    options: Options,
    serial: [u8; SERIAL],
    listener: Arc<OwnedFd>,
    claim: Claim,
    /// Which reactor the first queue is on, so that many disks spread over all.
    first: usize,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    pub(crate) fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    pub(crate) fn name(&self) -> &str {
        self.disk.name()
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    pub(crate) fn serial(&self) -> [u8; SERIAL] {
        self.serial
    }

    /// The reactor that a queue runs on.
    pub(crate) fn reactor(&self, queue: usize) -> &Handle {
        &self.reactors[(self.first + queue) % self.reactors.len()]
    }

    pub(crate) fn stop_until(&self) -> Option<Instant> {
        self.state().stop_until
    }

    pub(crate) fn set_error(&self, error: Option<String>) {
        self.state().status.error = error;
    }

    /// Writes what went wrong to the log, as far as that is not flooded, and keeps it for who asks.
    pub(crate) fn complain(&self, message: &str) {
        let mut state = self.state();
        if state.limiter.allows(Instant::now()) {
            tracing::warn!("{}: {message}", self.name());
        }
        state.status.error = Some(message.to_owned());
    }

    /// The same for a request that the storage has failed.
    pub(crate) fn storage_error(&self, error: &vbd_core::Error) {
        let mut state = self.state();
        if state.limiter.allows(Instant::now()) {
            tracing::error!("{}: {error}", self.name());
        }
        state.status.error = Some(error.to_string());
    }

    /// A queue that could not be stopped says so when it has.
    pub(crate) fn abandon(&self, ended: Receiver<u16>) {
        self.state().abandoned.push(ended);
    }

    /// Opens the disk, once nothing of an earlier connection is in the storage any more: what it still holds would
    /// be done a second time, or land on top of what is newer.
    pub(crate) fn open(&self) -> vbd_core::Result<Arc<dyn Session>> {
        if self.state().is_held() {
            let message = "the storage still holds requests of an earlier connection";
            return Err(vbd_core::Error::new(ErrorKind::Busy, message));
        }
        self.disk.open()
    }

    pub(crate) fn set_started(&self, started: bool) {
        self.state().status.started = started;
    }

    pub(crate) fn set_features(&self, features: u64) {
        self.state().status.features = features;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next connection, on the reactor.
    fn listen(self: &Arc<Self>) {
        let shared = self.clone();
        self.state().listening = true;
        let posted = self.reactor(0).post(move |local| {
            let file = local.file(shared.listener.clone());
            Rc::new(Acceptor { shared, local: local.clone(), file }).accept();
        });
        if !posted {
            self.listens_no_more();
        }
    }

    fn listens_no_more(&self) {
        let mut state = self.state();
        (state.listening, state.accept) = (false, None);
        self.changed.notify_all();
    }

    /// Gives a connection a thread of its own.
    fn connect(self: &Arc<Self>, socket: UnixStream) -> io::Result<()> {
        let mut state = self.state();
        (state.listening, state.accept) = (false, None);
        if state.stop_until.is_some() {
            self.changed.notify_all();
            return Ok(());
        }
        state.socket = Some(socket.try_clone()?);
        let shared = self.clone();
        // Small, since there may be a thousand of them: the messages are short and the calls not deep.
        let thread = std::thread::Builder::new().name("vbd-vhost-user".into()).stack_size(256 << 10);
        thread.spawn(move || {
            let end = End(shared.clone());
            if let Err(error) = connection::serve(&shared, socket) {
                tracing::error!("{}: {error}", shared.name());
            }
            drop(end);
        })?;
        state.status.connected = true;
        state.failures = 0;
        Ok(())
    }
}

/// Puts the server back to waiting when a connection ends, however it ends.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.socket = None;
        let error = state.status.error.take();
        state.status = Status { error, ..Status::default() };
        self.0.changed.notify_all();
        let go_on = state.stop_until.is_none();
        drop(state);
        if go_on {
            self.0.listen();
        }
    }
}

/// Takes the next connection, and only that: others wait in the socket's queue until it ends.
struct Acceptor {
    shared: Arc<Shared>,
    local: Local,
    file: FileHandle,
}

const AGAIN: u64 = 1;

impl Acceptor {
    fn accept(self: Rc<Self>) {
        let (local, file, shared) = (self.local.clone(), self.file.clone(), self.shared.clone());
        let mut state = shared.state();
        if state.stop_until.is_some() {
            drop(state);
            return shared.listens_no_more();
        }
        // SAFETY: an accept has no pointers.
        state.accept = Some(unsafe { local.submit(&file, &Op::Accept, self, 0) });
    }
}

impl Completion for Acceptor {
    fn complete(self: Rc<Self>, token: u64, result: i32) {
        if token == AGAIN {
            return self.accept();
        }
        if result == -libc::ECANCELED {
            return self.shared.listens_no_more();
        }
        let error = if result < 0 {
            io::Error::from_raw_os_error(-result)
        } else {
            // SAFETY: a new descriptor, which the sink owns.
            let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(result) });
            match self.shared.connect(socket) {
                Ok(()) => return,
                Err(error) => error,
            }
        };
        // Out of descriptors or threads: others may give some back.
        let mut state = self.shared.state();
        (state.listening, state.socket) = (true, None);
        state.failures += 1;
        if state.failures == 1 {
            tracing::error!("{}: a connection cannot be taken: {error}", self.shared.name());
        }
        drop(state);
        let at = Instant::now() + Duration::from_secs(1);
        self.local.clone().timer(at, self, AGAIN);
    }
}

/// A disk served at a socket, to one front-end at a time. Dropping it stops it.
pub struct Server {
    shared: Arc<Shared>,
}

impl Server {
    /// Serves `disk` at `path`, its queues spread over `reactors`. The disk is opened when a front-end starts the
    /// device, not before.
    ///
    /// # Errors
    /// Somebody listens at the path, or it cannot be used; an option is out of range; there is no reactor.
    pub fn bind(
        path: impl AsRef<Path>,
        disk: Arc<dyn Disk>,
        reactors: Vec<Handle>,
        options: Options,
    ) -> Result<Self, Error> {
        if !(1..=256).contains(&options.queues) {
            return Err(Error::Option("queues: 1 to 256 can be offered"));
        }
        if options.serial.len() > SERIAL {
            return Err(Error::Option("serial: at most 20 bytes are possible"));
        }
        if reactors.is_empty() {
            return Err(Error::Option("reactors: at least one is needed"));
        }
        let (listener, claim) = path::bind(path.as_ref())?;
        let shared = Arc::new(Shared {
            serial: serial(if options.serial.is_empty() { disk.name() } else { &options.serial }),
            first: spread(claim.path()),
            disk,
            reactors,
            options,
            listener: Arc::new(listener.into()),
            claim,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        shared.listen();
        Ok(Server { shared })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        self.shared.claim.path()
    }

    /// How it is doing.
    pub fn status(&self) -> Status {
        self.shared.state().status.clone()
    }

    /// Stops: takes nothing more, finishes what was taken, flushes, releases the disk and removes the socket. What is
    /// not done within the bound is left in the in-flight region, for the next server. False if the storage holds
    /// requests even then.
    pub fn stop(self, within: Duration) -> bool {
        self.end(within)
    }

    fn end(&self, within: Duration) -> bool {
        let shared = &self.shared;
        shared.claim.remove();
        let mut state = shared.state();
        let until = *state.stop_until.get_or_insert(Instant::now() + within);
        if let Some(socket) = &state.socket {
            // The thread sees the end of the stream, once it is through with what it does.
            let _ = socket.shutdown(std::net::Shutdown::Read);
        }
        if let Some(id) = state.accept {
            shared.reactor(0).post(move |local| local.cancel(id));
        }
        // A little more, for what the thread does after its own bound.
        let until = until + Duration::from_secs(2);
        while state.status.connected || state.listening {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        !state.is_held()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end(self.shared.options.drain);
    }
}

/// The serial number's bytes, cut at 20.
fn serial(text: &str) -> [u8; SERIAL] {
    let mut bytes = [0; SERIAL];
    bytes.iter_mut().zip(text.bytes()).for_each(|(to, byte)| *to = byte);
    bytes
}

/// A number that differs between paths.
fn spread(path: &Path) -> usize {
    let bytes = path.as_os_str().as_encoded_bytes();
    bytes.iter().fold(0, |sum, byte| sum.wrapping_mul(31).wrapping_add(usize::from(*byte)))
}
