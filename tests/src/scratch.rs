//! A place for what a test makes, gone with the test.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::target_dir;

/// Two directories that are removed when dropped: one for files, on the disk of the build directory
/// (so that direct I/O is what it is there), and one with a short path, for sockets.
pub struct Scratch {
    files: TempDir,
    sockets: TempDir,
}

impl Scratch {
    /// Makes both.
    ///
    /// # Errors
    /// When either cannot be made.
    pub fn new() -> Result<Self> {
        let parent = target_dir().join("tmp");
        fs::create_dir_all(&parent).with_context(|| format!("making {}", parent.display()))?;
        let files = tempfile::Builder::new().prefix("vbd-").tempdir_in(&parent)?;
        let sockets = tempfile::Builder::new().prefix("vbd-").tempdir()?;
        Ok(Self { files, sockets })
    }

    /// The path of a file, not made yet.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.files.path().join(name)
    }

    /// The path of a socket, not made yet; short enough for `sun_path`.
    pub fn socket(&self, name: impl AsRef<Path>) -> PathBuf {
        self.sockets.path().join(name)
    }

    /// Makes a sparse file of `size` bytes.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn sparse(&self, name: impl AsRef<Path>, size: u64) -> Result<PathBuf> {
        let path = self.path(name);
        let file = File::create_new(&path).with_context(|| format!("making {}", path.display()))?;
        file.set_len(size)?;
        Ok(path)
    }
}

/// How much of a file is allocated, in bytes (`st_blocks`).
///
/// # Errors
/// When it cannot be looked at.
pub fn allocated(path: &Path) -> Result<u64> {
    let metadata = fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
    Ok(metadata.blocks() * 512)
}
