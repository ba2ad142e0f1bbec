//! What can be wrong with a filesystem that is read.

use std::fmt;
use std::io;

use crate::format::quota;

/// The result of reading.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image itself cannot be read.
    #[error("cannot read {length} bytes at byte {offset} of the filesystem: {error}")]
    Io {
        /// Where, in bytes from the start of the filesystem.
        offset: u64,
        /// How many bytes were asked for.
        length: usize,
        /// What the system said.
        error: io::Error,
    },
    /// There is no filesystem of this family.
    #[error("no ext2, ext3 or ext4 filesystem begins here")]
    NotExt,
    /// It uses something that this reader does not know, or cannot give.
    #[error("{place} uses {feature}, which cannot be read here")]
    Unsupported {
        /// What uses it.
        place: Place,
        /// Its name.
        feature: String,
    },
    /// A checksum does not fit what it is of.
    #[error("{0}: the checksum is wrong; run e2fsck on a copy of the image")]
    Checksum(Place),
    /// Something is not as it has to be.
    #[error("{place}: {reason}; run e2fsck on a copy of the image")]
    Corrupt {
        /// The structure.
        place: Place,
        /// What is wrong with it.
        reason: String,
    },
    /// A path leads to nothing.
    #[error("{}: there is no such file or directory in the image", show(.0))]
    NotFound(Vec<u8>),
    /// A path goes on behind something that is no directory.
    #[error("{}: is not a directory", show(.0))]
    NotDirectory(Vec<u8>),
    /// Symbolic links lead to each other without an end.
    #[error("{}: too many symbolic links", show(.0))]
    Links(Vec<u8>),
}

impl Error {
    /// Something that is not as it has to be.
    pub(crate) fn corrupt(place: Place, reason: impl Into<String>) -> Error {
        Error::Corrupt { place, reason: reason.into() }
    }

    /// A feature that is not known.
    pub(crate) fn unsupported(place: Place, feature: impl Into<String>) -> Error {
        Error::Unsupported { place, feature: feature.into() }
    }
}

/// A path for people: what could steer a terminal is shown as a question mark.
fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).replace(char::is_control, "?")
}

/// A structure of the filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// The superblock.
    Superblock,
    /// The descriptor of this group.
    Group(u32),
    /// This inode.
    Inode(u32),
    /// The extent tree of an inode: this block of it, or the part in the inode.
    Extents {
        /// The inode.
        inode: u32,
        /// The block, 0 for the root.
        block: u64,
    },
    /// An indirect block of an inode.
    Indirect {
        /// The inode.
        inode: u32,
        /// The block.
        block: u64,
    },
    /// A block of a directory.
    Directory {
        /// The directory's inode.
        inode: u32,
        /// Which block of it.
        block: u64,
    },
    /// The extended attributes of an inode: this block, or those inside of the inode.
    Xattrs {
        /// The inode.
        inode: u32,
        /// The block, 0 for those in the inode.
        block: u64,
    },
    /// The journal.
    Journal,
    /// A block of the journal.
    JournalBlock(u32),
    /// The quota file of this kind.
    Quota(quota::Kind),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Superblock => f.write_str("the superblock"),
            Place::Group(number) => write!(f, "the descriptor of group {number}"),
            Place::Inode(number) => write!(f, "inode {number}"),
            Place::Extents { inode, block: 0 } => write!(f, "the extents of inode {inode}"),
            Place::Extents { inode, block } => write!(f, "block {block} of the extent tree of inode {inode}"),
            Place::Indirect { inode, block } => write!(f, "the indirect block {block} of inode {inode}"),
            Place::Directory { inode, block } => write!(f, "block {block} of the directory, inode {inode}"),
            Place::Xattrs { inode, block: 0 } => write!(f, "the extended attributes in inode {inode}"),
            Place::Xattrs { inode, block } => {
                write!(f, "block {block} of extended attributes, of inode {inode}")
            }
            Place::Journal => f.write_str("the journal"),
            Place::JournalBlock(block) => write!(f, "block {block} of the journal"),
            Place::Quota(kind) => write!(f, "the {kind} quota file"),
        }
    }
}
