//! Making disk files: sparse or preallocated, never half made, never over an existing one unasked.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{AtFlags, CWD, FallocateFlags, RenameFlags};
use rustix::io::Errno;

use crate::lease::{Lease, LeaseError, Mode, Options};
use crate::size::{Human, Size};

/// The mode of a new file, before the umask: as QEMU makes them.
const FILE_MODE: u32 = 0o644;

/// Why a file was not made. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// There is one of that name.
    #[error("{}: exists already; choose another name, or replace it with --force", .0.display())]
    Exists(PathBuf),
    /// What is there cannot be replaced by a file.
    #[error("{}: is {what}, which a disk file cannot replace; choose another name", .path.display())]
    NotAFile {
        /// The name.
        path: PathBuf,
        /// What it is, with its article.
        what: &'static str,
    },
    /// The file to be replaced is in use.
    #[error("{0}; not replaced")]
    InUse(LeaseError),
    /// The directory is missing.
    #[error("{}: there is no directory {}; make it first", .path.display(), .directory.display())]
    NoDirectory {
        /// The name.
        path: PathBuf,
        /// Its directory.
        directory: PathBuf,
    },
    /// More than one file can hold here.
    #[error("{}: {} is more than one file can hold here ({limit})", .path.display(), .size.human())]
    TooLarge {
        /// The name.
        path: PathBuf,
        /// The size asked for.
        size: Size,
        /// Whose limit it is.
        limit: String,
    },
    /// Not enough room for all of a preallocated file.
    #[error(
        "{}: {} are to be preallocated and {} are free: {} are missing; make room, or leave out --preallocate",
        .path.display(), .size.human(), Human(*.free), Human(.size.bytes().saturating_sub(*.free))
    )]
    NoRoom {
        /// The name.
        path: PathBuf,
        /// The size asked for.
        size: Size,
        /// What this user may still allocate there, in bytes.
        free: u64,
    },
    /// The filesystem cannot preallocate.
    #[error("{}: the filesystem there cannot preallocate; leave out --preallocate", .0.display())]
    NoPreallocation(PathBuf),
    /// Anything else.
    #[error("{}: cannot {doing}: {error}", .path.display())]
    Io {
        /// The name.
        path: PathBuf,
        /// What failed.
        doing: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
}

/// Make a raw disk file of `size` bytes at `path`: sparse, or with all its blocks allocated.
///
/// Time and room do not depend on the size of a sparse file. With `replace`, an existing regular file is replaced as a
/// whole, unless somebody uses it.
pub fn create(path: &Path, size: Size, preallocate: bool, replace: bool) -> Result<(), CreateError> {
    let draft = Draft::new(path, replace)?;
    let failed =
        |doing| move |errno: Errno| CreateError::Io { path: path.to_owned(), doing, error: errno.into() };
    let too_large = |limit: String| CreateError::TooLarge { path: path.to_owned(), size, limit };

    // Above a process's own limit the kernel sends a deadly signal rather than an error.
    let allowed = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
    if let Some(allowed) = allowed.filter(|allowed| size.bytes() > *allowed) {
        return Err(too_large(format!("this process may write files of {}: ulimit -f", Human(allowed))));
    }
    rustix::fs::ftruncate(&draft.file, size.bytes()).map_err(|errno| match errno {
        // An offset that the filesystem cannot address is EFBIG for most, EINVAL for some.
        Errno::FBIG | Errno::INVAL => too_large("a limit of its filesystem".to_owned()),
        other => failed("set its size")(other),
    })?;
    if preallocate {
        let stat = rustix::fs::fstatvfs(&draft.file).map_err(failed("look at its filesystem"))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        let no_room = || CreateError::NoRoom { path: path.to_owned(), size, free };
        if free < size.bytes() {
            return Err(no_room());
        }
        rustix::fs::fallocate(&draft.file, FallocateFlags::empty(), 0, size.bytes()).map_err(|errno| {
            match errno {
                Errno::NOSPC | Errno::DQUOT => no_room(),
                Errno::OPNOTSUPP | Errno::NOSYS => CreateError::NoPreallocation(path.to_owned()),
                Errno::FBIG => too_large("a limit of its filesystem".to_owned()),
                other => failed("preallocate")(other),
            }
        })?;
    }
    draft.publish()
}

/// A file that is being made and has no name yet. It appears under its name, whole, by [`Draft::publish`], and is gone
/// if that is not reached: also after a crash, where the filesystem knows nameless files (`O_TMPFILE`).
#[derive(Debug)]
pub struct Draft {
    file: File,
    /// The name it is to have, symbolic links resolved if it is to replace what they lead to.
    target: PathBuf,
    replace: bool,
    /// The name it has meanwhile, where it has to have one.
    temporary: Option<PathBuf>,
}

impl Draft {
    /// Begin a file that is to become `path`. What cannot succeed is refused at once: there is a file and it is not to
    /// be replaced, or it is no regular file, or somebody uses it, or there is no such directory.
    pub fn new(path: &Path, replace: bool) -> Result<Self, CreateError> {
        Self::begin(path, replace, libc::O_TMPFILE)
    }

    /// `nameless`: the flag to try for a file without a name.
    fn begin(path: &Path, replace: bool, nameless: i32) -> Result<Self, CreateError> {
        let before = existing(path, replace)?;
        // A dangling link is not replaced and not written through: it counts as existing.
        let target = if replace { path.canonicalize().unwrap_or(path.to_owned()) } else { path.to_owned() };
        let directory = directory_of(&target);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).mode(FILE_MODE);
        let draft = match options.clone().custom_flags(nameless).open(directory) {
            Ok(file) => Draft { file, target, replace, temporary: None },
            // EISDIR: a kernel or filesystem that takes the flag for O_DIRECTORY alone.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL | libc::ENOSYS)
                ) =>
            {
                let temporary = temporary_name(&target);
                let open = options.clone().create_new(true).open(&temporary);
                let file = open.map_err(|error| no_file(path, directory, error))?;
                Draft { file, target, replace, temporary: Some(temporary) }
            }
            Err(error) => return Err(no_file(path, directory, error)),
        };
        if let Some(permissions) = before {
            let set = draft.file.set_permissions(permissions);
            set.map_err(|error| CreateError::Io { path: path.to_owned(), doing: "set its mode", error })?;
        }
        Ok(draft)
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Give the file its name. If one of that name has come meanwhile it stays, unless it was to be replaced.
    pub fn publish(mut self) -> Result<(), CreateError> {
        let target = self.target.clone();
        let failed = |errno: Errno| match errno {
            Errno::EXIST => CreateError::Exists(target.clone()),
            other => {
                CreateError::Io { path: target.clone(), doing: "give the file its name", error: other.into() }
            }
        };
        match (&self.temporary, self.replace) {
            (None, false) => self.link(&target).map_err(failed)?,
            (Some(temporary), false) => rename_new(temporary, &target).map_err(failed)?,
            (temporary, true) => {
                // A link cannot replace a name, so the file gets one that can be renamed.
                let temporary = match temporary {
                    Some(temporary) => temporary.clone(),
                    None => temporary_name(&target),
                };
                if self.temporary.is_none() {
                    self.link(&temporary).map_err(failed)?;
                    self.temporary = Some(temporary.clone());
                }
                existing(&target, true)?;
                rustix::fs::rename(&temporary, &target).map_err(failed)?;
            }
        }
        self.temporary = None;
        Ok(())
    }

    fn link(&self, name: &Path) -> rustix::io::Result<()> {
        // Through /proc, since linking the descriptor itself (AT_EMPTY_PATH) takes a privilege.
        let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        rustix::fs::linkat(CWD, own, CWD, name, AtFlags::SYMLINK_FOLLOW)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_file(temporary);
        }
    }
}

/// Refuses a name that [`publish`] would not give: there is a file and it is not to be replaced, or it is no regular
/// file, or somebody uses it, or there is no such directory.
///
/// # Errors
/// Why not.
pub fn may_publish(path: &Path, replace: bool) -> Result<(), CreateError> {
    existing(path, replace)?;
    let directory = directory_of(path);
    if directory.is_dir() {
        return Ok(());
    }
    Err(CreateError::NoDirectory { path: path.to_owned(), directory: directory.to_owned() })
}

/// Gives a file that was made under another name in the same directory its own: atomically, and over an existing file
/// only where that is to be replaced and nobody uses it.
///
/// # Errors
/// See [`CreateError`]. The file then keeps the name that it has.
pub fn publish(temporary: &Path, path: &Path, replace: bool) -> Result<(), CreateError> {
    let failed = |errno: Errno| match errno {
        Errno::EXIST => CreateError::Exists(path.to_owned()),
        other => {
            CreateError::Io { path: path.to_owned(), doing: "give the file its name", error: other.into() }
        }
    };
    if !replace {
        return rename_new(temporary, path).map_err(failed);
    }
    existing(path, true)?;
    rustix::fs::rename(temporary, path).map_err(failed)
}

/// Rename, but never over an existing file.
fn rename_new(from: &Path, to: &Path) -> rustix::io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Filesystems without that flag have hard links as a rule.
        Err(Errno::INVAL | Errno::NOSYS) => {
            rustix::fs::link(from, to)?;
            rustix::fs::unlink(from)
        }
        other => other,
    }
}

/// Look at what has the name now: `Ok(None)` is nothing, `Ok(Some(..))` a regular file that
/// may be replaced.
fn existing(path: &Path, replace: bool) -> Result<Option<fs::Permissions>, CreateError> {
    let failed = |error| CreateError::Io { path: path.to_owned(), doing: "look at what is there", error };
    let metadata = match path.metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_symlink() => {
            return Err(CreateError::NotAFile { path: path.to_owned(), what: "a link to nothing" });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // A directory on the way that is none is reported where the file is opened.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let kind = metadata.file_type();
    let not_a_file = |what| Err(CreateError::NotAFile { path: path.to_owned(), what });
    if kind.is_dir() {
        return not_a_file("a directory");
    }
    if kind.is_block_device() {
        return not_a_file("a block device");
    }
    if !kind.is_file() {
        return not_a_file("no regular file");
    }
    if !replace {
        return Err(CreateError::Exists(path.to_owned()));
    }
    let file = File::open(path).map_err(failed)?;
    Lease::acquire(file.as_fd(), path, Mode::Write, Options::default()).map_err(CreateError::InUse)?;
    Ok(Some(metadata.permissions()))
}

fn no_file(path: &Path, directory: &Path, error: io::Error) -> CreateError {
    if !directory.is_dir() {
        CreateError::NoDirectory { path: path.to_owned(), directory: directory.to_owned() }
    } else {
        CreateError::Io { path: path.to_owned(), doing: "make a file in its directory", error }
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A name beside the target that nobody else uses: `.vbd-PID-N.new`.
fn temporary_name(target: &Path) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    target.with_file_name(format!(".vbd-{}-{number}.new", std::process::id()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// With and without `O_TMPFILE`: a directory opened for writing without it is EISDIR.
    #[test]
    fn a_draft_appears_whole_or_not_at_all() {
        for nameless in [libc::O_TMPFILE, 0] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("new");
            drop(Draft::begin(&path, false, nameless).unwrap());
            assert_eq!(names(directory.path()), [""; 0]);

            let (first, second) = (
                Draft::begin(&path, false, nameless).unwrap(),
                Draft::begin(&path, false, nameless).unwrap(),
            );
            first.file().write_all(b"first").unwrap();
            first.publish().unwrap();
            assert!(matches!(second.publish(), Err(CreateError::Exists(_))));
            assert_eq!(fs::read(&path).unwrap(), b"first");

            let third = Draft::begin(&path, true, nameless).unwrap();
            third.file().write_all(b"third").unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"first");
            third.publish().unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"third");
            drop(Draft::begin(&path, true, nameless).unwrap());
            assert_eq!(names(directory.path()), ["new"]);
        }
    }
}
