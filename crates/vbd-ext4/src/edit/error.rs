//! What can go wrong while a filesystem is changed.

use std::io;

use crate::format::Ino;
use crate::{read, write};

/// Results of this module.
pub type Result<T> = std::result::Result<T, EditError>;

/// Why a filesystem cannot be changed so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EditError {
    /// The filesystem is one that is not changed here; the reason names a remedy where there is one.
    #[error("the filesystem cannot be changed: {0}")]
    Refused(String),
    /// What is there cannot be read.
    #[error(transparent)]
    Read(#[from] read::Error),
    /// Something that no entry can be.
    #[error(transparent)]
    Write(#[from] write::WriteError),
    /// The image could not be written.
    #[error("writing {length} bytes at byte {offset} of the filesystem: {error}")]
    Io {
        /// Where, in bytes from the start of the filesystem.
        offset: u64,
        /// How many bytes.
        length: usize,
        /// What the system said.
        error: io::Error,
    },
    /// The writes could not be made durable.
    #[error("flushing what was written to the image: {0}")]
    Sync(io::Error),
    /// The new content could not be read.
    #[error("reading the new content: {0}")]
    Content(io::Error),
    /// No blocks are left. Those that the same change frees do not count.
    #[error("the filesystem is full: {needed} blocks of {block_size} bytes are needed, {free} are free")]
    NoBlocks {
        /// Blocks asked for.
        needed: u64,
        /// Blocks that can be used.
        free: u64,
        /// Bytes of a block.
        block_size: u32,
    },
    /// No inodes are left.
    #[error("the filesystem has no inodes left: all {0} are in use")]
    NoInodes(u32),
    /// More changes than the journal can take at once.
    #[error(
        "the change is too large for the filesystem's journal: it takes {needed} blocks of {block_size} bytes, the journal has {room}; do it in parts, or make the journal larger (`tune2fs -O ^has_journal`, then `tune2fs -J size={}`)",
        (needed * u64::from(*block_size)).div_ceil(1 << 20) + 1
    )]
    TooLarge {
        /// Blocks of the journal that it takes.
        needed: u64,
        /// Blocks that the journal has for that.
        room: u64,
        /// Bytes of a block.
        block_size: u32,
    },
    /// An entry of that name exists.
    #[error("{0:?} exists already")]
    Exists(String),
    /// No entry of that name exists.
    #[error("there is no {0:?}")]
    NotFound(String),
    /// A directory with entries.
    #[error("the directory {0:?} is not empty")]
    NotEmpty(String),
    /// Somebody asked to stop; what was done until then is whole.
    #[error("interrupted")]
    Interrupted,
    /// An inode that is not of the kind that this can be done with.
    #[error("inode {ino} {why}")]
    Kind {
        /// Which one.
        ino: Ino,
        /// What is wrong with it.
        why: &'static str,
    },
}

impl EditError {
    /// Something that is not as it has to be.
    pub(super) fn corrupt(place: read::Place, reason: impl Into<String>) -> EditError {
        EditError::Read(read::Error::corrupt(place, reason))
    }
}
