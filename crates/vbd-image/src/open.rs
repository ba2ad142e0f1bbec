//! Opening a file that is, or is to be looked at as, a disk: regular files and block devices, nothing else.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::host;

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Looking at it, whatever its size.
    Inspect,
    /// Serving it read-only. It must not be empty.
    Read,
    /// Serving it. It must not be empty; a block device is claimed (`O_EXCL`), so that nobody can mount it meanwhile.
    Write,
    /// As [`Access::Write`], without the claim: for disks that several share (`w!`).
    WriteShared,
}

/// What kind of file holds the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A regular file.
    File,
    /// A block device: a disk, a partition, a logical volume.
    Block,
}

/// An open file that can be a disk.
#[derive(Debug)]
pub struct Image {
    /// The file.
    pub file: File,
    /// What kind it is.
    pub kind: Kind,
    /// Its size in bytes, as it was when opened.
    pub size: u64,
}

/// Why a file cannot be opened as a disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is none.
    #[error("{}: there is no such file; make one with `vbd create`", .0.display())]
    Missing(PathBuf),
    /// The permissions forbid it.
    #[error("{}: not allowed to {verb} it; look at its permissions and those of its directories", .path.display())]
    Denied {
        /// The file.
        path: PathBuf,
        /// "read" or "write to".
        verb: &'static str,
    },
    /// The file is read-only whatever the permissions: a read-only filesystem, an immutable file or a running program.
    #[error("{}: cannot be written to ({source}); serve it read-only", .path.display())]
    ReadOnly {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is something else.
    #[error("{}: is {what}; a disk is a regular file or a block device", .path.display())]
    NotADisk {
        /// The file.
        path: PathBuf,
        /// What it is, with its article.
        what: &'static str,
    },
    /// There is nothing in it.
    #[error("{}: is empty, so there is no disk to serve; give it a size with `vbd create --force`", .0.display())]
    Empty(PathBuf),
    /// A block device that the host uses.
    #[error(transparent)]
    InUse(#[from] host::InUse),
    /// Anything else.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Open the file at `path`. No lease is taken, and nothing in the file is looked at.
pub fn open(path: &Path, access: Access) -> Result<Image, OpenError> {
    let write = matches!(access, Access::Write | Access::WriteShared);
    let failed = |source| OpenError::Io { path: path.to_owned(), source };
    let not_a_disk = |what| OpenError::NotADisk { path: path.to_owned(), what };
    let refused = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENOENT) => OpenError::Missing(path.to_owned()),
        Some(libc::EACCES) => {
            OpenError::Denied { path: path.to_owned(), verb: if write { "write to" } else { "read" } }
        }
        Some(libc::EROFS | libc::EPERM | libc::ETXTBSY) if write => {
            OpenError::ReadOnly { path: path.to_owned(), source }
        }
        _ => failed(source),
    };

    // Looked at before opening, for a clear answer and because opening some devices has effects; and again after it,
    // for the answer that counts.
    let kind = kind_of(&path.metadata().map_err(refused)?).map_err(not_a_disk)?;
    let exclusive = if kind == Kind::Block && access == Access::Write { libc::O_EXCL } else { 0 };
    // Not blocking: should the name now be that of a FIFO, opening it must not wait for a peer. It means nothing to
    // the files that are left after the check.
    let options = libc::O_NONBLOCK | libc::O_NOCTTY | exclusive;
    let mut file = match OpenOptions::new().read(true).write(write).custom_flags(options).open(path) {
        Ok(file) => file,
        Err(error) if exclusive != 0 && error.raw_os_error() == Some(libc::EBUSY) => {
            return Err(host::busy_device(path).into());
        }
        Err(error) => return Err(refused(error)),
    };
    let metadata = file.metadata().map_err(failed)?;
    let kind = kind_of(&metadata).map_err(not_a_disk)?;
    let size = match kind {
        Kind::File => metadata.len(),
        Kind::Block => file.seek(SeekFrom::End(0)).map_err(failed)?,
    };
    if size == 0 && access != Access::Inspect {
        return Err(OpenError::Empty(path.to_owned()));
    }
    Ok(Image { file, kind, size })
}

/// The kind of a file, or what it is instead.
fn kind_of(metadata: &std::fs::Metadata) -> Result<Kind, &'static str> {
    let kind = metadata.file_type();
    if kind.is_file() {
        Ok(Kind::File)
    } else if kind.is_block_device() {
        Ok(Kind::Block)
    } else if kind.is_dir() {
        Err("a directory")
    } else if kind.is_fifo() {
        Err("a FIFO")
    } else if kind.is_socket() {
        Err("a socket")
    } else {
        Err("a character device")
    }
}
