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

/// The signals that this process ignores: bit 0 is signal 1 (proc_pid_status(5)). None where that cannot be told.
pub(crate) fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Whether this process is there and has not ended (proc_pid_stat(5)).
pub(crate) fn is_running(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The state stands behind the name, which may have parentheses in it. Z and X have ended.
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

#[cfg(test)]
mod tests {
    use super::is_running;

    #[test]
    fn a_process_runs_until_it_ends() {
        assert!(is_running(std::process::id()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        // Not waited for: it stays as a zombie.
        while is_running(child.id()) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!is_running(u32::MAX));
    }
}
