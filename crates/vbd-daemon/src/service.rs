//! What a service manager and the kernel give a process: sockets, a place to report to, descriptors.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;

/// A socket that somebody else listens on for us.
pub enum Listener {
    /// A unix socket.
    Unix(UnixListener),
    /// A TCP socket.
    Tcp(TcpListener),
}

impl From<Listener> for OwnedFd {
    fn from(listener: Listener) -> Self {
        match listener {
            Listener::Unix(listener) => listener.into(),
            Listener::Tcp(listener) => listener.into(),
        }
    }
}

/// The listening sockets that a service manager passed (sd_listen_fds(3)), in order. They are NBD's. To be called once,
/// early: it takes the variables out of the environment.
///
/// # Errors
/// One of them is no listening stream socket; the text says which.
pub fn passed_listeners() -> Result<Vec<Listener>, String> {
    let mut passed = listenfd::ListenFd::from_env();
    (0..passed.len())
        .map(|index| {
            if let Ok(Some(listener)) = passed.take_unix_listener(index) {
                return Ok(Listener::Unix(listener));
            }
            match passed.take_tcp_listener(index) {
                Ok(Some(listener)) => Ok(Listener::Tcp(listener)),
                Ok(None) => Err(format!("descriptor {} is passed twice", index + 3)),
                Err(error) => Err(format!(
                    "descriptor {} of those that the service manager passed ($LISTEN_FDS) is no listening stream \
                     socket: {error}",
                    index + 3
                )),
            }
        })
        .collect()
}

/// Tells the service manager, if there is one.
pub(crate) fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("the service manager cannot be told: {error}");
    }
}

/// Allows as many open files as this process may have: a disk takes several, and the default of 1024 is soon used up.
pub(crate) fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!("the limit of open files stays at {:?}: {error}", limit.current);
    }
}
