//! The orphan file ("Orphan file"): blocks of inode numbers, each block with a number and a checksum at its end.

use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::Block;
use super::checksum::crc32c;

/// The number in each block's tail.
pub const MAGIC: u32 = 0x0b10_ca04;

/// What ends a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the names are the documentation's")]
pub struct Tail {
    pub magic: U32,
    pub checksum: U32,
}

/// The checksum of a block at its place; the beginning is [`super::Seed::of_inode`].
pub fn sum(begin: u32, place: Block, block: &[u8]) -> u32 {
    crc32c(crc32c(begin, &place.to_le_bytes()), &block[..block.len() - size_of::<Tail>()])
}

/// Writes the tail of a block.
pub fn seal(begin: u32, place: Block, block: &mut [u8]) {
    let tail = Tail { magic: MAGIC.into(), checksum: sum(begin, place, block).into() };
    let at = block.len() - size_of::<Tail>();
    block[at..].copy_from_slice(tail.as_bytes());
}
