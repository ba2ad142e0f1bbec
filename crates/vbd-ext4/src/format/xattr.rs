//! Extended attributes ("Extended Attributes"): after an inode's fields, and in a block that inodes may share.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Block;
use super::checksum::{Seed, crc32c};

/// The number before attributes in an inode, and at the beginning of a block with some.
pub const MAGIC: u32 = 0xEA02_0000;
/// Bytes at the beginning of a block of attributes.
pub const BLOCK_HEADER: usize = 32;
/// Bytes of an entry before its name.
pub const ENTRY: usize = 16;
/// Inodes that may share a block.
pub const MAX_SHARED: u32 = 1024;
/// Bytes of a value at most, through the kernel's interface.
pub const MAX_VALUE: usize = 65_536;

/// Prefixes of names that have a number. Longer ones come before those that they begin with.
const PREFIXES: [(u8, &[u8]); 7] = [
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (8, b"system.richacl"),
    (1, b"user."),
    (4, b"trusted."),
    (6, b"security."),
    (7, b"system."),
];
/// The number of access ACLs.
pub const ACL_ACCESS: u8 = 2;
/// The number of default ACLs.
pub const ACL_DEFAULT: u8 = 3;
/// The number of what the filesystem keeps for itself: `system.data` is inline data.
pub const SYSTEM: u8 = 7;
/// The number of encryption contexts.
pub const ENCRYPTION: u8 = 9;

/// The beginning of a block of attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the names are the documentation's")]
pub struct BlockHeader {
    pub magic: U32,
    /// Inodes that have this block.
    pub references: U32,
    /// Always 1.
    pub blocks: U32,
    /// See [`block_hash`].
    pub hash: U32,
    pub checksum: U32,
    pub reserved: [U32; 3],
}

/// An attribute, without its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct EntryHeader {
    /// Bytes of the name after its prefix.
    pub name_length: u8,
    /// The prefix; see [`full_name`]. All four first bytes zero: the end.
    pub name_index: u8,
    /// Where the value is: from the first entry in an inode, from the block's beginning in a block.
    pub value_offset: U16,
    /// The inode that is the value (ea_inode), or 0.
    pub value_inum: U32,
    /// Bytes of the value.
    pub value_size: U32,
    /// See [`entry_hash`]; 0 in an inode.
    pub hash: U32,
}

const _: () = assert!(size_of::<BlockHeader>() == BLOCK_HEADER && size_of::<EntryHeader>() == ENTRY);

/// The number of a name's prefix and the rest of the name; `None` for a name that ext4 has no number for.
pub fn split_name(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(index, prefix)| {
        let rest = name.strip_prefix(*prefix)?;
        // A whole name has nothing after it, a prefix something.
        (prefix.ends_with(b".") != rest.is_empty()).then_some((*index, rest))
    })
}

/// The name that a number and a rest mean; `None` for a number that is not known.
pub fn full_name(index: u8, rest: &[u8]) -> Option<Vec<u8>> {
    let (_, prefix) = PREFIXES.iter().find(|(known, _)| *known == index)?;
    Some([prefix, rest].concat())
}

/// Bytes that an entry needs, without its value.
pub const fn entry_size(name_length: usize) -> usize {
    (ENTRY + name_length).next_multiple_of(4)
}

/// The hash of an attribute in a block; names as unsigned characters, which matters beyond ASCII only (older kernels took
/// them as signed on some machines, and every kernel takes either).
pub fn entry_hash(name: &[u8], value: &[u8]) -> u32 {
    hash_value(name.iter().fold(0u32, |hash, byte| hash.rotate_left(5) ^ u32::from(*byte)), value)
}

/// The hash with names as signed characters.
pub fn entry_hash_signed(name: &[u8], value: &[u8]) -> u32 {
    let signed = |byte: &u8| i32::from(byte.cast_signed()).cast_unsigned();
    hash_value(name.iter().fold(0u32, |hash, byte| hash.rotate_left(5) ^ signed(byte)), value)
}

fn hash_value(hash: u32, value: &[u8]) -> u32 {
    value.chunks(4).fold(hash, |hash, bytes| {
        let mut word = [0; 4];
        word[..bytes.len()].copy_from_slice(bytes);
        hash.rotate_left(16) ^ u32::from_le_bytes(word)
    })
}

/// The hash of a block: of its entries' hashes in their order; 0, "not to be shared", if one has none.
pub fn block_hash(entries: impl IntoIterator<Item = u32>) -> u32 {
    let mut hash = 0u32;
    for entry in entries {
        if entry == 0 {
            return 0;
        }
        hash = hash.rotate_left(16) ^ entry;
    }
    hash
}

/// The checksum of a block of attributes at its place.
pub fn sum(seed: Seed, place: Block, block: &[u8]) -> u32 {
    let sum = crc32c(seed.of_block(place), &block[..16]);
    crc32c(crc32c(sum, &[0; 4]), &block[20..])
}

/// Sets the checksum of a block of attributes for its place.
pub fn seal(seed: Seed, place: Block, block: &mut [u8]) {
    let sum = sum(seed, place, block);
    block[16..20].copy_from_slice(&sum.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, split) in [
            (&b"user.a"[..], Some((1, &b"a"[..]))),
            (b"system.posix_acl_access", Some((2, b""))),
            (b"system.posix_acl_default", Some((3, b""))),
            (b"system.posix_acl_accessory", Some((7, b"posix_acl_accessory"))),
            (b"trusted.overlay.opaque", Some((4, b"overlay.opaque"))),
            (b"security.capability", Some((6, b"capability"))),
            (b"user.", None),
            (b"com.apple.quarantine", None),
        ] {
            assert_eq!(split_name(name), split);
            if let Some((index, rest)) = split {
                assert_eq!(full_name(index, rest).as_deref(), Some(name));
            }
        }
        assert_eq!(full_name(99, b"x"), None);
    }
}
