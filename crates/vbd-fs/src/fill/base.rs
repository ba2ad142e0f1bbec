//! The directory that a tree is read from, and how a file in it is opened: by its own path, through no link.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::entry::Meta;
use crate::sys::{self, Stat, View};
use crate::{Error, Result};

/// Paths beyond this length are walked name by name: the kernel takes less than 4,096 bytes at once.
const LONG: usize = 3500;

/// A directory as a source.
pub(crate) struct Base {
    root: OwnedFd,
    /// Where it is, for messages.
    pub(crate) path: PathBuf,
    pub(crate) stat: Stat,
    /// A user and a group whose files are given to root.
    pub(crate) to_root: Option<(u32, u32)>,
    /// What changes is taken as it is found.
    pub(crate) live: bool,
    /// What cannot be read is left out.
    pub(crate) skip_unreadable: bool,
}

impl Base {
    /// Opens the directory at `path`.
    ///
    /// # Errors
    ///
    /// When it cannot be opened, or is none.
    pub(crate) fn open(
        path: &Path,
        to_root: Option<(u32, u32)>,
        live: bool,
        skip_unreadable: bool,
    ) -> Result<Base> {
        let failed = |e: io::Error| Error::Source { path: path.to_owned(), reason: unreadable(&e) };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        let stat = sys::stat_at(root.as_fd(), OsStr::new(""), View::Kernel).map_err(failed)?;
        Ok(Base { root, path: path.to_owned(), stat, to_root, live, skip_unreadable })
    }

    /// Opens what is at `path` in it, for reading.
    ///
    /// # Errors
    ///
    /// The kernel's; `ELOOP` where a link is on the way.
    pub(crate) fn open_file(&self, path: &Path) -> io::Result<File> {
        self.open_with(path, OFlags::RDONLY | OFlags::NONBLOCK).map(File::from)
    }

    /// Opens a directory in it.
    ///
    /// # Errors
    ///
    /// As [`Base::open_file`].
    pub(crate) fn open_directory(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open_with(path, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    fn open_with(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if path.as_os_str().is_empty() {
            return Ok(rustix::fs::openat(&self.root, ".", flags, Mode::empty())?);
        }
        if path.as_os_str().len() <= LONG {
            let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            match rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve) {
                // A kernel, or a filter of system calls, that does not have it.
                Err(rustix::io::Errno::NOSYS | rustix::io::Errno::PERM) => {}
                other => return Ok(other?),
            }
        }
        let mut directory = self.root.try_clone()?;
        let mut names = path.iter().peekable();
        while let Some(name) = names.next() {
            let way = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let flags = if names.peek().is_some() { way } else { flags };
            directory = rustix::fs::openat(&directory, name, flags, Mode::empty())?;
        }
        Ok(directory)
    }

    /// What of a file's attributes goes into the image.
    pub(crate) fn meta(&self, stat: &Stat) -> Meta {
        let mut meta = stat.meta();
        if let Some((uid, gid)) = self.to_root {
            if meta.uid == uid {
                meta.uid = 0;
            }
            if meta.gid == gid {
                meta.gid = 0;
            }
        }
        meta
    }

    /// An error about an entry.
    pub(crate) fn error(&self, path: &Path, reason: String) -> Error {
        Error::Source { path: self.shown(path), reason }
    }

    /// An entry's path as messages have it.
    pub(crate) fn shown(&self, path: &Path) -> PathBuf {
        if path.as_os_str().as_bytes().is_empty() { self.path.clone() } else { self.path.join(path) }
    }

    /// An entry changed: an error, or where that was asked for a line for the report.
    ///
    /// # Errors
    ///
    /// When changes are not to be taken as they are found.
    pub(crate) fn changed(&self, path: &Path, what: &str) -> Result<String> {
        if self.live {
            return Ok(format!("{}: {what}; taken as found", self.shown(path).display()));
        }
        let reason = format!("{what}; stop what writes there, exclude it, or build live to take it as found");
        Err(self.error(path, reason))
    }
}

/// Whether an error means that an entry went away after its name was read.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    let gone = [libc::ENOENT, libc::ELOOP, libc::ENOTDIR, libc::ENXIO, libc::ESTALE];
    error.raw_os_error().is_some_and(|e| gone.contains(&e))
}

/// Why an entry cannot be read, and what to do.
pub(crate) fn unreadable(error: &io::Error) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "; exclude it, run as a user who may read it, or leave out what is unreadable (--skip-unreadable)"
        }
        _ => "",
    };
    format!("cannot be read: {error}{remedy}")
}
