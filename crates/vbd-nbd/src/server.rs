//! The server: exports by name, clients, and their limits.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use rustls::{ServerConfig, ServerConnection};
use vbd_core::Disk;
use vbd_ring::{FileHandle, Handle, Local, Op};

use crate::connection::Connection;
use crate::control::{Control, Order};
use crate::export::{Export, ExportOptions};
use crate::listen::{Leftover, Listen, prepare};
use crate::memory::Total;
use crate::negotiation::{Catalogue, TlsMode};
use crate::protocol::{MAX_PAYLOAD, MAX_STRING};
use crate::tls::TlsOptions;
use crate::{Error, Result};

/// How a server serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Encryption; none where absent.
    pub tls: Option<TlsOptions>,
    /// The most clients connected at once; others are turned away.
    pub max_clients: usize,
    /// The most memory, in bytes, that requests in flight of all clients take, beyond 1 MiB that each may have in any
    /// case. At least 32 MiB, the longest request.
    pub memory: usize,
    /// The same for one client.
    pub memory_per_client: usize,
    /// The longest time from connecting to choosing an export.
    pub handshake: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            tls: None,
            max_clients: 128,
            memory: 256 << 20,
            memory_per_client: 64 << 20,
            handshake: Duration::from_secs(30),
        }
    }
}

/// What a server is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Where it listens: `unix:PATH` or `HOST:PORT`.
    pub address: String,
    /// Who is connected.
    pub clients: Vec<ClientStatus>,
    /// What can be asked for.
    pub exports: Vec<ExportStatus>,
    /// Memory of requests in flight beyond what each client has in any case, in bytes.
    pub memory: usize,
}

/// A client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientStatus {
    /// `ADDRESS:PORT`, or the process at the other end of a unix socket.
    pub peer: String,
    /// The export it has chosen.
    pub export: Option<String>,
    /// Its connection is encrypted.
    pub tls: bool,
}

/// An export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// Its description.
    pub description: String,
    /// Whether writes are refused although the disk may take them.
    pub read_only: bool,
    /// How many clients have chosen it.
    pub clients: usize,
}

struct Client {
    control: Arc<Control>,
    status: ClientStatus,
}

/// What the connections of a server share.
pub(crate) struct Shared {
    options: Options,
    tls: Option<Arc<ServerConfig>>,
    exports: Mutex<BTreeMap<String, Arc<Export>>>,
    clients: Mutex<HashMap<u64, Client>>,
    /// A client has left.
    left: Condvar,
    next: AtomicU64,
    total: Arc<Total>,
    stopping: AtomicBool,
}

/// A listening NBD server. Dropping it cuts its clients off without waiting for them; [`stop`](Self::stop) lets them
/// finish.
pub struct Server {
    shared: Arc<Shared>,
    address: String,
    listening: Arc<Control>,
    leftover: Mutex<Option<Leftover>>,
}

impl Server {
    /// Starts listening. Clients are served by `reactors` in turn, which must outlive the server.
    ///
    /// # Errors
    /// The address cannot be listened on, certificates cannot be read, or there is no reactor.
    pub fn bind(listen: Listen, options: Options, reactors: Vec<Handle>) -> Result<Server> {
        let tls = options.tls.as_ref().map(TlsOptions::load).transpose()?;
        let listener = listen.open()?;
        let first = reactors.first().ok_or(Error::NoReactor)?.clone();
        let shared = Arc::new(Shared {
            total: Total::new(options.memory.max(MAX_PAYLOAD as usize)),
            options,
            tls,
            exports: Mutex::default(),
            clients: Mutex::default(),
            left: Condvar::new(),
            next: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        });
        let listening = Arc::new(Control::default());
        let server = Server {
            shared: shared.clone(),
            address: listener.address.clone(),
            listening: listening.clone(),
            leftover: Mutex::new(Some(listener.leftover())),
        };
        let address = listener.address.clone();
        let started = first.post(move |local| {
            let socket = local.file(Arc::new(listener.socket));
            local.spawn(accept_all(local.clone(), socket, shared, listening, reactors));
        });
        if !started {
            return Err(Error::NoReactor);
        }
        tracing::info!("NBD on {address}");
        Ok(server)
    }

    /// Where the server listens: `unix:PATH` or `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Makes a disk known under a name. It is opened when a client chooses it, and closed when the last has left.
    ///
    /// # Errors
    /// The name is taken or cannot be one.
    pub fn add_export(&self, name: &str, disk: Arc<dyn Disk>, options: ExportOptions) -> Result<()> {
        if name.is_empty() || name.len() > MAX_STRING || name.contains('\0') {
            return Err(Error::Name { name: name.to_owned() });
        }
        let mut exports = self.shared.exports();
        if exports.contains_key(name) {
            return Err(Error::Taken { name: name.to_owned() });
        }
        exports.insert(name.to_owned(), Export::new(disk, options));
        Ok(())
    }

    /// Forgets an export. Its clients finish what they have sent, at most `within` this time, and are disconnected.
    /// Says how many had to be cut off. Blocks; not to be called on a reactor.
    ///
    /// # Errors
    /// There is no such export.
    pub fn remove_export(&self, name: &str, within: Duration) -> Result<usize> {
        if self.shared.exports().remove(name).is_none() {
            return Err(Error::NoExport { name: name.to_owned() });
        }
        Ok(self.shared.end(within, |client| client.status.export.as_deref() == Some(name)))
    }

    /// What the server is doing.
    pub fn status(&self) -> Status {
        let mut clients: Vec<_> =
            self.shared.clients().iter().map(|(number, client)| (*number, client.status.clone())).collect();
        clients.sort_by_key(|(number, _)| *number);
        let clients: Vec<_> = clients.into_iter().map(|(_, status)| status).collect();
        let exports = self.shared.exports();
        let exports = exports.iter().map(|(name, export)| ExportStatus {
            name: name.clone(),
            description: export.description.clone(),
            read_only: export.read_only,
            clients: clients.iter().filter(|client| client.export.as_ref() == Some(name)).count(),
        });
        let exports = exports.collect();
        Status { address: self.address.clone(), clients, exports, memory: self.shared.total.used() }
    }

    /// Stops: nobody new is let in, clients finish what they have sent, their disks are flushed and released. Whoever
    /// takes longer than `within` is cut off; says how many were. Blocks; not to be called on a reactor.
    pub fn stop(&self, within: Duration) -> usize {
        self.refuse_new();
        self.shared.end(within, |_| true)
    }

    fn refuse_new(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.listening.order(Order::End);
        drop(self.leftover.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.refuse_new();
        self.shared.order(Order::End, &|_| true);
    }
}

impl Shared {
    fn exports(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Export>>> {
        self.exports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<u64, Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn tls_mode(&self) -> TlsMode {
        match &self.options.tls {
            None => TlsMode::Off,
            Some(tls) if tls.required => TlsMode::Required,
            Some(_) => TlsMode::Offered,
        }
    }

    pub(crate) fn tls_session(&self) -> Option<ServerConnection> {
        ServerConnection::new(self.tls.clone()?).ok()
    }

    pub(crate) fn handshake(&self) -> Duration {
        self.options.handshake
    }

    pub(crate) fn memory(&self) -> (Arc<Total>, usize) {
        (self.total.clone(), self.options.memory_per_client)
    }

    /// The export with this name; with a client's number, that client has chosen it.
    pub(crate) fn export(&self, name: &str, client: Option<u64>) -> Option<Arc<Export>> {
        // Noted before it is looked up, so that whoever removes the export finds the client.
        if let Some(number) = client
            && let Some(client) = self.clients().get_mut(&number)
        {
            client.status.export = Some(name.to_owned());
        }
        self.exports().get(name).cloned()
    }

    pub(crate) fn is_encrypted(&self, number: u64) {
        if let Some(client) = self.clients().get_mut(&number) {
            client.status.tls = true;
        }
    }

    /// A client is no more.
    pub(crate) fn left(&self, number: u64) {
        self.clients().remove(&number);
        self.left.notify_all();
    }

    fn order(&self, order: Order, chosen: &dyn Fn(&Client) -> bool) -> usize {
        let clients = self.clients();
        let chosen = clients.values().filter(|client| chosen(client));
        chosen.map(|client| client.control.order(order)).count()
    }

    /// Lets the chosen clients finish, then cuts off those who have not: how many.
    fn end(&self, within: Duration, chosen: impl Fn(&Client) -> bool) -> usize {
        self.order(Order::Finish, &chosen);
        let gone = |clients: &mut HashMap<u64, Client>| clients.values().any(&chosen);
        let wait = |time| {
            let waited = self.left.wait_timeout_while(self.clients(), time, gone);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        };
        wait(within);
        let late = self.order(Order::End, &chosen);
        // What the storage has in hand still comes back; then the disk is released.
        wait(Duration::from_secs(1));
        late
    }

    /// Takes a client on, unless there are too many.
    fn admit(&self, peer: String) -> Option<(u64, Arc<Control>)> {
        let mut clients = self.clients();
        if clients.len() >= self.options.max_clients || self.stopping.load(Ordering::SeqCst) {
            return None;
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let control = Arc::new(Control::default());
        let status = ClientStatus { peer, export: None, tls: false };
        clients.insert(number, Client { control: control.clone(), status });
        Some((number, control))
    }
}

impl Catalogue for Shared {
    fn list(&self) -> Vec<(String, String)> {
        let exports = self.exports();
        exports.iter().map(|(name, export)| (name.clone(), export.description.clone())).collect()
    }

    fn find(&self, name: &str) -> Option<(String, String)> {
        let exports = self.exports();
        let found = match name {
            // The default is the only one.
            "" if exports.len() == 1 => exports.iter().next(),
            name => exports.get_key_value(name),
        };
        found.map(|(name, export)| (name.clone(), export.description.clone()))
    }

    fn bitmaps(&self, name: &str) -> Vec<String> {
        let track = self.exports().get(name).and_then(|export| export.disk.track());
        let named = track.map(|track| track.named()).unwrap_or_default();
        named.into_iter().map(|bitmap| bitmap.name).collect()
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}

/// Lets clients in until told otherwise.
async fn accept_all(
    local: Local,
    socket: FileHandle,
    shared: Arc<Shared>,
    listening: Arc<Control>,
    reactors: Vec<Handle>,
) {
    let mut turn = reactors.iter().cycle();
    let mut full = false;
    loop {
        // One at a time, so that a crowd at the door does not keep the reactor from those inside.
        let events = libc::POLLIN;
        // SAFETY: a poll has no pointers.
        let ready = unsafe { local.perform(&socket, &Op::Poll { events }, ()) };
        if !unless_ordered(ready, &listening).await {
            return;
        }
        let client = match accept(&socket) {
            Ok(Some(client)) => client,
            Ok(None) => continue,
            Err(error) => {
                // No descriptors or memory: they may come back.
                tracing::warn!("cannot let an NBD client in: {error}");
                if !unless_ordered(local.sleep(Duration::from_millis(200)), &listening).await {
                    return;
                }
                continue;
            }
        };
        let Some((number, control)) = shared.admit(prepare(&client)) else {
            if !std::mem::replace(&mut full, true) {
                tracing::warn!(
                    "{} NBD clients are connected; others are turned away",
                    shared.options.max_clients
                );
            }
            continue;
        };
        full = false;
        let (server, next) = (shared.clone(), turn.next());
        let start = move |local: &Local| Connection::start(local, client, server, control, number);
        if !next.is_some_and(|reactor| reactor.post(start)) {
            shared.left(number);
        }
    }
}

/// Awaits `work` unless an order comes first; then false.
async fn unless_ordered<T>(work: impl Future<Output = T>, control: &Control) -> bool {
    let (mut work, mut changed) = (pin!(work), pin!(control.changed()));
    std::future::poll_fn(|context| match changed.as_mut().poll(context) {
        Poll::Ready(_) => Poll::Ready(false),
        Poll::Pending => work.as_mut().poll(context).map(|_| true),
    })
    .await
}

/// accept4(2) that does not wait: none where nobody is there.
fn accept(socket: &FileHandle) -> std::io::Result<Option<OwnedFd>> {
    use rustix::io::Errno;
    loop {
        match rustix::net::accept_with(socket.as_fd(), rustix::net::SocketFlags::CLOEXEC) {
            Ok(client) => return Ok(Some(client)),
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
