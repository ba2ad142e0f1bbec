//! Reference counts: blocks of them, and the table of the blocks ("Host cluster management").

use std::ops::Range;

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

    /// Adds one to each of these counts of a block: those of clusters that are in use and get one more reference.
    ///
    /// # Errors
    ///
    /// The index of a count that is 0, or the largest there is. Nothing was changed.
    ///
    /// # Panics
    ///
    /// The block has no such indices.
    pub fn raise(self, block: &mut [u8], range: Range<usize>) -> std::result::Result<(), usize> {
        let max = self.max();
        // The usual width, as one loop that the compiler makes vectors of.
        if self.0 == 4 {
            let counts = pairs(block, range.clone());
            let is_stuck = |pair: &[u8; 2]| matches!(u16::from_be_bytes(*pair), 0 | u16::MAX);
            if counts.iter().fold(false, |stuck, pair| stuck | is_stuck(pair)) {
                let at = counts.iter().position(is_stuck).unwrap_or(0);
                return Err(range.start + at);
            }
            counts.iter_mut().for_each(|pair| *pair = (u16::from_be_bytes(*pair) + 1).to_be_bytes());
            return Ok(());
        }
        let is_stuck = |index: &usize| self.get(block, *index) == 0 || self.get(block, *index) == max;
        let stuck = range.clone().find(is_stuck);
        if let Some(index) = stuck {
            return Err(index);
        }
        for index in range {
            let count = self.get(block, index);
            self.set(block, index, count + 1);
        }
        Ok(())
    }

    /// Takes one from each of these counts of a block, where each is at least `least`.
    ///
    /// # Errors
    ///
    /// The index of a count that is less. Nothing was changed.
    ///
    /// # Panics
    ///
    /// The block has no such indices, or `least` is 0.
    pub fn lower(self, block: &mut [u8], range: Range<usize>, least: u16) -> std::result::Result<(), usize> {
        assert!(least > 0, "no count is less than 0");
        if self.0 == 4 {
            let counts = pairs(block, range.clone());
            let is_less = |pair: &[u8; 2]| u16::from_be_bytes(*pair) < least;
            if counts.iter().fold(false, |less, pair| less | is_less(pair)) {
                let at = counts.iter().position(is_less).unwrap_or(0);
                return Err(range.start + at);
            }
            counts.iter_mut().for_each(|pair| *pair = (u16::from_be_bytes(*pair) - 1).to_be_bytes());
            return Ok(());
        }
        if let Some(index) = range.clone().find(|index| self.get(block, *index) < u64::from(least)) {
            return Err(index);
        }
        for index in range {
            let count = self.get(block, index);
            self.set(block, index, count - 1);
        }
        Ok(())
    }
}

/// Counts of 16 bits.
fn pairs(block: &mut [u8], range: Range<usize>) -> &mut [[u8; 2]] {
    block[range.start * 2..range.end * 2].as_chunks_mut().0
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

    proptest! {
        /// Many counts at once are changed as one by one, or not at all.
        #[test]
        fn ranges_change_as_a_whole(
            order in 0u32..=6,
            counts in prop::collection::vec(prop_oneof![4 => 1u64..3, 1 => Just(0), 1 => Just(u64::MAX)], 64),
            (start, len) in (0usize..64, 0usize..64),
            (up, least) in (any::<bool>(), 1u16..3),
        ) {
            let width = RefcountWidth::from_order(order).unwrap();
            let mut block = vec![0; 512];
            let counts: Vec<u64> = counts.iter().map(|count| count & width.max()).collect();
            for (index, count) in counts.iter().enumerate() {
                width.set(&mut block, index, *count);
            }
            let range = start..(start + len).min(64);
            let fits = |count: u64| if up { count > 0 && count < width.max() } else { count >= least.into() };
            let misfit = range.clone().find(|index| !fits(counts[*index]));
            let done = if up { width.raise(&mut block, range.clone()) } else { width.lower(&mut block, range.clone(), least) };
            prop_assert_eq!(done, misfit.map_or(Ok(()), Err));
            for (index, before) in counts.iter().enumerate() {
                let after = match (misfit, range.contains(&index)) {
                    (None, true) if up => before + 1,
                    (None, true) => before - 1,
                    _ => *before,
                };
                prop_assert_eq!(width.get(&block, index), after);
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
