//! Reading a filesystem of the ext family out of an image: without mounting it, and without writing to it.
//!
//! [`Filesystem::open`] looks at the superblock, and at the journal where the filesystem was not unmounted: its changes are
//! taken as if they had been replayed. Everything else is read when it is asked for, so opening a large image costs as
//! little as opening a small one. Blocks of metadata are kept in a small cache.
//!
//! The image is hostile until checked: checksums are verified where there are any, every number has its bounds, and no
//! structure makes a reader allocate or run without an end. What a feature that is not known could mean is not guessed:
//! it is refused by its name.

pub(crate) mod blocks;
mod directory;
mod error;
mod file;
pub mod fuzz;
pub(crate) mod geometry;
mod hashed;
mod inode;
pub(crate) mod journal;
mod lookup;
pub(crate) mod map;
mod quota;
pub(crate) mod raw;
mod source;
mod xattr;

pub use crate::format::{Attributes, FileType, Ino, Timestamp, Xattr};
pub use directory::{DirEntry, Entries};
pub use error::{Error, Place, Result};
pub use file::Data;
pub use inode::Inode;
pub use lookup::Links;
pub use source::{Padded, Part, Source, Window};

use crate::format::Superblock;
use crate::format::superblock::{self, incompat, ro_compat, state};
use blocks::Blocks;
use geometry::Geometry;

/// How a filesystem is read.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Whether checksums have to be right. Without that, a damaged image may still give something.
    pub verify: bool,
    /// Whether the changes in the journal count, where there are any.
    pub replay: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { verify: true, replay: true }
    }
}

/// A filesystem that is read. Threads may share it.
pub struct Filesystem {
    pub(crate) geometry: Geometry,
    pub(crate) blocks: Blocks,
    pub(crate) verify: bool,
    replayed: u32,
    /// The transaction that would have been the next in the journal, where there was something in it.
    pub(crate) expected: Option<u32>,
    notes: Vec<String>,
}

/// How full a filesystem is. Sizes are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// All of it.
    pub size: u64,
    /// What is free.
    pub free: u64,
    /// What of the free part only root may use.
    pub reserved: u64,
    /// Inodes.
    pub inodes: u64,
    /// Inodes that are free.
    pub free_inodes: u64,
}

impl Filesystem {
    /// Opens what is in this source.
    ///
    /// # Errors
    ///
    /// No filesystem of this family, one with a feature that is not known, a damaged one.
    pub fn open(source: impl Source + 'static, options: Options) -> Result<Filesystem> {
        Filesystem::open_box(Box::new(source), options)
    }

    fn open_box(source: Box<dyn Source>, options: Options) -> Result<Filesystem> {
        let mut bytes = [0; superblock::SIZE];
        let offset = superblock::OFFSET;
        if source.size() < offset + bytes.len() as u64 {
            return Err(Error::NotExt);
        }
        let length = bytes.len();
        source.read_exact_at(&mut bytes, offset).map_err(|error| Error::Io { offset, length, error })?;
        let geometry = Geometry::new(&bytes, options.verify)?;
        fits(&geometry, &*source)?;
        let blocks = Blocks::new(source, geometry.block_size, geometry.blocks);
        let mut filesystem = Filesystem {
            geometry,
            blocks,
            verify: options.verify,
            replayed: 0,
            expected: None,
            notes: Vec::new(),
        };
        if options.replay && filesystem.geometry.superblock.has_incompat(incompat::RECOVER) {
            filesystem = filesystem.recover()?;
        }
        if filesystem.geometry.superblock.state.get() & state::ERRORS != 0 {
            filesystem.notes.push("it has errors that the kernel found; run e2fsck".to_owned());
        }
        Ok(filesystem)
    }

    /// Takes the changes in the journal for done; the superblock may be among them.
    fn recover(self) -> Result<Filesystem> {
        let replay = journal::replay(&self)?;
        let mut notes = Vec::new();
        if let Some(sequence) = replay.damaged {
            notes.push(format!("the journal ends with transaction {sequence}, whose end is damaged"));
        }
        let mut blocks = self.blocks;
        blocks.set_logged(replay.logged);
        let mut bytes = [0; superblock::SIZE];
        blocks.read(superblock::OFFSET, &mut bytes)?;
        let geometry = Geometry::new(&bytes, self.verify)?;
        if geometry.block_size != self.geometry.block_size {
            return Err(Error::corrupt(Place::Superblock, "the journal changes the size of blocks"));
        }
        fits(&geometry, blocks.source())?;
        // It may have been made larger.
        let (source, logged) = blocks.into_parts();
        let mut blocks = Blocks::new(source, geometry.block_size, geometry.blocks);
        blocks.set_logged(logged);
        let (verify, replayed, expected) = (self.verify, replay.transactions, replay.expected);
        Ok(Filesystem { geometry, blocks, verify, replayed, expected, notes })
    }

    /// The superblock, as it is after the journal.
    pub fn superblock(&self) -> &Superblock {
        &self.geometry.superblock
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u32 {
        self.geometry.block_size
    }

    /// How many transactions of the journal were taken for done.
    pub fn replayed(&self) -> u32 {
        self.replayed
    }

    /// What is wrong with it and did not keep it from being read, each the end of a sentence or one of its own.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Bytes of what is allocated at once.
    fn cluster_size(&self) -> u64 {
        let superblock = &self.geometry.superblock;
        let block_size = u64::from(self.geometry.block_size);
        if superblock.has_ro_compat(ro_compat::BIGALLOC) {
            // Checked when it was opened.
            let shift = superblock.log_cluster_size.get().saturating_sub(superblock.log_block_size.get());
            block_size << shift.min(20)
        } else {
            block_size
        }
    }

    /// How full it is, by the group descriptors: the superblock's own numbers are older while it is mounted.
    ///
    /// # Errors
    ///
    /// Damaged descriptors, and those of reading.
    pub fn usage(&self) -> Result<Usage> {
        let geometry = &self.geometry;
        let (mut free, mut free_inodes) = (0u64, 0u64);
        for group in 0..geometry.groups {
            let descriptor = geometry.descriptor(&self.blocks, group, self.verify)?;
            free += u64::from(descriptor.free_blocks());
            free_inodes += u64::from(descriptor.free_inodes());
        }
        let size = geometry.blocks * u64::from(geometry.block_size);
        let free = free.saturating_mul(self.cluster_size()).min(size);
        let reserved = geometry.superblock.reserved_blocks().saturating_mul(u64::from(geometry.block_size));
        let inodes = u64::from(geometry.inodes());
        Ok(Usage { size, free, reserved: reserved.min(free), inodes, free_inodes: free_inodes.min(inodes) })
    }
}

/// A filesystem that is larger than what it is in lacks something.
fn fits(geometry: &Geometry, source: &dyn Source) -> Result<()> {
    let size = geometry.blocks * u64::from(geometry.block_size);
    if size > source.size() {
        let reason = format!("it says it has {size} bytes, and what it is in has {}", source.size());
        return Err(Error::corrupt(Place::Superblock, reason));
    }
    Ok(())
}
