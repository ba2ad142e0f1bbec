//! Extent trees ("Extent Tree"): the root in the inode's 60 bytes, further nodes in blocks with a checksum at their end.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Block;
use super::checksum::crc32c;

/// The number at the beginning of every node.
pub const MAGIC: u16 = 0xF30A;
/// Levels below the root that a tree can have at most.
pub const MAX_DEPTH: u16 = 5;
/// Blocks in one extent at most.
pub const MAX_LENGTH: u16 = 1 << 15;
/// Blocks in one extent at most that is allocated and not written.
pub const MAX_UNWRITTEN: u16 = MAX_LENGTH - 1;
/// Entries in the root.
pub const ROOT_ENTRIES: u16 = 4;
/// Bytes of the header and of each entry.
pub const ENTRY: usize = 12;
/// Blocks that a file can have: logical numbers have 32 bits, and the last one is not used.
pub const MAX_BLOCKS: u64 = u32::MAX as u64;

/// What a node begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the names are the documentation's")]
pub struct ExtentHeader {
    pub magic: U16,
    pub entries: U16,
    pub max: U16,
    pub depth: U16,
    pub generation: U32,
}

/// An entry of a node above the leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(
    missing_docs,
    reason = "the names are the documentation's, with the halves of one number named alike"
)]
pub struct ExtentIndex {
    pub logical: U32,
    pub child_low: U32,
    pub child_high: U16,
    pub unused: U16,
}

/// An entry of a leaf, as it is on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(
    missing_docs,
    reason = "the names are the documentation's, with the halves of one number named alike"
)]
pub struct ExtentEntry {
    pub logical: U32,
    /// Blocks; above [`MAX_LENGTH`] that many more of blocks allocated and not written.
    pub length: U16,
    pub start_high: U16,
    pub start_low: U32,
}

/// Blocks in a row, of a file and on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The first block, counted from the file's beginning.
    pub logical: u32,
    /// The first block on the disk.
    pub physical: Block,
    /// Blocks; on the disk at most [`MAX_LENGTH`].
    pub length: u32,
    /// Allocated and not written: reads as zeros.
    pub unwritten: bool,
}

impl ExtentHeader {
    /// A header.
    pub fn new(entries: u16, max: u16, depth: u16) -> ExtentHeader {
        ExtentHeader {
            magic: MAGIC.into(),
            entries: entries.into(),
            max: max.into(),
            depth: depth.into(),
            generation: 0.into(),
        }
    }
}

impl ExtentIndex {
    /// An entry for the node in a block, whose first logical block this is.
    #[expect(clippy::cast_possible_truncation, reason = "the parts of one number")]
    pub fn new(logical: u32, child: Block) -> ExtentIndex {
        ExtentIndex {
            logical: logical.into(),
            child_low: (child as u32).into(),
            child_high: ((child >> 32) as u16).into(),
            unused: 0.into(),
        }
    }

    /// The block with the node below.
    pub fn child(&self) -> Block {
        u64::from(self.child_high.get()) << 32 | u64::from(self.child_low.get())
    }
}

impl ExtentEntry {
    /// The blocks it stands for.
    pub fn extent(&self) -> Extent {
        let length = self.length.get();
        let unwritten = length > MAX_LENGTH;
        Extent {
            logical: self.logical.get(),
            physical: u64::from(self.start_high.get()) << 32 | u64::from(self.start_low.get()),
            length: u32::from(if unwritten { length - MAX_LENGTH } else { length }),
            unwritten,
        }
    }
}

impl Extent {
    /// As it goes to the disk. The length must be one that an entry can have.
    #[expect(clippy::cast_possible_truncation, reason = "the parts of one number")]
    pub fn entry(&self) -> ExtentEntry {
        let most = if self.unwritten { MAX_UNWRITTEN } else { MAX_LENGTH };
        assert!(
            self.length >= 1 && self.length <= u32::from(most),
            "an entry cannot have {} blocks",
            self.length
        );
        let length = self.length as u16;
        ExtentEntry {
            logical: self.logical.into(),
            length: if self.unwritten { length + MAX_LENGTH } else { length }.into(),
            start_high: ((self.physical >> 32) as u16).into(),
            start_low: (self.physical as u32).into(),
        }
    }
}

/// Entries that a node in a block has room for.
#[expect(clippy::cast_possible_truncation, reason = "a block has at most 64 KiB")]
pub fn entries_in_block(block_size: u32) -> u16 {
    ((block_size as usize - ENTRY) / ENTRY) as u16
}

/// Where the checksum of a node in a block is: after the room for entries.
pub fn tail(block: &[u8]) -> Option<usize> {
    let header = ExtentHeader::ref_from_prefix(block).ok()?.0;
    let at = ENTRY + ENTRY * usize::from(header.max.get());
    (at + 4 <= block.len()).then_some(at)
}

/// The checksum of a node in a block; the beginning is [`super::Seed::of_inode`].
pub fn sum(begin: u32, block: &[u8]) -> Option<u32> {
    Some(crc32c(begin, &block[..tail(block)?]))
}

/// Sets the checksum of a node in a block.
pub fn seal(begin: u32, block: &mut [u8]) {
    let at = tail(block).expect("a node has room for its checksum");
    let sum = crc32c(begin, &block[..at]);
    block[at..at + 4].copy_from_slice(&sum.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_back() {
        for (length, unwritten, stored) in
            [(1, false, 1), (32768, false, 32768), (1, true, 32769), (32767, true, 65535)]
        {
            let extent = Extent { logical: 7, physical: 0x1234_5678_9abc, length, unwritten };
            let entry = extent.entry();
            assert_eq!(entry.length.get(), stored);
            assert_eq!(entry.extent(), extent);
        }
        assert_eq!(ExtentIndex::new(1, 0xffff_1234_5678).child(), 0xffff_1234_5678);
        assert_eq!((entries_in_block(4096), entries_in_block(1024)), (340, 84));
    }
}
