//! Sizes that follow from the header, which all other structures are read by.

use super::RefcountWidth;

/// How an image is laid out: what is needed to understand its tables. Made by [`super::Header::layout`], so the numbers
/// are within their limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The version of the format: 2 or 3.
    pub version: u32,
    /// The size of a cluster as a power of two: 9 to 21.
    pub cluster_bits: u32,
    /// The width of a reference count.
    pub refcount_width: RefcountWidth,
    /// Whether L2 entries have a bitmap of subclusters.
    pub extended_l2: bool,
    /// Whether guest clusters are in another file.
    pub data_file: bool,
}

/// Subclusters in a cluster, where there are any.
pub(crate) const SUBCLUSTERS: u32 = 32;

impl Layout {
    /// Bytes in a cluster.
    #[inline]
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes in a cluster, for a buffer.
    #[inline]
    pub const fn cluster_len(&self) -> usize {
        1 << self.cluster_bits
    }

    /// The bytes of an offset that are within its cluster, as a mask.
    #[inline]
    pub const fn offset_mask(&self) -> u64 {
        self.cluster_size() - 1
    }

    /// Bytes of an L2 entry: 8, or 16 where it has a bitmap.
    #[inline]
    pub const fn l2_entry_size(&self) -> usize {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// The number of entries in an L2 table, as a power of two.
    #[inline]
    pub const fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// The number of entries in an L2 table.
    #[inline]
    pub const fn l2_entries(&self) -> usize {
        1 << self.l2_bits()
    }

    /// Bytes of the virtual disk that one L2 table maps, as a power of two: at most 39.
    #[inline]
    pub const fn l2_span_bits(&self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    /// Entries that an L1 table needs for a virtual disk of `size` bytes.
    pub const fn l1_entries(&self, size: u64) -> u64 {
        let bits = self.l2_span_bits();
        (size >> bits) + (size & ((1 << bits) - 1) != 0) as u64
    }

    /// Clusters that `bytes` take.
    pub const fn clusters(&self, bytes: u64) -> u64 {
        (bytes >> self.cluster_bits) + (bytes & self.offset_mask() != 0) as u64
    }

    /// Counts in a refcount block, as a power of two: 6 to 24.
    #[inline]
    pub const fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_width.order()
    }

    /// Counts in a refcount block.
    #[inline]
    pub const fn refcount_block_entries(&self) -> u64 {
        1 << self.refcount_block_bits()
    }

    /// Bytes in a subcluster: the whole cluster where entries have no bitmap.
    #[inline]
    pub const fn subcluster_size(&self) -> u64 {
        if self.extended_l2 { self.cluster_size() / SUBCLUSTERS as u64 } else { self.cluster_size() }
    }

    /// Whether an offset is that of a cluster.
    #[inline]
    pub const fn is_aligned(&self, offset: u64) -> bool {
        offset & self.offset_mask() == 0
    }
}
