//! The files that are served.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{Advice, fadvise};

use super::loads::Load;

/// Where a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Storage {
    Disk,
    Memory,
}

impl Storage {
    pub(crate) const ALL: [Storage; 2] = [Storage::Disk, Storage::Memory];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Storage::Disk => "disk",
            Storage::Memory => "memory",
        }
    }

    /// What results call a load on it: `disk/randread-4K-32`.
    pub(crate) fn key(self, load: Load) -> String {
        format!("{}/{}", self.name(), load.name())
    }

    /// The file: written throughout, so that no request meets a hole. One from an earlier run is taken as it is.
    pub(crate) fn prepare(self, dir: &Path) -> Result<PathBuf> {
        let (path, size) = match self {
            Storage::Disk => (dir.join("disk.img"), 2u64 << 30),
            Storage::Memory => (PathBuf::from("/dev/shm/vbd-bench.img"), 1 << 30),
        };
        let ready = std::fs::metadata(&path).is_ok_and(|m| m.len() == size && m.blocks() * 512 >= size);
        if !ready {
            fill(&path, size).with_context(|| format!("write {}", path.display()))?;
        }
        warm(&path).with_context(|| format!("read {}", path.display()))?;
        Ok(path)
    }

    /// Removes the file in memory, which nobody wants to keep.
    pub(crate) fn forget(self, path: &Path) {
        if self == Storage::Memory {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn fill(path: &Path, size: u64) -> Result<()> {
    let mut file = File::create(path)?;
    let mut state = 1u64;
    let mut chunk = vec![0u8; 1 << 20];
    for _ in 0..size >> 20 {
        for word in chunk.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    Ok(())
}

/// Reads all of it once. What lies below a virtual machine's disk may have a cache of its own, which would favour whoever
/// comes later.
fn warm(path: &Path) -> Result<()> {
    std::io::copy(&mut File::open(path)?, &mut std::io::sink())?;
    Ok(())
}

/// Writes out and drops what the page cache holds of `path`, so that the next peer starts as the first one did.
pub(crate) fn cool(path: &Path) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.sync_all()?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    Ok(())
}
