//! Reference counts: blocks of them, and the table of the blocks ("Host cluster management").

use super::{Error, Layout, Malformed, Result, be16, be32, be64};

/// The width of a reference count: 1 to 64 bits, a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountWidth(u8);

impl RefcountWidth {
    /// The width that all version 2 images have: 16 bits.
    pub const V2: RefcountWidth = RefcountWidth(4);

    /// The width of `1 << order` bits.
    ///
    /// # Errors
    ///
    /// The order is more than 6.
    pub fn from_order(order: u32) -> Result<Self> {
        match u8::try_from(order) {
            Ok(order @ 0..=6) => Ok(RefcountWidth(order)),
            _ => Err(Error::field("refcount_order", order, "it is 0 to 6, for counts of 1 to 64 bits")),
        }
    }

    /// The width of so many bits.
    ///
    /// # Errors
    ///
    /// That is no power of two from 1 to 64.
    pub fn from_bits(bits: u32) -> Result<Self> {
        match bits {
            1 | 2 | 4 | 8 | 16 | 32 | 64 => Self::from_order(bits.trailing_zeros()),
            _ => Err(Error::field("the width of refcounts", bits, "it is 1, 2, 4, 8, 16, 32 or 64 bits")),
        }
    }

    /// The logarithm of the width.
    #[inline]
    pub const fn order(self) -> u32 {
        self.0 as u32
    }

    /// The width in bits.
    #[inline]
    pub const fn bits(self) -> u32 {
        1 << self.0
    }

    /// The largest count.
    #[inline]
    pub const fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// A count out of a block.
    ///
    /// # Panics
    ///
    /// The block has no such index.
    pub fn get(self, block: &[u8], index: usize) -> u64 {
        match self.0 {
            // Below a byte, the first count is in the least significant bits.
            order @ 0..=2 => {
                let per_byte = 3 - order;
                let shift = (index & ((1 << per_byte) - 1)) << order;
                u64::from(block[index >> per_byte] >> shift) & self.max()
            }
            3 => block[index].into(),
            4 => be16(block, index * 2).into(),
            5 => be32(block, index * 4).into(),
            _ => be64(block, index * 8),
        }
    }

    /// Sets a count in a block.
    ///
    /// # Panics
    ///
    /// The block has no such index, or the count is more than [`RefcountWidth::max`].
    pub fn set(self, block: &mut [u8], index: usize, count: u64) {
        assert!(count <= self.max(), "a count of {count} in {} bits", self.bits());
        let bytes = count.to_be_bytes();
        match self.0 {
            order @ 0..=2 => {
                let per_byte = 3 - order;
                let shift = (index & ((1 << per_byte) - 1)) << order;
                let byte = &mut block[index >> per_byte];
                let mask = self.max().to_be_bytes()[7] << shift;
                *byte = *byte & !mask | bytes[7] << shift;
            }
            3 => block[index] = bytes[7],
            4 => block[index * 2..][..2].copy_from_slice(&bytes[6..]),
            5 => block[index * 4..][..4].copy_from_slice(&bytes[4..]),
            _ => block[index * 8..][..8].copy_from_slice(&bytes),
        }
    }
}

/// An entry of the refcount table: where a block of counts is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountTableEntry(pub u64);

impl RefcountTableEntry {
    const RESERVED: u64 = 0x1ff;

    /// Bits that are set and reserved.
    pub const fn reserved(self) -> u64 {
        self.0 & Self::RESERVED
    }

    /// The offset of the block, whatever it is; 0 where there is none.
    pub const fn offset(self) -> u64 {
        self.0 & !Self::RESERVED
    }

    /// The offset of the block, if there is one.
    ///
    /// # Errors
    ///
    /// It is not aligned to a cluster.
    pub fn decode(self, layout: &Layout) -> Result<Option<u64>, Malformed> {
        match self.offset() {
            0 => Ok(None),
            offset if layout.is_aligned(offset) => Ok(Some(offset)),
            offset => Err(Malformed::Misaligned(offset)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Each count is where it was put and nowhere else, whatever the width.
        #[test]
        fn counts_keep_apart(order in 0u32..=6, writes in prop::collection::vec((0usize..64, any::<u64>()), 1..200)) {
            let width = RefcountWidth::from_order(order).unwrap();
            let mut block = vec![0; 512];
            let mut model = [0u64; 64];
            for (index, count) in writes {
                let count = count & width.max();
                width.set(&mut block, index, count);
                model[index] = count;
                for (index, count) in model.iter().enumerate() {
                    prop_assert_eq!(width.get(&block, index), *count);
                }
            }
        }
    }

    #[test]
    fn narrow_counts_begin_at_the_least_significant_bits() {
        let width = |order| RefcountWidth::from_order(order).unwrap();
        let block = [0b1010_0110, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde];
        assert_eq!(
            (0..8).map(|index| width(0).get(&block, index)).collect::<Vec<_>>(),
            [0, 1, 1, 0, 0, 1, 0, 1]
        );
        assert_eq!((0..4).map(|index| width(1).get(&block, index)).collect::<Vec<_>>(), [2, 1, 2, 2]);
        assert_eq!((0..3).map(|index| width(2).get(&block, index)).collect::<Vec<_>>(), [6, 10, 2]);
        assert_eq!(width(3).get(&block, 7), 0xde);
        assert_eq!(width(4).get(&block, 1), 0x3456);
        assert_eq!(width(5).get(&block, 1), 0x789a_bcde);
        assert_eq!(width(6).get(&block, 0), 0xa612_3456_789a_bcde);
    }

    #[test]
    fn widths_that_are_none() {
        assert!(RefcountWidth::from_order(7).is_err());
        for bits in [0, 3, 12, 65, 128] {
            assert!(RefcountWidth::from_bits(bits).is_err());
        }
        assert_eq!(RefcountWidth::from_bits(64).unwrap().max(), u64::MAX);
        assert_eq!(RefcountWidth::from_bits(1).unwrap().max(), 1);
    }
}
