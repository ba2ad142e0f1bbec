//! Entries of L1 and L2 tables ("Cluster mapping", "Extended L2 Entries").

use super::Layout;
use super::layout::SUBCLUSTERS;

/// Bits 9 to 55: where a cluster is.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// Why an entry of a table cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The offset is not that of a cluster.
    #[error("the offset {0:#x} is not aligned to a cluster")]
    Misaligned(u64),
    /// The flag for zeros, where the format has none: version 2, or extended entries.
    #[error("it has the flag for zeros, which version 2 and extended entries do not have")]
    ZeroFlag,
    /// A compressed cluster where there can be none: guest clusters are in another file.
    #[error("it is compressed, which clusters in an external data file cannot be")]
    CompressedInDataFile,
    /// The offset of compressed data has bits that no offset has.
    #[error("the offset {0:#x} of compressed data is beyond what an entry can say")]
    TooFar(u64),
    /// Subclusters that are both allocated and zero.
    #[error("the subclusters {0:#010x} are both allocated and zero")]
    Both(u32),
    /// Allocated subclusters without a cluster that they are in.
    #[error("the subclusters {0:#010x} are allocated, and the cluster is not")]
    NoCluster(u32),
    /// A bitmap of subclusters with a compressed cluster.
    #[error("a compressed cluster has the subcluster bitmap {0:#x}, which must be 0")]
    CompressedBitmap(u64),
}

/// An entry of an L1 table: where an L2 table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// The entry that leads to a table at this offset.
    #[inline]
    pub const fn new(offset: u64, copied: bool) -> Self {
        L1Entry(offset & OFFSET | if copied { COPIED } else { 0 })
    }

    /// The offset of the table, whatever it is; 0 where there is none.
    #[inline]
    pub const fn offset(self) -> u64 {
        self.0 & OFFSET
    }

    /// Whether it says that the table's refcount is exactly one.
    #[inline]
    pub const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same with that flag as given.
    #[inline]
    pub const fn with_copied(self, copied: bool) -> Self {
        L1Entry(self.0 & !COPIED | if copied { COPIED } else { 0 })
    }

    /// Bits that are set and reserved.
    #[inline]
    pub const fn reserved(self) -> u64 {
        self.0 & !(OFFSET | COPIED)
    }

    /// The offset of the table, if there is one.
    ///
    /// # Errors
    ///
    /// It is not aligned to a cluster.
    #[inline]
    pub fn decode(self, layout: &Layout) -> Result<Option<u64>, Malformed> {
        match self.offset() {
            0 => Ok(None),
            offset if layout.is_aligned(offset) => Ok(Some(offset)),
            offset => Err(Malformed::Misaligned(offset)),
        }
    }
}

/// An entry of an L2 table, or the first half of an extended one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Entry(pub u64);

/// What an L2 entry says of a cluster. Offsets are in bytes of the image, or of the external data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// The backing file has it, or it reads as zeros.
    Unallocated,
    /// It reads as zeros; a cluster may be set aside for it.
    Zero {
        /// Where that is.
        host: Option<u64>,
    },
    /// It is there. With extended entries, the bitmap says which parts of it are.
    Data {
        /// Where.
        host: u64,
    },
    /// Its compressed form is there.
    Compressed(Compressed),
}

/// Where the compressed form of a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// The first byte; not aligned to anything.
    pub offset: u64,
    /// Bytes up to the end of the last sector: the data ends at or before that.
    pub length: u64,
}

impl Compressed {
    /// The offset behind the last byte.
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

impl L2Entry {
    /// Nothing is there.
    pub const UNALLOCATED: L2Entry = L2Entry(0);
    /// It reads as zeros, and no cluster is set aside. Not for version 2, nor for extended entries.
    pub const ZERO: L2Entry = L2Entry(ZERO);

    /// The entry of a cluster with data at this offset.
    #[inline]
    pub const fn data(host: u64, copied: bool) -> Self {
        L2Entry(host & OFFSET | if copied { COPIED } else { 0 })
    }

    /// The entry of a cluster of zeros for which this one is set aside.
    #[inline]
    pub const fn zero(host: u64, copied: bool) -> Self {
        L2Entry(Self::data(host, copied).0 | ZERO)
    }

    /// The entry of a compressed cluster: `length` bytes at any offset. `None` where an entry cannot say it.
    pub fn compressed(layout: &Layout, offset: u64, length: u64) -> Option<Self> {
        let bits = offset_bits(layout);
        let end = offset.checked_add(length).filter(|_| length > 0)?;
        // Sectors beyond the first, which may be partly another cluster's.
        let sectors = (end - 1) / 512 - offset / 512;
        if sectors >> (62 - bits) != 0 || offset >> bits.min(56) != 0 {
            return None;
        }
        Some(L2Entry(COMPRESSED | sectors << bits | offset))
    }

    /// Whether it says that the cluster's refcount is exactly one.
    #[inline]
    pub const fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same with that flag as given.
    #[inline]
    pub const fn with_copied(self, copied: bool) -> Self {
        L2Entry(self.0 & !COPIED | if copied { COPIED } else { 0 })
    }

    /// Whether the cluster is compressed.
    #[inline]
    pub const fn is_compressed(self) -> bool {
        self.0 & COMPRESSED != 0
    }

    /// The host offset that a standard entry holds, whatever it is.
    #[inline]
    pub const fn offset(self) -> u64 {
        self.0 & OFFSET
    }

    /// Bits that are set and reserved. Those of a compressed cluster are part of its offset.
    #[inline]
    pub const fn reserved(self) -> u64 {
        if self.is_compressed() { 0 } else { self.0 & !(OFFSET | COPIED | ZERO) }
    }

    /// What the entry says. For an extended entry, [`Subclusters`] says more. Reserved bits are passed over: see
    /// [`L2Entry::reserved`].
    ///
    /// # Errors
    ///
    /// The entry is none that a correct image has.
    #[inline]
    pub fn decode(self, layout: &Layout) -> Result<Cluster, Malformed> {
        if self.is_compressed() {
            return self.decode_compressed(layout).map(Cluster::Compressed);
        }
        let host = self.offset();
        if !layout.is_aligned(host) {
            return Err(Malformed::Misaligned(host));
        }
        // The first cluster of an external data file is at 0, and the flag tells it from none.
        let there = host != 0 || (layout.data_file && self.copied());
        if self.0 & ZERO != 0 {
            if layout.version < 3 || layout.extended_l2 {
                return Err(Malformed::ZeroFlag);
            }
            return Ok(Cluster::Zero { host: there.then_some(host) });
        }
        Ok(if there { Cluster::Data { host } } else { Cluster::Unallocated })
    }

    fn decode_compressed(self, layout: &Layout) -> Result<Compressed, Malformed> {
        if layout.data_file {
            return Err(Malformed::CompressedInDataFile);
        }
        let bits = offset_bits(layout);
        let offset = self.0 & ((1 << bits) - 1);
        if offset >> 56 != 0 {
            return Err(Malformed::TooFar(offset));
        }
        let sectors = (self.0 & !(COPIED | COMPRESSED)) >> bits;
        Ok(Compressed { offset, length: (sectors + 1) * 512 - offset % 512 })
    }
}

/// Bits of the offset of compressed data: 49 to 61, as the others hold its length.
const fn offset_bits(layout: &Layout) -> u32 {
    62 - (layout.cluster_bits - 8)
}

/// The second half of an extended L2 entry: two bits for each of 32 subclusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subclusters(pub u64);

impl Subclusters {
    /// No subcluster is allocated or zero.
    pub const NONE: Subclusters = Subclusters(0);
    /// All are allocated.
    pub const ALLOCATED: Subclusters = Subclusters(0xffff_ffff);
    /// All read as zeros.
    pub const ZERO: Subclusters = Subclusters(0xffff_ffff << SUBCLUSTERS);

    /// The bitmap with these bits: subcluster x is bit x of both.
    #[inline]
    pub const fn new(allocated: u32, zero: u32) -> Self {
        Subclusters((zero as u64) << SUBCLUSTERS | allocated as u64)
    }

    /// Subclusters that are allocated.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is wanted")]
    pub const fn allocated(self) -> u32 {
        self.0 as u32
    }

    /// Subclusters that read as zeros.
    #[inline]
    pub const fn zero(self) -> u32 {
        (self.0 >> SUBCLUSTERS) as u32
    }

    /// Whether the two halves and the entry before them fit together.
    ///
    /// # Errors
    ///
    /// They do not.
    pub fn validate(self, cluster: Cluster) -> Result<(), Malformed> {
        match cluster {
            Cluster::Compressed(_) if self.0 != 0 => Err(Malformed::CompressedBitmap(self.0)),
            _ if self.allocated() & self.zero() != 0 => Err(Malformed::Both(self.allocated() & self.zero())),
            Cluster::Unallocated if self.allocated() != 0 => Err(Malformed::NoCluster(self.allocated())),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::RefcountWidth;
    use super::*;
    use proptest::prelude::*;

    fn layout(cluster_bits: u32) -> Layout {
        Layout {
            version: 3,
            cluster_bits,
            refcount_width: RefcountWidth::V2,
            extended_l2: false,
            data_file: false,
        }
    }

    #[test]
    fn entries_of_every_kind() {
        let v3 = layout(16);
        assert_eq!(L2Entry(0).decode(&v3), Ok(Cluster::Unallocated));
        assert_eq!(L2Entry(1).decode(&v3), Ok(Cluster::Zero { host: None }));
        assert_eq!(L2Entry::zero(0x5_0000, true).decode(&v3), Ok(Cluster::Zero { host: Some(0x5_0000) }));
        assert_eq!(L2Entry::data(0x5_0000, true).decode(&v3), Ok(Cluster::Data { host: 0x5_0000 }));
        assert_eq!(L2Entry(0x5_0200).decode(&v3), Err(Malformed::Misaligned(0x5_0200)));
        assert_eq!(L2Entry(0x3f00_0000_0005_01fe).reserved(), 0x3f00_0000_0000_01fe);
        assert_eq!(L1Entry(0x7f00_0000_0005_01ff).reserved(), 0x7f00_0000_0000_01ff);
        for other in [Layout { version: 2, ..v3 }, Layout { extended_l2: true, ..v3 }] {
            assert_eq!(L2Entry(1).decode(&other), Err(Malformed::ZeroFlag));
        }
        let external = Layout { data_file: true, ..v3 };
        assert_eq!(L2Entry::data(0, true).decode(&external), Ok(Cluster::Data { host: 0 }));
        assert_eq!(L2Entry::data(0, false).decode(&external), Ok(Cluster::Unallocated));
        assert_eq!(L2Entry(1 << 62).decode(&external), Err(Malformed::CompressedInDataFile));
    }

    #[test]
    fn compressed_descriptors_at_the_limits_of_the_format() {
        // Clusters of 64 KiB: 54 bits of offset, 8 of sectors.
        let entry = L2Entry(1 << 62 | 3 << 54 | 0x12_3456);
        let compressed = Compressed { offset: 0x12_3456, length: 4 * 512 - 0x56 };
        assert_eq!(entry.decode(&layout(16)), Ok(Cluster::Compressed(compressed)));
        assert_eq!(L2Entry::compressed(&layout(16), 0x12_3456, compressed.length), Some(entry));
        // Clusters of 512 bytes: 61 bits of offset, of which those above 55 must be 0.
        assert_eq!(L2Entry(1 << 62 | 1 << 56).decode(&layout(9)), Err(Malformed::TooFar(1 << 56)));
        assert_eq!(L2Entry::compressed(&layout(9), 1 << 56, 1), None);
        // Clusters of 2 MiB: compressed data is below 512 TiB.
        assert_eq!(L2Entry::compressed(&layout(21), 1 << 49, 1), None);
        assert!(L2Entry::compressed(&layout(21), (1 << 49) - 1, 2 << 20).is_some());
        assert_eq!(L2Entry::compressed(&layout(21), 0, 0), None);
    }

    #[test]
    fn subclusters_that_do_not_fit() {
        let data = Cluster::Data { host: 1 << 16 };
        assert_eq!(Subclusters::new(0b101, 0b010).validate(data), Ok(()));
        assert_eq!(Subclusters::new(0b11, 0b010).validate(data), Err(Malformed::Both(0b10)));
        assert_eq!(Subclusters::new(1, 2).validate(Cluster::Unallocated), Err(Malformed::NoCluster(1)));
        assert_eq!(Subclusters::new(0, 2).validate(Cluster::Unallocated), Ok(()));
        let compressed = Cluster::Compressed(Compressed { offset: 1, length: 1 });
        assert_eq!(Subclusters(5).validate(compressed), Err(Malformed::CompressedBitmap(5)));
    }

    proptest! {
        /// What is made of an offset and a length decodes to a range that begins there, covers the length and ends less
        /// than a sector behind it.
        #[test]
        fn compressed_descriptors_say_what_they_were_made_of(
            bits in 9u32..=21, offset in 0u64..1 << 49, length in 1u64..=1 << 21,
        ) {
            let layout = layout(bits);
            let made = L2Entry::compressed(&layout, offset, length);
            // Two sectors more than the cluster has can never be said, and what the cluster has always.
            prop_assert!(made.is_some() || length > layout.cluster_size() - 512);
            if let Some(entry) = made {
                let Ok(Cluster::Compressed(found)) = entry.decode(&layout) else { panic!("{entry:?}") };
                prop_assert_eq!(found.offset, offset);
                prop_assert!(found.length >= length && found.length < length + 512);
                prop_assert_eq!(found.end() % 512, 0);
            }
        }

        #[test]
        fn no_entry_panics(raw: u64, bits in 9u32..=21, extended: bool, data_file: bool, version in 2u32..=3) {
            let layout = Layout { extended_l2: extended, data_file, version, ..layout(bits) };
            if let Ok(cluster) = L2Entry(raw).decode(&layout) {
                let _ = Subclusters(raw.rotate_left(7)).validate(cluster);
                if let Cluster::Compressed(compressed) = cluster {
                    // The field of the length can say twice what a cluster has.
                    prop_assert!(compressed.offset < 1 << 56);
                    prop_assert!(compressed.length <= 2 * layout.cluster_size());
                }
            }
            let _ = L1Entry(raw).decode(&layout);
        }
    }
}
