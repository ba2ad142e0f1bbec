//! Which parts of a disk file hold data.
//!
//! `SEEK_DATA` and `SEEK_HOLE` (lseek(2)) are the answer that every filesystem gives; FIEMAP (kernel documentation,
//! filesystems/fiemap) adds, where there is one, which holes are preallocated and which data is shared with a clone.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::Serialize;

use crate::open::{Image, Kind};

/// What an extent holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Bytes that were written.
    Data,
    /// Nothing: it reads as zeroes and takes no room.
    Hole,
    /// Room that is allocated and was never written: it reads as zeroes.
    Preallocated,
}

/// A range of a file that is all of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Extent {
    /// Where it begins, in bytes.
    pub start: u64,
    /// Its length in bytes, never 0.
    pub length: u64,
    /// What it holds.
    pub state: State,
    /// Whether its blocks belong to another file too (reflink).
    pub shared: bool,
}

impl Extent {
    /// Where it ends, in bytes.
    pub fn end(&self) -> u64 {
        self.start + self.length
    }
}

/// The whole of a file: extents that follow each other without a gap from 0 to its size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Map {
    /// The size of the file in bytes: the disk's.
    pub size: u64,
    /// The room that the filesystem has given it, in bytes, with what it needs for itself (`st_blocks`). For a block
    /// device its size.
    pub allocated: u64,
    /// The extents; neighbours differ.
    pub extents: Vec<Extent>,
}

impl Map {
    /// Map a file. It may change meanwhile: the map is then that of no single moment, but whole.
    pub fn of(image: &Image) -> io::Result<Self> {
        let mut map = Map { size: image.size, allocated: image.size, extents: Vec::new() };
        if image.kind == Kind::Block {
            map.add(image.size, State::Data, false);
            return Ok(map);
        }
        map.allocated = image.file.metadata()?.blocks() * 512;
        let mut blocks = Blocks { file: &image.file, supported: true };
        while map.end() < map.size {
            let (end, state) = segment(&image.file, map.end(), map.size)?;
            while map.end() < end {
                let (end, state, shared) = blocks.refine(map.end(), end, state)?;
                map.add(end, state, shared);
            }
        }
        Ok(map)
    }

    /// The bytes in extents of that kind.
    pub fn total(&self, state: State) -> u64 {
        self.extents.iter().filter(|extent| extent.state == state).map(|extent| extent.length).sum()
    }

    /// The bytes in extents that are shared with another file.
    pub fn shared(&self) -> u64 {
        self.extents.iter().filter(|extent| extent.shared).map(|extent| extent.length).sum()
    }

    /// Where the next extent begins.
    fn end(&self) -> u64 {
        self.extents.last().map_or(0, Extent::end)
    }

    /// Append what lies between the end of the map and `end`.
    fn add(&mut self, end: u64, state: State, shared: bool) {
        let start = self.end();
        match self.extents.last_mut() {
            Some(last) if last.state == state && last.shared == shared => last.length = end - last.start,
            _ if end > start => self.extents.push(Extent { start, length: end - start, state, shared }),
            _ => {}
        }
    }
}

/// The end (after `start`, at most `size`) and kind of the segment that begins at `start`.
fn segment(file: &File, start: u64, size: u64) -> io::Result<(u64, State)> {
    let seek = |whence| match rustix::fs::seek(file, whence) {
        // Nothing but a hole up to the end; or the file was truncated meanwhile.
        Err(Errno::NXIO) => Ok(size),
        // Without holes as far as the filesystem can tell.
        Err(Errno::INVAL) => Ok(start),
        other => other.map(|offset| offset.clamp(start, size)),
    };
    let data = seek(SeekFrom::Data(start))?;
    if data > start {
        return Ok((data, State::Hole));
    }
    let hole = seek(SeekFrom::Hole(start))?;
    Ok((if hole > start { hole } else { size }, State::Data))
}

/// The blocks of a file as FIEMAP shows them.
struct Blocks<'a> {
    file: &'a File,
    /// Whether the filesystem has it.
    supported: bool,
}

/// `struct fiemap` with room for one extent (linux/fiemap.h).
#[repr(C)]
#[derive(Default)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extent: FiemapExtent,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `FS_IOC_FIEMAP`: `_IOWR('f', 11, struct fiemap)`, where the structure counts without extents.
const FS_IOC_FIEMAP: u32 = 0xC020_660B;
const FIEMAP_EXTENT_SHARED: u32 = 0x2000;

impl Blocks<'_> {
    /// What can be said more exactly of the range, which is of that kind: up to where, and how it is.
    fn refine(&mut self, start: u64, end: u64, state: State) -> io::Result<(u64, State, bool)> {
        let Some(extent) = self.first(start, end)? else { return Ok((end, state, false)) };
        if extent.logical > start {
            return Ok((extent.logical.min(end), state, false));
        }
        let until = extent.logical.saturating_add(extent.length).clamp(start + 1, end);
        let state = if state == State::Hole { State::Preallocated } else { state };
        Ok((until, state, extent.flags & FIEMAP_EXTENT_SHARED != 0))
    }

    /// The first extent that has blocks in the range.
    fn first(&mut self, start: u64, end: u64) -> io::Result<Option<FiemapExtent>> {
        if !self.supported {
            return Ok(None);
        }
        let mut query = Fiemap { start, length: end - start, extent_count: 1, ..Fiemap::default() };
        // SAFETY: the descriptor is open, the structure is laid out as the kernel's with room for the one extent that
        // it says it has room for, and the kernel does not keep the pointer.
        let result = unsafe {
            libc::ioctl(self.file.as_raw_fd(), FS_IOC_FIEMAP.into(), std::ptr::from_mut(&mut query))
        };
        if result == 0 {
            let extent = query.extent;
            return Ok((query.mapped_extents > 0 && extent.logical < end).then_some(extent));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL | libc::EBADR | libc::EPERM) => {
                self.supported = false;
                Ok(None)
            }
            Some(libc::EINTR) => self.first(start, end),
            _ => Err(error),
        }
    }
}
