//! Who writes a filesystem.

mod mke2fs;
mod superblock;

use std::fs::File;
use std::path::Path;

use crate::meter::{Geometry, Room};
use crate::tree::Unstaged;
use crate::{Filesystem, Progress, Result};

pub(crate) use mke2fs::{Mke2fs, is_full};
pub(crate) use superblock::Superblock;

/// What a new filesystem is to be like.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Format {
    pub(crate) filesystem: Filesystem,
    pub(crate) label: Option<String>,
    pub(crate) uuid: Option<String>,
    pub(crate) reserved_percent: Option<u8>,
    pub(crate) inodes: Option<u64>,
    pub(crate) arguments: Vec<String>,
}

/// Writes a filesystem into a file, and knows beforehand how much it holds.
pub(crate) trait Builder {
    /// What an empty filesystem of `size` bytes has free; `scratch` is a directory for a sparse file of that size.
    fn capacity(
        &self,
        format: &Format,
        size: u64,
        scratch: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(Geometry, Room)>;

    /// Makes the filesystem in `image`, which has its size and is empty, with the directory `tree` in it, and with the
    /// attributes that could not be staged there.
    fn write(
        &self,
        format: &Format,
        image: &File,
        tree: &Path,
        unstaged: &[Unstaged],
        scratch: &Path,
        progress: &mut dyn Progress,
    ) -> Result<()>;
}
