//! Structures of ext4 as they lie on the disk, with the checksums and hashes that bind them.
//!
//! Structures are [`zerocopy`] ones without alignment: [`zerocopy::FromBytes::ref_from_prefix`] reads one out of a block,
//! whatever the bytes are, so nothing here is checked: what a number means, and whether it can be, is for those who read it.
//! Numbers are little-endian, the journal's big-endian.

pub mod acl;
mod attributes;
pub mod checksum;
pub mod directory;
pub mod extent;
pub mod group;
pub mod hash;
pub mod inode;
pub mod journal;
pub mod orphan;
pub mod quota;
pub mod superblock;
mod time;
pub mod xattr;

pub use attributes::{Attributes, FileType, Xattr};
pub use checksum::Seed;
pub use extent::{Extent, ExtentHeader, ExtentIndex};
pub use group::GroupDescriptor;
pub use inode::Inode;
pub use superblock::Superblock;
pub use time::Timestamp;

/// The number of an inode, from 1.
pub type Ino = u32;
/// The number of a block of the filesystem, from 0 at its beginning.
pub type Block = u64;

/// Inode numbers with a meaning ("Special inodes").
pub mod ino {
    use super::Ino;
    /// Blocks with defects.
    pub const BAD_BLOCKS: Ino = 1;
    /// The root directory.
    pub const ROOT: Ino = 2;
    /// Blocks into which the group descriptors may grow.
    pub const RESIZE: Ino = 7;
    /// The journal.
    pub const JOURNAL: Ino = 8;
    /// The first that has no meaning, where the superblock names no other.
    pub const FIRST: Ino = 11;
}
