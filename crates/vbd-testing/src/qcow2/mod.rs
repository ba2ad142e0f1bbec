//! A second reading of the qcow2 format, for tests: what a disk holds and which refcounts are wrong.
//!
//! Written from the format's specification alone and in the plainest way, over an image that is whole in memory. It shares
//! nothing with the engine, so that the two do not make the same mistake.

mod check;
mod read;

pub use check::Report;

/// Bits of [`Header::incompatible`].
pub mod incompatible {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1;
    /// The image is damaged.
    pub const CORRUPT: u64 = 2;
    /// Data lies in another file.
    pub const DATA_FILE: u64 = 4;
    /// L2 entries have subclusters.
    pub const EXTENDED_L2: u64 = 16;
}

/// The offset in an L1 or L2 entry, or one of a bitmap's table.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Refcount one: may be written in place.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// The fields of the header.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the specification's own names")]
pub struct Header {
    pub version: u32,
    pub backing_file: Option<String>,
    pub cluster_bits: u32,
    pub size: u64,
    pub l1_size: u32,
    pub l1_table_offset: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_clusters: u32,
    pub nb_snapshots: u32,
    pub snapshots_offset: u64,
    pub incompatible: u64,
    pub compatible: u64,
    pub autoclear: u64,
    pub refcount_order: u32,
    pub compression_type: u8,
    /// Type and data of the extensions.
    pub extensions: Vec<(u32, Vec<u8>)>,
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its number, as text.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes and entries of its L1 table.
    pub l1: (u64, u32),
}

/// A persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Bit 0: in use; bit 1: auto.
    pub flags: u32,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// Whether each part is dirty.
    pub bits: Vec<bool>,
    /// Where its table is, and its entries.
    table: (u64, u32),
}

/// An image in memory.
pub struct Image<'a> {
    bytes: &'a [u8],
    /// What the header says.
    pub header: Header,
}

/// Results with what is wrong.
pub type Result<T> = std::result::Result<T, String>;
