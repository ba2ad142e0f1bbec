//! Opening a disk to look at it: regular files and block devices, nothing else.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

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
    #[error("{}: not allowed to read it; look at its permissions and those of its directories", .0.display())]
    Denied(PathBuf),
    /// The permissions forbid to write it.
    #[error("{}: not allowed to write to it; look at its permissions and those of its directories", .0.display())]
    NotWritable(PathBuf),
    /// It is something else.
    #[error("{}: is {what}; a disk is a regular file or a block device", .path.display())]
    NotADisk {
        /// The file.
        path: PathBuf,
        /// What it is, with its article.
        what: &'static str,
    },
    /// Anything else.
    #[error("{}: {error}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
}

/// Open the file at `path` to look at it: for reading, without a lease, without reading anything.
pub fn open(path: &Path) -> Result<Image, OpenError> {
    open_with(path, false)
}

/// Open the file at `path` to change what is in it: for reading and writing, without a lease, without reading anything.
pub fn open_to_write(path: &Path) -> Result<Image, OpenError> {
    open_with(path, true)
}

fn open_with(path: &Path, write: bool) -> Result<Image, OpenError> {
    let failed = |error: io::Error| match error.raw_os_error() {
        Some(libc::ENOENT) => OpenError::Missing(path.to_owned()),
        Some(libc::EACCES | libc::EPERM) if write => OpenError::NotWritable(path.to_owned()),
        Some(libc::EROFS) if write => OpenError::NotWritable(path.to_owned()),
        Some(libc::EACCES | libc::EPERM) => OpenError::Denied(path.to_owned()),
        _ => OpenError::Io { path: path.to_owned(), error },
    };
    let not_a_disk = |what| OpenError::NotADisk { path: path.to_owned(), what };

    // Looked at before opening, since opening some devices has effects; and again after it, for the answer that counts.
    kind_of(&path.metadata().map_err(failed)?).map_err(not_a_disk)?;
    // Not blocking: should the name now be that of a FIFO, opening it must not wait for a peer.
    let options = libc::O_NONBLOCK | libc::O_NOCTTY;
    let mut file =
        OpenOptions::new().read(true).write(write).custom_flags(options).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let kind = kind_of(&metadata).map_err(not_a_disk)?;
    let size = match kind {
        Kind::File => metadata.len(),
        Kind::Block => file.seek(SeekFrom::End(0)).map_err(failed)?,
    };
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
