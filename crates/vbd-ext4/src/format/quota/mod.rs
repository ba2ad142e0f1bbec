//! Quota files of the version "vfsv1": usage and limits of each user, group or project, in a tree of their numbers.
//!
//! A file is pages of 1 KiB: a header, the root of the tree, and then nodes and leaves as they were needed. The tree has four
//! levels, one for each byte of a number, the highest first. Its last level names a leaf, which holds the entries of up to
//! 14 numbers in no order. Pages are linked lists too: of those that are free, and of leaves that have room.

mod tree;

pub use tree::{Pages, PagesMut, Tree, TreeError};

use std::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a page.
pub const PAGE: usize = 1024;
/// The version of files whose counts have 64 bits.
pub const VERSION: u32 = 1;
/// Bytes that limits on space are counted in.
pub const LIMIT_UNIT: u64 = 1024;
/// Entries of a leaf.
pub const IN_LEAF: usize = (PAGE - size_of::<LeafHeader>()) / size_of::<Entry>();

/// Whose usage a file counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Owners.
    User,
    /// Groups.
    Group,
    /// Projects.
    Project,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 3] = [Kind::User, Kind::Group, Kind::Project];

    /// The number that its file begins with.
    pub fn magic(self) -> u32 {
        match self {
            Kind::User => 0xd9c0_1f11,
            Kind::Group => 0xd9c0_1927,
            Kind::Project => 0xd9c0_3f14,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::User => "user",
            Kind::Group => "group",
            Kind::Project => "project",
        })
    }
}

/// What the first page begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// See [`Kind::magic`].
    pub magic: U32,
    /// See [`VERSION`].
    pub version: U32,
    /// Seconds for which more space than the soft limit may be in use.
    pub space_grace: U32,
    /// Seconds for which more inodes than the soft limit may be in use.
    pub inode_grace: U32,
    /// Flags; of no meaning here.
    pub flags: U32,
    /// Pages of the file.
    pub pages: U32,
    /// The first free page, or 0.
    pub free_page: U32,
    /// The first leaf with room, or 0.
    pub free_leaf: U32,
}

/// What a leaf begins with; a free page as well.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct LeafHeader {
    /// The next page of the list that it is in.
    pub next: U32,
    /// The page before it there.
    pub previous: U32,
    /// Entries in use.
    pub entries: U16,
    /// Zeros.
    pub padding: [u8; 6],
}

/// What is counted of a number; all zeros: not in use.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Entry {
    /// The number.
    pub id: U32,
    /// Zeros.
    pub padding: U32,
    /// Inodes that it never has more of.
    pub inode_hard: U64,
    /// Inodes that it has more of for a time only.
    pub inode_soft: U64,
    /// Inodes that it has.
    pub inodes: U64,
    /// The hard limit on space, in units of [`LIMIT_UNIT`].
    pub space_hard: U64,
    /// The soft limit on space, in units of [`LIMIT_UNIT`].
    pub space_soft: U64,
    /// Bytes that it has.
    pub space: U64,
    /// When the time for more space than the soft limit ends, in seconds since 1970; 0: it has not begun.
    pub space_time: U64,
    /// The same for inodes. 1 in an entry that would otherwise be all zeros.
    pub inode_time: U64,
}

const _: () = assert!(size_of::<Header>() == 32 && size_of::<LeafHeader>() == 16);
const _: () = assert!(size_of::<Entry>() == 72 && IN_LEAF == 14);

impl Entry {
    /// One without limits, of which nothing is in use.
    pub fn new(id: u32) -> Entry {
        Entry { id: id.into(), ..Entry::default() }
    }

    /// Counts so much more, or less; never below nothing. Time limits end where it is not above the soft limits any more.
    pub fn add(&mut self, space: i64, inodes: i64) {
        self.space = self.space.get().saturating_add_signed(space).into();
        self.inodes = self.inodes.get().saturating_add_signed(inodes).into();
        if self.space.get() <= self.space_soft.get().saturating_mul(LIMIT_UNIT) {
            self.space_time = 0.into();
        }
        if self.inodes <= self.inode_soft {
            self.inode_time = 0.into();
        }
    }

    /// As it goes to the disk.
    fn stored(mut self) -> Entry {
        if self == Entry::default() {
            self.inode_time = 1.into();
        }
        self
    }
}

/// What a fuzzer calls with the bytes of a file: whatever they are, reading and changing it come to an end without a panic.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    let mut pages = tree::Memory(bytes.to_vec());
    for kind in Kind::ALL {
        let Ok(mut tree) = Tree::open(&pages, kind) else { continue };
        let mut count = 0;
        let _ = tree.walk(&pages, &mut |_| count += 1);
        assert!(count <= bytes.len() / PAGE * (PAGE / 4), "more numbers than there is room for");
        for id in [0, 1, 255, 0x0102_0304, u32::MAX] {
            let mut entry = tree.find(&pages, id).ok().flatten().unwrap_or_else(|| Entry::new(id));
            entry.add(1 << 20, -1);
            if tree.set(&mut pages, entry).is_err() {
                return;
            }
            let _ = tree.find(&pages, id);
        }
    }
}
