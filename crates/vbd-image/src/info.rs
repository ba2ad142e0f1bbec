//! All that can be said about a disk file without changing it.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxFlags, statx};
use serde::Serialize;

use crate::host::{self, InUse, Mounts};
use crate::lease::{self, Holder};
use crate::map::{Map, State};
use crate::open::{self, Image, Kind, OpenError};
use crate::probe::{self, Contents};

/// A disk file, looked at from outside and inside. Sizes are in bytes.
#[derive(Debug, Serialize)]
pub struct Info {
    /// The file, as it was named.
    pub path: PathBuf,
    /// What kind of file it is.
    pub kind: Kind,
    /// The size of the disk.
    pub virtual_size: u64,
    /// The room that the file takes on its filesystem.
    pub allocated: u64,
    /// Bytes that were written.
    pub data: u64,
    /// Bytes that are holes.
    pub holes: u64,
    /// Bytes that are allocated and were never written.
    pub preallocated: u64,
    /// Bytes whose blocks belong to another file, too.
    pub shared: u64,
    /// The number of extents, holes included.
    pub extents: usize,
    /// What is in the disk.
    #[serde(flatten)]
    pub contents: Contents,
    /// The filesystem that the file is on; `None` for a block device.
    pub host_filesystem: Option<HostFilesystem>,
    /// How the file can be read and written past the page cache.
    pub direct_io: DirectIo,
    /// Who holds the lease.
    pub holders: Vec<Holder>,
    /// What the host does with it.
    pub host_use: Option<InUse>,
}

/// The filesystem that a file is on.
#[derive(Debug, Serialize)]
pub struct HostFilesystem {
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Where it is mounted.
    pub mounted_on: PathBuf,
    /// Bytes that this user may still allocate.
    pub free: u64,
}

/// What O_DIRECT asks of requests, as statx(2) says (`STATX_DIOALIGN`, Linux 6.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DirectIo {
    /// Whether there is direct I/O; `None` if the filesystem does not say.
    pub supported: Option<bool>,
    /// What the addresses of buffers have to be multiples of, if known.
    pub memory: Option<u32>,
    /// What offsets and lengths have to be multiples of, if known.
    pub offset: Option<u32>,
}

/// Why nothing can be said about a file.
#[derive(Debug, thiserror::Error)]
pub enum InfoError {
    /// It cannot be opened, or is no disk.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Looking at it failed.
    #[error("{}: cannot {doing}: {error}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What failed.
        doing: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
}

impl Info {
    /// Look at the file or block device at `path`.
    pub fn of(path: &Path) -> Result<Self, InfoError> {
        let failed = |doing| move |error| InfoError::Io { path: path.to_owned(), doing, error };
        let image = open::open(path)?;
        let map = Map::of(&image).map_err(failed("map it"))?;
        Ok(Info {
            path: path.to_owned(),
            kind: image.kind,
            virtual_size: image.size,
            allocated: map.allocated,
            data: map.total(State::Data),
            holes: map.total(State::Hole),
            preallocated: map.total(State::Preallocated),
            shared: map.shared(),
            extents: map.extents.len(),
            contents: probe::contents(&image.file, image.size).map_err(failed("read it"))?,
            host_filesystem: host_filesystem(&image, path).map_err(failed("look at its filesystem"))?,
            direct_io: direct_io(&image).map_err(failed("look at it"))?,
            holders: lease::holders(path)?,
            host_use: host::usage(&image.file, path).map_err(failed("look for its users"))?,
        })
    }
}

fn host_filesystem(image: &Image, path: &Path) -> io::Result<Option<HostFilesystem>> {
    if image.kind == Kind::Block {
        return Ok(None);
    }
    let mounts = Mounts::read()?;
    let Some(mount) = mounts.containing(&path.canonicalize()?) else { return Ok(None) };
    let stat = rustix::fs::fstatvfs(&image.file)?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    Ok(Some(HostFilesystem { kind: mount.kind.clone(), mounted_on: mount.point.clone(), free }))
}

fn direct_io(image: &Image) -> io::Result<DirectIo> {
    let stat = statx(&image.file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    if StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN) {
        let known = |alignment: u32| (alignment != 0).then_some(alignment);
        return Ok(DirectIo {
            supported: Some(stat.stx_dio_offset_align != 0),
            memory: known(stat.stx_dio_mem_align),
            offset: known(stat.stx_dio_offset_align),
        });
    }
    if image.kind == Kind::Block {
        let sector = rustix::fs::ioctl_blksszget(&image.file)?;
        return Ok(DirectIo { supported: Some(true), memory: None, offset: Some(sector) });
    }
    Ok(DirectIo::default())
}
