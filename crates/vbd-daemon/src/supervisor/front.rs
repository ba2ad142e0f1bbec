//! The front-ends, as the supervisor uses them.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vbd_core::Disk;

use crate::config::{self, DiskConfig, Limits, NbdAddress, NbdConfig};
use crate::control::FrontEndInfo;
use crate::service::{Listener, is_running};
use crate::{Fault, FaultKind};

use super::reactors::Reactors;

/// How long the sockets of a process that was killed may stay alive: the kernel takes its rings down after its end.
const LETTING_GO: Duration = Duration::from_secs(5);
/// How often it is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// Binds a socket, once more where the one that is there answers for a process that has ended already.
fn bind_patiently<T, E>(
    socket: &Path,
    is_alive: impl Fn(&E) -> bool,
    bind: impl Fn() -> Result<T, E>,
) -> Result<T, E> {
    let deadline = Instant::now() + LETTING_GO;
    loop {
        match bind() {
            Err(error) if is_alive(&error) && is_of_a_dead_process(socket) && Instant::now() < deadline => {
                std::thread::sleep(TRY_AGAIN);
            }
            other => return other,
        }
    }
}

/// Whether the process that listens on a socket has ended. One of another machine or namespace has not, as far as can
/// be told.
fn is_of_a_dead_process(socket: &Path) -> bool {
    let Ok(peer) = UnixStream::connect(socket).map(|stream| rustix::net::sockopt::socket_peercred(&stream))
    else {
        // Dead by now, most likely.
        return true;
    };
    let Ok(peer) = peer else { return false };
    u32::try_from(peer.pid.as_raw_nonzero().get()).is_ok_and(|pid| !is_running(pid))
}

/// The vhost-user socket of one disk, until it is stopped.
pub(super) struct VhostUser(Mutex<Option<vbd_vhost_user::Server>>);

impl VhostUser {
    pub(super) fn bind(
        socket: &Path,
        config: &DiskConfig,
        disk: Arc<dyn Disk>,
        reactors: &Reactors,
        limits: Limits,
        drain: Duration,
    ) -> Result<Self, Fault> {
        let options = vbd_vhost_user::Options {
            queues: config.queues.unwrap_or(limits.max_queues).min(limits.max_queues),
            serial: config.serial.clone(),
            drain,
            ..vbd_vhost_user::Options::default()
        };
        use vbd_vhost_user::{Error, Server};
        let bind = || Server::bind(socket, disk.clone(), reactors.handles(), options.clone());
        let server = bind_patiently(socket, |error| matches!(error, Error::InUse(_)), bind);
        let server = server.map_err(|error| {
            let kind = match error {
                Error::InUse(_) | Error::NotASocket(_) => FaultKind::Exists,
                Error::Option(_) => FaultKind::Invalid,
                _ => FaultKind::Failed,
            };
            Fault::new(kind, format!("{}: {error}", config.name))
        })?;
        Ok(VhostUser(Mutex::new(Some(server))))
    }

    /// None where it was stopped.
    pub(super) fn info(&self) -> Option<FrontEndInfo> {
        let server = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let server = server.as_ref()?;
        let status = server.status();
        Some(FrontEndInfo {
            kind: "vhost-user".to_owned(),
            address: absolute(server.path()),
            export: None,
            clients: status.connected.into(),
            problem: status.error,
        })
    }

    pub(super) fn stop(&self, within: Duration) -> Result<(), Fault> {
        let server = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(server) = server else { return Ok(()) };
        let path = absolute(server.path());
        if server.stop(within) {
            return Ok(());
        }
        Err(Fault::new(
            FaultKind::Failed,
            format!("{path}: the storage still holds requests; they are the guest's to send again"),
        ))
    }
}

/// The block device of one disk, until it is stopped.
pub(super) struct Ublk(Mutex<Option<vbd_ublk::Device>>);

impl Ublk {
    pub(super) fn start(
        ublk: config::Ublk,
        config: &DiskConfig,
        disk: &Arc<dyn Disk>,
        reactors: &Reactors,
        limits: Limits,
    ) -> Result<Self, Fault> {
        let failed =
            |kind, error: &dyn std::fmt::Display| Fault::new(kind, format!("{}: {error}", config.name));
        let identity = identity(&config.path).map_err(|error| failed(FaultKind::Failed, &error))?;
        let reactors = reactors.handles();
        // More than there are threads to serve them would only take memory.
        let most = u16::try_from(reactors.len()).unwrap_or(u16::MAX).min(limits.max_queues);
        let options = vbd_ublk::Options {
            number: ublk.number(),
            queues: config.queues.map_or(most, |queues| queues.min(limits.max_queues)),
            identity,
            ..vbd_ublk::Options::default()
        };
        let device = vbd_ublk::Device::start(disk, &reactors, &options).map_err(|error| {
            use vbd_ublk::Error;
            let kind = match &error {
                Error::InUse { .. } | Error::Foreign { .. } => FaultKind::Exists,
                Error::Option(_) => FaultKind::Invalid,
                Error::Disk(error) if error.kind() == vbd_core::ErrorKind::Busy => FaultKind::Busy,
                _ => FaultKind::Failed,
            };
            failed(kind, &error)
        })?;
        Ok(Ublk(Mutex::new(Some(device))))
    }

    /// None where it was stopped.
    pub(super) fn info(&self) -> Option<FrontEndInfo> {
        let device = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let status = device.as_ref()?.status();
        Some(FrontEndInfo {
            kind: "ublk".to_owned(),
            address: status.path.display().to_string(),
            export: None,
            clients: status.used.into(),
            problem: status.problem,
        })
    }

    pub(super) fn stop(&self, how: vbd_ublk::Ending, within: Duration) -> Result<(), Fault> {
        let device = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(device) = device else { return Ok(()) };
        device.stop(how, within).map_err(|error| Fault::new(FaultKind::Failed, error.to_string()))
    }
}

/// A number that tells files and block devices of this machine apart until it is started anew (FNV-1a).
fn identity(path: &Path) -> std::io::Result<u64> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let metadata = path.metadata()?;
    let numbers = match metadata.file_type().is_block_device() {
        true => [1, metadata.rdev(), 0],
        false => [0, metadata.dev(), metadata.ino()],
    };
    let bytes = numbers.iter().flat_map(|number| number.to_le_bytes());
    Ok(bytes
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)))
}

/// The NBD servers of the process, each of which exports every disk that has an export's name.
pub(super) struct Exports {
    /// How many servers were asked for: where some are missing that was said already.
    wanted: usize,
    servers: Vec<vbd_nbd::Server>,
}

/// How many clients each export has, by server and name.
pub(super) struct Clients(Vec<(String, HashMap<String, usize>)>);

impl Clients {
    /// The ways to one export.
    pub(super) fn of<'a>(&'a self, export: &'a str) -> impl Iterator<Item = FrontEndInfo> + 'a {
        self.0.iter().map(move |(address, clients)| FrontEndInfo {
            kind: "nbd".to_owned(),
            address: address.clone(),
            export: Some(export.to_owned()),
            clients: clients.get(export).copied().unwrap_or(0),
            problem: None,
        })
    }
}

impl Exports {
    /// Listens everywhere; what goes wrong is added to the faults.
    pub(super) fn bind(
        config: Option<NbdConfig>,
        passed: Vec<Listener>,
        reactors: &Reactors,
        faults: &mut Vec<Fault>,
    ) -> Self {
        let mut options = vbd_nbd::Options::default();
        let mut listen = Vec::new();
        if let Some(config) = config {
            options.max_clients = config.max_clients;
            options.memory = usize::try_from(config.memory).unwrap_or(usize::MAX);
            options.memory_per_client = options.memory_per_client.min(options.memory);
            options.tls = config.tls.map(|tls| vbd_nbd::TlsOptions {
                certificate: tls.certificate,
                key: tls.key,
                client_ca: tls.client_ca,
                required: tls.required,
            });
            listen.extend(config.listen.into_iter().map(|address| match address {
                NbdAddress::Unix(path) => vbd_nbd::Listen::Unix(path),
                address @ NbdAddress::Tcp { .. } => vbd_nbd::Listen::Tcp(address.to_string()),
            }));
        }
        listen.extend(passed.into_iter().map(|listener| vbd_nbd::Listen::Fd(listener.into())));
        let wanted = listen.len();
        let mut servers = Vec::new();
        for listen in listen {
            match Self::listen(listen, &options, reactors) {
                Ok(server) => servers.push(server),
                Err(error) => faults.push(fault(error)),
            }
        }
        Exports { wanted, servers }
    }

    fn listen(
        listen: vbd_nbd::Listen,
        options: &vbd_nbd::Options,
        reactors: &Reactors,
    ) -> Result<vbd_nbd::Server, vbd_nbd::Error> {
        let bind = |listen| vbd_nbd::Server::bind(listen, options.clone(), reactors.handles());
        let vbd_nbd::Listen::Unix(path) = listen else { return bind(listen) };
        let is_alive = |error: &_| matches!(error, vbd_nbd::Error::Alive { .. });
        bind_patiently(&path, is_alive, || bind(vbd_nbd::Listen::Unix(path.clone())))
    }

    /// Exports a disk on every server, or on none.
    pub(super) fn add(&self, name: &str, disk: &Arc<dyn Disk>, read_only: bool) -> Result<(), Fault> {
        if self.wanted == 0 {
            let message =
                format!("`{name}` cannot be exported: no NBD server runs here, name an address for one");
            return Err(Fault::new(FaultKind::Invalid, message));
        }
        for (index, server) in self.servers.iter().enumerate() {
            let options = vbd_nbd::ExportOptions { read_only, description: String::new() };
            if let Err(error) = server.add_export(name, disk.clone(), options) {
                for server in &self.servers[..index] {
                    // It was added a moment ago.
                    let _ = server.remove_export(name, Duration::ZERO);
                }
                return Err(fault(error));
            }
        }
        Ok(())
    }

    /// Ends an export: its clients finish what they have sent.
    pub(super) fn remove(&self, name: &str, within: Duration) -> Result<(), Fault> {
        let deadline = Instant::now() + within;
        let removed = self.servers.iter().map(|server| {
            let left = deadline.saturating_duration_since(Instant::now());
            server.remove_export(name, left).map_err(fault)
        });
        let late: usize = removed.sum::<Result<_, _>>()?;
        late_clients(name, late).map_or(Ok(()), Err)
    }

    pub(super) fn clients(&self) -> Clients {
        let of = |server: &vbd_nbd::Server| {
            let status = server.status();
            let exports = status.exports.into_iter().map(|export| (export.name, export.clients));
            let address = match status.address.strip_prefix("unix:") {
                Some(path) => format!("unix:{}", absolute(Path::new(path))),
                None => status.address,
            };
            (address, exports.collect())
        };
        Clients(self.servers.iter().map(of).collect())
    }

    /// Ends all servers; gives what did not go cleanly.
    pub(super) fn stop(&self, within: Duration) -> Vec<Fault> {
        let deadline = Instant::now() + within;
        let stop = |server: &vbd_nbd::Server| {
            let late = server.stop(deadline.saturating_duration_since(Instant::now()));
            late_clients(server.address(), late)
        };
        self.servers.iter().filter_map(stop).collect()
    }
}

fn late_clients(place: &str, late: usize) -> Option<Fault> {
    let message =
        || format!("{place}: {late} NBD clients had requests in work when the time was up, and were cut off");
    (late > 0).then(|| Fault::new(FaultKind::Failed, message()))
}

fn fault(error: vbd_nbd::Error) -> Fault {
    use vbd_nbd::Error;
    let kind = match error {
        Error::Taken { .. } | Error::Alive { .. } | Error::NotASocket { .. } => FaultKind::Exists,
        Error::Name { .. } => FaultKind::Invalid,
        _ => FaultKind::Failed,
    };
    Fault::new(kind, error.to_string())
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}
