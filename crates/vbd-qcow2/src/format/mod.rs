//! The structures of a qcow2 file, as its specification has them. Numbers are big-endian.
//!
//! Everything read here is hostile until checked: what sizes an allocation has a limit, and an error names the field, its
//! value and what it may be. The limits are those of QEMU where the specification has none, so that an image that one
//! of the two opens is one that the other opens.

mod bitmap;
mod entry;
mod error;
mod extension;
pub mod fuzz;
mod header;
mod layout;
mod refcount;
mod snapshot;

pub use bitmap::{
    BitmapEntry, BitmapFlags, BitmapTableEntry, encode_bitmaps, parse_bitmaps, read_bitmap_table,
    read_bitmaps,
};
pub use entry::{Cluster, Compressed, L1Entry, L2Entry, Malformed, Subclusters};
pub use error::{Error, Result};
pub(crate) use extension::printable;
pub use extension::{BitmapsExtension, CryptoHeader, Extension, FeatureKind, FeatureName, feature_table};
pub use header::{Compression, Encryption, Header, at, autoclear, compatible, incompatible};
pub use layout::Layout;
pub use refcount::{RefcountTableEntry, RefcountWidth};
pub use snapshot::{Snapshot, encode_snapshots, parse_snapshots, read_snapshots};

/// What a qcow2 file begins with.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Limits that the specification does not set and QEMU does.
pub mod limit {
    /// Bytes of an L1 table.
    pub const L1_BYTES: u64 = 32 << 20;
    /// Bytes of the refcount table.
    pub const REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
    /// Snapshots in an image.
    pub const SNAPSHOTS: u32 = 65_536;
    /// Bytes of the snapshot table.
    pub const SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;
    /// Bytes of extra data of one snapshot.
    pub const SNAPSHOT_EXTRA: u32 = 1024;
    /// Bytes of the name of a backing file.
    pub const BACKING_NAME: u32 = 1023;
    /// Bytes of the LUKS header with its key material: those of eight slots for the largest keys, and some to spare.
    pub const CRYPTO_BYTES: u64 = 32 << 20;
    /// Bitmaps in an image.
    pub const BITMAPS: u32 = 65_535;
    /// Bytes of the bitmap directory.
    pub const BITMAP_DIRECTORY_BYTES: u64 = 65_535 * 1024;
    /// Bytes of a bitmap's name.
    pub const BITMAP_NAME: u16 = 1023;
    /// Bytes of one bitmap's data.
    pub const BITMAP_BYTES: u64 = 512 << 20;
    /// The smallest and largest granularity of a bitmap, as powers of two.
    pub const BITMAP_GRANULARITY: std::ops::RangeInclusive<u8> = 9..=31;
    /// The smallest and largest cluster, as powers of two.
    pub const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
    /// The smallest cluster with extended L2 entries, as a power of two.
    pub const EXTENDED_L2_CLUSTER_BITS: u32 = 14;
    /// The largest virtual disk in bytes: what a file offset can say, in whole sectors.
    pub const SIZE: u64 = (1 << 63) - 512;
}

/// The big-endian number at an offset of bytes that are known to reach that far.
pub(crate) fn be16(bytes: &[u8], offset: usize) -> u16 {
    u16::from_be_bytes(bytes[offset..offset + 2].try_into().expect("two bytes"))
}

/// See [`be16`].
pub(crate) fn be32(bytes: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}

/// See [`be16`].
pub(crate) fn be64(bytes: &[u8], offset: usize) -> u64 {
    u64::from_be_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}
