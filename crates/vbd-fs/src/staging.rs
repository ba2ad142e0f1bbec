//! The directory in which a tree is gathered before it becomes a filesystem.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::Result;
use crate::error::Context;

const PREFIX: &str = ".vbd-stage-";

/// A directory that nobody else may enter, removed when dropped. A lock on it tells those in use from those that a
/// killed process left, which the next build removes.
pub(crate) struct Staging {
    directory: tempfile::TempDir,
    _lock: File,
}

impl Staging {
    /// Makes one in `parent`, after removing what killed builds left there.
    pub(crate) fn new(parent: &Path) -> Result<Staging> {
        remove_left_behind(parent);
        loop {
            let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent);
            let directory = directory.at("make a directory in", parent)?;
            let lock = File::open(directory.path()).at("open", directory.path())?;
            // Another build may have taken it for one left behind in the moment before it was locked.
            if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            let staging = Staging { directory, _lock: lock };
            match std::fs::create_dir(staging.tree()) {
                Ok(()) => return Ok(staging),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(e).at("make", &staging.tree()),
            }
        }
    }

    /// Where things other than the tree can be put.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The tree's root.
    pub(crate) fn tree(&self) -> PathBuf {
        self.directory.path().join("tree")
    }

    /// The tree's root, to make things in.
    pub(crate) fn open_tree(&self) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(self.tree(), flags, Mode::empty()).at("open", &self.tree())
    }
}

fn remove_left_behind(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    let me = rustix::process::geteuid().as_raw();
    for entry in entries.flatten() {
        if !entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        let path = entry.path();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(directory) = rustix::fs::open(&path, flags, Mode::empty()).map(File::from) else { continue };
        let mine = directory.metadata().is_ok_and(|m| m.uid() == me);
        if mine && rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok() {
            match std::fs::remove_dir_all(&path) {
                Ok(()) => tracing::info!("removed {}, which a killed build had left", path.display()),
                Err(e) => tracing::warn!("cannot remove {}, which a killed build left: {e}", path.display()),
            }
        }
    }
}
