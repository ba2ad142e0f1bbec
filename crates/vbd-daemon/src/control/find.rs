//! Finding the processes that serve.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, test_kill_process};

/// The control socket of a process, in a runtime directory.
pub fn socket_of(runtime_dir: &Path, pid: u32) -> PathBuf {
    runtime_dir.join(format!("control-{pid}.sock"))
}

/// The control sockets in a runtime directory that somebody answers on, by process number. Those that dead processes
/// left behind are removed.
///
/// # Errors
/// The directory cannot be read. One that is not there has no sockets.
pub fn sockets(runtime_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(runtime_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let pid =
            name.to_str().and_then(|name| name.strip_prefix("control-")?.strip_suffix(".sock")?.parse().ok());
        let Some(pid) = pid.and_then(Pid::from_raw) else { continue };
        if !entry.file_type().is_ok_and(|kind| kind.is_socket()) {
            continue;
        }
        let path = entry.path();
        match UnixStream::connect(&path) {
            Ok(_) => found.push((pid.as_raw_nonzero(), path)),
            // A process that is there may be about to listen.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && is_gone(pid) => {
                if let Err(error) = fs::remove_file(&path) {
                    tracing::debug!("{}: the stale socket stays: {error}", path.display());
                }
            }
            Err(error) => tracing::debug!("{}: {error}", path.display()),
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

fn is_gone(pid: Pid) -> bool {
    test_kill_process(pid) == Err(rustix::io::Errno::SRCH)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_living_are_found_and_the_dead_removed() {
        let dir = tempfile::tempdir().unwrap();
        let alive = socket_of(dir.path(), std::process::id());
        let _listener = UnixListener::bind(&alive).unwrap();
        // No process has the largest number there can be.
        let dead = socket_of(dir.path(), i32::MAX.cast_unsigned());
        drop(UnixListener::bind(&dead).unwrap());
        let other = dir.path().join("vm1.sock");
        drop(UnixListener::bind(&other).unwrap());
        fs::write(dir.path().join("control-1.sock"), "a file").unwrap();

        assert_eq!(sockets(dir.path()).unwrap(), [alive]);
        assert!(!dead.exists());
        assert!(other.exists() && dir.path().join("control-1.sock").exists());
    }

    #[test]
    fn no_directory_means_no_sockets() {
        let dir = tempfile::tempdir().unwrap();
        assert!(sockets(&dir.path().join("none")).unwrap().is_empty());
    }
}
