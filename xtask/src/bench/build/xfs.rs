//! A filesystem that shares blocks, mounted from a file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::bench::output;

/// Bytes; what is not written takes no memory.
const SIZE: u64 = 16 << 30;

/// XFS on a loop device, until it is dropped.
pub(super) struct Mounted {
    at: PathBuf,
}

impl Mounted {
    /// Makes one in `dir`.
    pub(super) fn new(dir: &Path) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "XFS is not mounted: that takes root");
        let (file, at) = (dir.join("xfs.img"), dir.join("xfs"));
        File::create(&file)?.set_len(SIZE)?;
        output(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&file))?;
        fs::create_dir(&at)?;
        output(Command::new("mount").args(["-t", "xfs", "-o", "loop"]).arg(&file).arg(&at))
            .context("XFS is not mounted")?;
        Ok(Mounted { at })
    }

    pub(super) fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = output(Command::new("umount").arg(&self.at)) {
            eprintln!("{error:#}");
        }
    }
}
