//! How many blocks and inodes a tree takes in a filesystem.
//!
//! Counts as mke2fs lays a tree out (Documentation/filesystems/ext4, "directory entries", "block and inode tables"):
//! never too little where the layout is certain, and rounded up where it depends on luck (fragmentation).

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::entry::{Entry, Node, Sink, Xattr};
use crate::error::Context;
use crate::{Counts, Error, Progress, Result};

/// What of a filesystem's making decides how much room files take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Bytes in a block.
    pub(crate) block_size: u64,
    /// Bytes in an inode for extended attributes.
    pub(crate) xattr_space: u64,
    /// Files are mapped by extents rather than by blocks of block numbers.
    pub(crate) extents: bool,
}

/// What a tree needs, or a filesystem has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Room {
    pub(crate) blocks: u64,
    pub(crate) inodes: u64,
}

/// Counts entries.
pub(crate) struct Meter {
    geometry: Geometry,
    room: Room,
    counts: Counts,
    /// Bytes used in the last block of each directory.
    directories: HashMap<PathBuf, u64>,
}

impl Meter {
    pub(crate) fn new(geometry: Geometry) -> Meter {
        Meter { geometry, room: Room::default(), counts: Counts::default(), directories: HashMap::new() }
    }

    /// What was counted so far. The root directory's own inode and first block are a new filesystem's already.
    pub(crate) fn room(&self) -> Room {
        self.room
    }

    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    /// Counts an entry's inode, name and attributes; a file's content is counted by [`Meter::file`].
    pub(crate) fn entry(&mut self, entry: &Entry<'_>) {
        let root = entry.path.as_os_str().is_empty();
        if !root {
            self.name(entry.path);
        }
        match &entry.node {
            Node::HardLink(_) => {
                self.counts.hard_links += 1;
                return;
            }
            Node::Directory => {
                if self.directories.contains_key(entry.path) {
                    return;
                }
                self.directories.insert(entry.path.to_owned(), 24);
                self.counts.directories += 1;
                if root {
                    return;
                }
                self.room.blocks += 1;
            }
            Node::File { .. } => self.counts.files += 1,
            Node::Symlink(target) => {
                self.counts.symlinks += 1;
                self.room.blocks += u64::from(target.as_os_str().len() >= 60);
            }
            Node::Device { .. } => self.counts.special += 1,
        }
        self.room.inodes += 1;
        self.room.blocks += u64::from(xattr_size(entry.xattrs) > self.geometry.xattr_space);
    }

    fn name(&mut self, path: &Path) {
        let length = path.file_name().map_or(0, |name| name.len() as u64);
        let record = 8 + length.next_multiple_of(4);
        let parent = path.parent().unwrap_or(Path::new(""));
        let fill = match self.directories.get_mut(parent) {
            Some(fill) => fill,
            None => self.directories.entry(parent.to_owned()).or_insert(24),
        };
        *fill += record;
        // Twelve bytes hold a checksum.
        if *fill > self.geometry.block_size - 12 {
            *fill = record;
            // One more for the index now and then, which large directories need.
            self.room.blocks += 1;
        }
    }

    /// Counts a file's data: extents in rising order.
    pub(crate) fn file(&mut self, extents: &[Range<u64>]) {
        let size = self.geometry.block_size;
        let pointers = size / 4;
        let (mut data, mut runs, mut index) = (0u64, 0u64, 0u64);
        let (mut end, mut group) = (0u64, None);
        for extent in extents.iter().filter(|extent| !extent.is_empty()) {
            self.counts.bytes += extent.end - extent.start;
            let first = (extent.start / size).max(end);
            let last = extent.end.div_ceil(size);
            if last <= first {
                continue;
            }
            if first != end || runs == 0 {
                runs += 1;
            }
            data += last - first;
            end = last;
            if !self.geometry.extents {
                let mut block = first;
                while block < last {
                    let (this, next) = indirect_group(block, pointers);
                    if this.is_some() && this != group {
                        index += 1;
                        group = this;
                    }
                    block = next;
                }
            }
        }
        if self.geometry.extents {
            // A run is cut where a block group's tables are in its way; four fit in the inode.
            let pieces = runs + data / 16384;
            if pieces > 4 {
                index = pieces.div_ceil((size - 12) / 12) + 1;
            }
        } else if group.is_some_and(|g| g > 0) {
            // The double and triple indirect blocks above those that were counted.
            index += 2 + data / pointers.pow(2);
        }
        self.room.blocks += data + index;
    }
}

/// Which indirect block maps a block (none for the first twelve), and where the next one starts.
fn indirect_group(block: u64, pointers: u64) -> (Option<u64>, u64) {
    if block < 12 {
        (None, 12)
    } else {
        let group = (block - 12) / pointers;
        (Some(group), 12 + (group + 1) * pointers)
    }
}

fn xattr_size(xattrs: &[Xattr]) -> u64 {
    let one = |(name, value): &Xattr| {
        let short = name.len().saturating_sub(5) as u64;
        16 + short.next_multiple_of(4) + (value.len() as u64).next_multiple_of(4)
    };
    xattrs.iter().map(one).sum()
}

/// Counts what goes in, and keeps nothing of it.
pub(crate) struct Count {
    pub(crate) meter: Meter,
}

impl Sink for Count {
    fn add(&mut self, entry: Entry<'_>, progress: &mut dyn Progress) -> Result<()> {
        if progress.cancelled() {
            return Err(Error::Interrupted);
        }
        self.meter.entry(&entry);
        if let Node::File { content, .. } = entry.node {
            let mut extents = Vec::new();
            while let Some(extent) = content.next_extent().at("read", entry.path)? {
                extents.push(extent);
            }
            self.meter.file(&extents);
        }
        Ok(())
    }
}
