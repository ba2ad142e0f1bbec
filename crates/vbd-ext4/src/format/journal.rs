//! The journal (jbd2, "Journal (jbd2)"): big-endian, in the blocks of an inode.

use std::mem::offset_of;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::crc32c;

/// The number at the beginning of the journal's own blocks.
pub const MAGIC: u32 = 0xC03B_3998;
/// The fewest blocks of a journal.
pub const MIN_BLOCKS: u32 = 1024;

/// Kinds of blocks.
pub mod block_type {
    /// The blocks that follow belong to the filesystem; where is in its tags.
    pub const DESCRIPTOR: u32 = 1;
    /// The end of a transaction.
    pub const COMMIT: u32 = 2;
    /// The superblock, first version.
    pub const SUPERBLOCK_V1: u32 = 3;
    /// The superblock.
    pub const SUPERBLOCK_V2: u32 = 4;
    /// Blocks that transactions before this one must not bring back.
    pub const REVOKE: u32 = 5;
}

/// Features.
pub mod feature {
    /// Compatible: commit blocks have a checksum of the data.
    pub const COMPAT_CHECKSUM: u32 = 1;
    /// Revoke blocks.
    pub const REVOKE: u32 = 1;
    /// Block numbers of 64 bits.
    pub const BITS64: u32 = 2;
    /// Commits without waiting.
    pub const ASYNC_COMMIT: u32 = 4;
    /// Checksums, second version.
    pub const CSUM_V2: u32 = 8;
    /// Checksums, third version.
    pub const CSUM_V3: u32 = 0x10;
    /// Fast commits.
    pub const FAST_COMMIT: u32 = 0x20;
}

/// Bits of a tag's flags.
pub mod tag_flag {
    /// The block began with the journal's number, which was taken off.
    pub const ESCAPE: u32 = 1;
    /// The same UUID as the tag before: none follows.
    pub const SAME_UUID: u32 = 2;
    /// Deleted; never used.
    pub const DELETED: u32 = 4;
    /// The last tag of the block.
    pub const LAST: u32 = 8;
}

/// What the journal's own blocks begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the names are the documentation's")]
pub struct Header {
    pub magic: U32,
    pub block_type: U32,
    pub sequence: U32,
}

/// The journal's superblock, in its first block.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the names are the documentation's")]
pub struct JournalSuperblock {
    pub header: Header,
    pub block_size: U32,
    /// Blocks of the journal, this one included.
    pub blocks: U32,
    /// The first block of the log.
    pub first: U32,
    /// The first transaction expected.
    pub sequence: U32,
    /// Where the log begins; 0: it is empty.
    pub start: U32,
    pub error: U32,
    pub compat: U32,
    pub incompat: U32,
    pub ro_compat: U32,
    pub uuid: [u8; 16],
    pub users_count: U32,
    pub dynamic_superblock: U32,
    pub max_transaction: U32,
    pub max_transaction_data: U32,
    /// 4: CRC-32C.
    pub checksum_type: u8,
    pub padding: [u8; 3],
    pub fast_commit_blocks: U32,
    pub head: U32,
    pub padding2: [U32; 40],
    pub checksum: U32,
    pub users: [u8; 768],
}

/// A tag of a descriptor block with checksums of the third version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(
    missing_docs,
    reason = "the names are the documentation's, with the halves of one number named alike"
)]
pub struct Tag3 {
    pub block_low: U32,
    pub flags: U32,
    pub block_high: U32,
    pub checksum: U32,
}

/// A tag of a descriptor block otherwise; the last field is there with 64-bit numbers only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(
    missing_docs,
    reason = "the names are the documentation's, with the halves of one number named alike"
)]
pub struct Tag {
    pub block_low: U32,
    pub checksum: U16,
    pub flags: U16,
    pub block_high: U32,
}

/// The beginning of a revoke block; block numbers of 4 or 8 bytes follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RevokeHeader {
    /// What every block begins with.
    pub header: Header,
    /// Bytes in use, this header included.
    pub count: U32,
}

/// A commit block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the names are the documentation's")]
pub struct CommitHeader {
    pub header: Header,
    pub checksum_type: u8,
    pub checksum_size: u8,
    pub padding: [u8; 2],
    /// The first is the block's own checksum with version 2 and 3.
    pub checksum: [U32; 8],
    pub seconds: U64,
    pub nanoseconds: U32,
}

const _: () =
    assert!(size_of::<JournalSuperblock>() == 1024 && offset_of!(JournalSuperblock, checksum) == 0xFC);
const _: () = assert!(size_of::<Tag3>() == 16 && size_of::<Tag>() == 12 && size_of::<CommitHeader>() == 60);

impl JournalSuperblock {
    /// What checksums of the journal's blocks begin with.
    pub fn seed(&self) -> u32 {
        crc32c(!0, &self.uuid)
    }

    /// Its own checksum (version 2 and 3).
    pub fn sum(&self) -> u32 {
        let mut copy = self.clone();
        copy.checksum = 0.into();
        crc32c(!0, copy.as_bytes())
    }
}

/// The checksum of a descriptor, revoke or commit block, whose own place for it is at this offset.
pub fn block_sum(seed: u32, block: &[u8], at: usize) -> u32 {
    crc32c(crc32c(crc32c(seed, &block[..at]), &[0; 4]), &block[at + 4..])
}

/// The checksum of a block of the filesystem in the log, as its tag has it (version 2: the lower half).
pub fn data_sum(seed: u32, sequence: u32, block: &[u8]) -> u32 {
    crc32c(crc32c(seed, &sequence.to_be_bytes()), block)
}
