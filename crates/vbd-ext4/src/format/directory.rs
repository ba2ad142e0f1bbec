//! Directories ("Linear (Classic) Directories", "Hash Tree Directories"): blocks of entries, each with a checksum in a false
//! entry at its end; hashed ones begin with a tree of hashes, whose nodes look like empty blocks to those who do not know it.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Ino;
use super::checksum::crc32c;

/// Bytes of an entry before its name.
pub const HEADER: usize = 8;
/// Bytes of the false entry with the checksum.
pub const TAIL: usize = 12;
/// The file type of the false entry.
pub const TAIL_TYPE: u8 = 0xDE;
/// Bytes of a name at most.
pub const MAX_NAME: usize = 255;
/// Where the root of a hash tree has its count and limit: after `.`, `..` and 8 bytes about the tree.
pub const ROOT_COUNT: usize = 32;
/// Where another node has them: after a false entry that covers the block.
pub const NODE_COUNT: usize = 8;
/// Levels below the root of a hash tree: 2 without large_dir counts the leaves' parents as the first.
pub const MAX_INDIRECT: u8 = 1;
/// The same with large_dir.
pub const MAX_INDIRECT_LARGE: u8 = 2;
/// Hard links that a directory can have before its count says 1, "many" (dir_nlink).
pub const MAX_LINKS: u32 = 65_000;

/// An entry, without its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the names are the documentation's")]
pub struct EntryHeader {
    /// 0: not in use.
    pub inode: U32,
    /// Bytes to the next entry; see [`record_length`].
    pub record: U16,
    pub name_length: u8,
    /// See [`super::FileType::from_code`]; without the filetype feature, the name length's upper byte.
    pub file_type: u8,
}

/// The false entry at the end of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the names are the documentation's")]
pub struct Tail {
    pub inode: U32,
    pub record: U16,
    pub name_length: u8,
    pub file_type: u8,
    pub checksum: U32,
}

/// What the root of a hash tree says of the tree, after `.` and `..` (at byte 24).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the names are the documentation's")]
pub struct RootInfo {
    pub reserved: U32,
    pub hash_version: u8,
    pub length: u8,
    pub indirect_levels: u8,
    pub flags: u8,
}

/// Bytes before [`RootInfo`].
pub const ROOT_INFO: usize = 24;

/// How many entries a node of a hash tree has and could have, in the place of the first entry's hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the names are the documentation's")]
pub struct CountLimit {
    pub limit: U16,
    pub count: U16,
}

/// An entry of a node of a hash tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct HashEntry {
    /// The least hash of what is below; bit 0: it goes on from the block before (a collision).
    pub hash: U32,
    /// The block, counted from the directory's beginning.
    pub block: U32,
}

const _: () =
    assert!(size_of::<EntryHeader>() == HEADER && size_of::<Tail>() == TAIL && size_of::<HashEntry>() == 8);

/// Bytes that an entry with a name of this length needs.
pub const fn needed(name_length: usize) -> usize {
    (HEADER + name_length).next_multiple_of(4)
}

/// The number of bytes that a record length means: 64 KiB do not fit into it ("rec_len").
pub fn record_length(stored: u16, block_size: u32) -> u32 {
    match stored {
        0xffff | 0 if block_size >= 65536 => block_size,
        stored if block_size < 65536 => u32::from(stored),
        stored => u32::from(stored & 0xfffc) | u32::from(stored & 3) << 16,
    }
}

/// A record length as it goes to the disk.
#[expect(clippy::cast_possible_truncation, reason = "64 KiB, the one that does not fit, has its own number")]
pub fn stored_record(length: u32) -> u16 {
    if length >= 65536 { 0xffff } else { length as u16 }
}

/// Appends an entry at an offset of a block; the caller has seen to the room.
#[expect(clippy::cast_possible_truncation, reason = "names have at most 255 bytes")]
pub fn put(block: &mut [u8], at: usize, ino: Ino, record: usize, name: &[u8], file_type: u8) {
    let header = EntryHeader {
        inode: ino.into(),
        record: stored_record(record as u32).into(),
        name_length: name.len() as u8,
        file_type,
    };
    block[at..at + HEADER].copy_from_slice(header.as_bytes());
    block[at + HEADER..at + HEADER + name.len()].copy_from_slice(name);
}

/// The false entry at the end of a block of entries, where it has one.
pub fn tail(block: &[u8]) -> Option<&Tail> {
    let tail = Tail::ref_from_suffix(block).ok()?.1;
    let is = tail.inode.get() == 0
        && usize::from(tail.record.get()) == TAIL
        && tail.name_length == 0
        && tail.file_type == TAIL_TYPE;
    is.then_some(tail)
}

/// The checksum of a block of entries; the beginning is [`super::Seed::of_inode`] of the directory.
pub fn sum(begin: u32, block: &[u8]) -> u32 {
    crc32c(begin, &block[..block.len() - TAIL])
}

/// Writes the false entry with its checksum at the end of a block of entries.
#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
pub fn seal(begin: u32, block: &mut [u8]) {
    let tail = Tail {
        inode: 0.into(),
        record: (TAIL as u16).into(),
        name_length: 0,
        file_type: TAIL_TYPE,
        checksum: sum(begin, block).into(),
    };
    let at = block.len() - TAIL;
    block[at..].copy_from_slice(tail.as_bytes());
}

/// Entries that a node of a hash tree has room for; `count_offset` is [`ROOT_COUNT`] or [`NODE_COUNT`].
#[expect(clippy::cast_possible_truncation, reason = "a block has at most 64 KiB")]
pub fn hash_limit(block_size: u32, count_offset: usize, with_sum: bool) -> u16 {
    let room = (block_size as usize - count_offset) / size_of::<HashEntry>();
    (room - usize::from(with_sum)) as u16
}

/// The checksum of a node of a hash tree, where its limit and count fit into the block.
pub fn hash_sum(begin: u32, block: &[u8], count_offset: usize) -> Option<u32> {
    let (at, used) = hash_tail(block, count_offset)?;
    // The tail's first word, and the checksum as zero.
    Some(crc32c(crc32c(crc32c(begin, &block[..used]), &block[at..at + 4]), &[0; 4]))
}

/// The checksum that a node of a hash tree says it has.
pub fn stored_hash_sum(block: &[u8], count_offset: usize) -> Option<u32> {
    let (at, _) = hash_tail(block, count_offset)?;
    Some(u32::from_le_bytes([4, 5, 6, 7].map(|byte| block[at + byte])))
}

/// Sets the checksum of a node of a hash tree.
pub fn hash_seal(begin: u32, block: &mut [u8], count_offset: usize) {
    let (at, _) = hash_tail(block, count_offset).expect("a node has room for its checksum");
    block[at..at + 8].fill(0);
    let sum = hash_sum(begin, block, count_offset).expect("as before");
    block[at + 4..at + 8].copy_from_slice(&sum.to_le_bytes());
}

/// Where the tail of a node is, and where its entries end.
fn hash_tail(block: &[u8], count_offset: usize) -> Option<(usize, usize)> {
    let numbers = CountLimit::ref_from_prefix(block.get(count_offset..)?).ok()?.0;
    let at = count_offset + usize::from(numbers.limit.get()) * size_of::<HashEntry>();
    let used = count_offset + usize::from(numbers.count.get()) * size_of::<HashEntry>();
    (at + 8 <= block.len() && used <= at).then_some((at, used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_lengths() {
        assert_eq!(record_length(4096, 4096), 4096);
        assert_eq!(record_length(0xffff, 65536), 65536);
        assert_eq!(record_length(0, 65536), 65536);
        assert_eq!(record_length(stored_record(65536), 65536), 65536);
        assert_eq!(record_length(stored_record(60), 65536), 60);
        assert_eq!((needed(1), needed(4), needed(5), needed(255)), (12, 12, 16, 264));
    }

    #[test]
    fn limits_as_mke2fs_has_them() {
        assert_eq!(hash_limit(4096, ROOT_COUNT, true), 507);
        assert_eq!(hash_limit(4096, NODE_COUNT, true), 510);
        assert_eq!(hash_limit(4096, ROOT_COUNT, false), 508);
    }
}
