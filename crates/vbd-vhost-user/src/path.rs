//! The socket's place in the filesystem: never taken from a server that lives, always from one that is dead.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::Error;

/// A socket's path while it is ours.
pub(crate) struct Claim {
    path: PathBuf,
    identity: (u64, u64),
}

/// Listens at `path`, replacing what a dead server has left there.
///
/// # Errors
/// Somebody listens there, or something else is there, or there is no permission.
pub(crate) fn bind(path: &Path) -> Result<(UnixListener, Claim), Error> {
    let failed = |source| Error::Bind { path: path.to_owned(), source };
    // Two servers that start at once must not both find the place free. The lock ends with the descriptor.
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = File::open(parent).map_err(failed)?;
    rustix::fs::flock(&directory, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|error| failed(error.into()))?;

    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(Error::NotASocket(path.to_owned())),
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            // Connected, or its queue is full: somebody is there.
            _ => return Err(Error::InUse(path.to_owned())),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let made = std::fs::symlink_metadata(path).map_err(failed)?;
    let identity = (made.dev(), made.ino());
    Ok((listener, Claim { path: path.to_owned(), identity }))
}

impl Claim {
    /// Removes the socket, unless something else has taken its place.
    pub(crate) fn remove(&self) {
        let found = std::fs::symlink_metadata(&self.path);
        if found.is_ok_and(|found| (found.dev(), found.ino()) == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}
