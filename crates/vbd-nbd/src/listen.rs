//! Where clients come in.

use std::fmt;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::sockopt;

use crate::{Error, Result};

/// Where to listen.
#[derive(Debug)]
pub enum Listen {
    /// A unix socket, made at this path with the rights that the umask leaves. A dead one that is there is replaced,
    /// and it is removed when the server stops.
    Unix(PathBuf),
    /// `HOST:PORT`, an IPv6 address in brackets; port 0 takes any that is free.
    Tcp(String),
    /// A socket that listens already: systemd's socket activation.
    Fd(OwnedFd),
}

/// A socket that listens.
pub(crate) struct Listener {
    pub(crate) socket: OwnedFd,
    pub(crate) address: String,
    /// The socket's path with device and inode: what is to be removed, if it is still there.
    path: Option<(PathBuf, (u64, u64))>,
}

impl Listen {
    pub(crate) fn open(self) -> Result<Listener> {
        let named = self.to_string();
        let failed = |source: io::Error| Error::Listen { address: named.clone(), source };
        let (socket, path): (OwnedFd, _) = match self {
            Listen::Fd(socket) => (socket, None),
            Listen::Tcp(address) => (TcpListener::bind(address).map_err(failed)?.into(), None),
            Listen::Unix(path) => {
                make_way(&path)?;
                let socket = UnixListener::bind(&path).map_err(failed)?;
                let identity = identity(&path).map_err(failed)?;
                (socket.into(), Some((path, identity)))
            }
        };
        let address = match &path {
            Some((path, _)) => format!("unix:{}", path.display()),
            None => local_address(socket.as_fd()),
        };
        // The ring waits until somebody comes; accepting must not wait for one who has left again.
        rustix::io::ioctl_fionbio(&socket, true).map_err(|error| failed(error.into()))?;
        Ok(Listener { socket, address, path })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
            Listen::Tcp(address) => f.write_str(address),
            Listen::Fd(_) => f.write_str("the socket that was passed in"),
        }
    }
}

impl Listener {
    /// Where the socket's file is, to be removed when the server stops.
    pub(crate) fn leftover(&self) -> Leftover {
        Leftover(self.path.clone())
    }
}

/// A socket's file, which is removed when this is dropped, unless another took its place.
#[derive(Debug)]
pub(crate) struct Leftover(Option<(PathBuf, (u64, u64))>);

impl Drop for Leftover {
    fn drop(&mut self) {
        if let Some((path, known)) = self.0.take()
            && identity(&path).is_ok_and(|found| found == known)
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = std::fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// Removes a socket at `path` that nobody listens on; refuses anything else that is there.
fn make_way(path: &Path) -> Result<()> {
    let Ok(found) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Err(Error::NotASocket { path: path.to_owned() });
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            let failed = |source| Error::Listen { address: format!("unix:{}", path.display()), source };
            std::fs::remove_file(path).map_err(failed)
        }
        _ => Err(Error::Alive { path: path.to_owned() }),
    }
}

fn local_address(socket: BorrowedFd<'_>) -> String {
    let owned = socket.try_clone_to_owned();
    let address = owned.map(TcpListener::from).and_then(|listener| listener.local_addr());
    match address {
        Ok(address) => address.to_string(),
        Err(_) => "a socket that was passed in".to_owned(),
    }
}

/// Prepares a client's socket, and says who is at its other end.
pub(crate) fn prepare(socket: &OwnedFd) -> String {
    if let Ok(peer) = socket.try_clone().map(TcpStream::from).and_then(|stream| stream.peer_addr()) {
        // Replies are sent whole; there is nothing to collect them for. Peers that vanish are found out.
        let _ = sockopt::set_tcp_nodelay(socket, true);
        let _ = sockopt::set_socket_keepalive(socket, true);
        return peer.to_string();
    }
    // Less going back and forth with long replies.
    let _ = sockopt::set_socket_send_buffer_size(socket, 1 << 20);
    match sockopt::socket_peercred(socket) {
        Ok(peer) => format!("process {} of user {}", peer.pid.as_raw_nonzero(), peer.uid.as_raw()),
        Err(_) => "unknown".to_owned(),
    }
}
