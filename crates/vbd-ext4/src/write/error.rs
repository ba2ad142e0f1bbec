//! What can go wrong while a filesystem is written.

use std::io;

use crate::format::acl::AclError;
use crate::format::{Block, Ino};

/// Results of this module.
pub type Result<T> = std::result::Result<T, WriteError>;

/// Why a filesystem cannot be made, or an entry not be written into it.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A setting that no filesystem can have.
    #[error("{what} cannot be {value}: {must}")]
    Setting {
        /// Which one.
        what: &'static str,
        /// What was asked for.
        value: String,
        /// What can be.
        must: String,
    },
    /// The size leaves no room for the filesystem's own structures.
    #[error(
        "{size} bytes are too small for an ext4 filesystem of these settings; make it larger, or ask for fewer inodes or no journal"
    )]
    TooSmall {
        /// The size asked for.
        size: u64,
    },
    /// No blocks are left.
    #[error("the filesystem is full: {needed} blocks of {block_size} bytes are needed, {free} are free")]
    NoBlocks {
        /// Blocks asked for.
        needed: u64,
        /// Blocks that are left.
        free: u64,
        /// Bytes of a block.
        block_size: u32,
    },
    /// No inodes are left.
    #[error(
        "the filesystem has no inodes left: all {0} are in use; ask for more inodes, or fewer bytes per inode"
    )]
    NoInodes(u64),
    /// A time that an inode cannot hold.
    #[error("the time {0} seconds after 1970 does not fit into an inode, which goes from 1901 to 2446")]
    Time(i64),
    /// Permission bits beyond 0o7777.
    #[error("{0:#o} are no permission bits")]
    Mode(u16),
    /// A name that no entry can have.
    #[error("a name of {0} bytes, or with a slash or zero byte in it, cannot be that of an entry")]
    Name(usize),
    /// Two entries of a directory with one name.
    #[error("the name {0:?} comes twice in one directory")]
    Twice(String),
    /// The root has an entry `lost+found` that is no directory.
    #[error(
        "lost+found in the root is no directory: e2fsck needs that name; rename the entry or leave it out"
    )]
    LostAndFound,
    /// A directory with more entries than its tree of hashes can reach.
    #[error("{0} entries are too many for one directory")]
    DirectorySize(usize),
    /// A symbolic link's target.
    #[error("the target of a symbolic link has {length} bytes; from 1 to {most} can be")]
    Symlink {
        /// Its bytes.
        length: usize,
        /// How many can be.
        most: usize,
    },
    /// A file that is larger than the block numbers of extents reach, or extents that are not in it.
    #[error("a file of {size} bytes cannot have these extents: {why}")]
    File {
        /// Bytes of the file.
        size: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// More hard links than an inode can count.
    #[error("{0} hard links; an inode of ext4 has at least one and at most 65000")]
    Links(u32),
    /// A device number with more bits than there is room for.
    #[error("device {major}:{minor}: the major number has at most 12 bits, the minor one 20")]
    Device {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// An extended attribute that ext4 has no way to keep.
    #[error("the extended attribute {name:?} of {length} bytes cannot be kept: {why}")]
    Xattr {
        /// Its name.
        name: String,
        /// Bytes of its value.
        length: usize,
        /// What is in the way.
        why: &'static str,
    },
    /// An ACL that is none.
    #[error("the extended attribute {name:?} is no POSIX ACL: {source}")]
    Acl {
        /// Its name.
        name: String,
        /// What is wrong with it.
        source: AclError,
    },
    /// An inode was written that was not reserved, or twice; or the root never.
    #[error("inode {ino} {why}")]
    Inode {
        /// Which one.
        ino: Ino,
        /// What is wrong.
        why: &'static str,
    },
    /// The UUID at the end is not the one that the checksums began with.
    #[error("the UUID cannot change any more: the checksums of this filesystem begin with it")]
    Uuid,
    /// The image could not be written.
    #[error("writing block {block} of the filesystem: {source}")]
    Io {
        /// The first of the blocks.
        block: Block,
        /// What the system says.
        source: io::Error,
    },
    /// The image could not be made as long as it should be.
    #[error("making the image {size} bytes long: {source}")]
    Extend {
        /// How long.
        size: u64,
        /// What the system says.
        source: io::Error,
    },
}

impl WriteError {
    /// A setting that cannot be.
    pub(crate) fn setting(what: &'static str, value: impl ToString, must: impl Into<String>) -> WriteError {
        WriteError::Setting { what, value: value.to_string(), must: must.into() }
    }
}
