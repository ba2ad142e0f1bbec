//! An image that has no name until it is whole.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};

use crate::error::Context;
use crate::{Error, Result};

/// A file beside its final name: without any name where the filesystem can do that (it vanishes with the last process
/// that has it open), with a hidden one elsewhere.
pub(crate) struct Partial {
    file: File,
    directory: PathBuf,
    hidden: Option<PathBuf>,
}

impl Partial {
    /// Makes an empty file that can become `path`.
    pub(crate) fn create(path: &Path) -> Result<Partial> {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let mode = Mode::from_raw_mode(0o666);
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        match rustix::fs::open(&directory, flags, mode) {
            Ok(file) => return Ok(Partial { file: file.into(), directory, hidden: None }),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {}
            Err(e) => return Err(e).at("make a file in", &directory),
        }
        for _ in 0..100 {
            let hidden = hidden_name(path, &directory);
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            match rustix::fs::open(&hidden, flags, mode) {
                Ok(file) => return Ok(Partial { file: file.into(), directory, hidden: Some(hidden) }),
                Err(rustix::io::Errno::EXIST) => {}
                Err(e) => return Err(e).at("make", &hidden),
            }
        }
        Err(io::Error::from(io::ErrorKind::AlreadyExists)).at("make a file in", &directory)
    }

    /// The file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its name, durably. What has that name stays unless `replace` says otherwise.
    pub(crate) fn publish(mut self, path: &Path, replace: bool) -> Result<()> {
        let taken = |e: rustix::io::Errno| match e {
            rustix::io::Errno::EXIST => Error::Exists(path.to_owned()),
            e => Error::io(format!("cannot name the image {}", path.display()), e.into()),
        };
        if self.hidden.is_none() {
            if !replace {
                self.link(path).map_err(taken)?;
                return self.sync_directory();
            }
            // A link replaces nothing: give it a hidden name first.
            let hidden = hidden_name(path, &self.directory);
            self.link(&hidden).map_err(taken)?;
            self.hidden = Some(hidden);
        }
        if let Some(hidden) = &self.hidden {
            let flags = if replace { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
            match rustix::fs::renameat_with(CWD, hidden, CWD, path, flags) {
                // A filesystem that cannot refuse by itself: a link refuses everywhere.
                Err(rustix::io::Errno::INVAL) => {
                    rustix::fs::linkat(CWD, hidden, CWD, path, AtFlags::empty()).map_err(taken)?;
                    std::fs::remove_file(hidden).at("remove", hidden)?;
                }
                other => other.map_err(taken)?,
            }
            self.hidden = None;
        }
        self.sync_directory()
    }

    fn link(&self, path: &Path) -> rustix::io::Result<()> {
        let this = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        rustix::fs::linkat(CWD, &this, CWD, path, AtFlags::SYMLINK_FOLLOW)
    }

    fn sync_directory(&self) -> Result<()> {
        File::open(&self.directory).and_then(|d| d.sync_all()).at("make durable", &self.directory)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if let Some(hidden) = &self.hidden
            && let Err(e) = std::fs::remove_file(hidden)
        {
            tracing::warn!("cannot remove {}: {e}", hidden.display());
        }
    }
}

/// `.NAME.1a2b3c.partial` beside the image.
fn hidden_name(path: &Path, directory: &Path) -> PathBuf {
    use std::hash::{BuildHasher, Hasher};
    let random = std::hash::RandomState::new().build_hasher().finish() & 0xff_ffff;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Room for the rest within 255 bytes.
    let short: String = name.chars().take(50).collect();
    directory.join(format!(".{short}.{random:06x}.partial"))
}
