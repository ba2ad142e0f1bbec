//! Dirty bitmaps: which blocks of a disk were written to.
//!
//! Bits are only ever set while a bitmap is in use; whoever wants to begin anew puts an empty one in its place (see
//! [`track`](crate::track)). So a mark is never lost to somebody who clears at the same time.

use std::fmt;
use std::ops::Range;

use vbd_ring::sync::atomic::{AtomicU64, Ordering};

/// The smallest block that a bit may stand for, in bytes.
pub const MIN_GRANULARITY: u64 = 512;
/// The largest block that a bit may stand for, in bytes.
pub const MAX_GRANULARITY: u64 = 1 << 31;
/// The block that a bit stands for where nothing else was said, in bytes.
pub const DEFAULT_GRANULARITY: u64 = 64 << 10;
/// The most bits in one bitmap: 512 MiB of memory.
pub const MOST_BITS: u64 = 1 << 32;

/// Why there is no such bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BitmapError {
    /// The granularity is none.
    #[error("a granularity of {0} bytes: it is a power of two from 512 to 2147483648")]
    Granularity(u64),
    /// There would be too many bits.
    #[error("{size} bytes in blocks of {granularity} are more than {MOST_BITS}: take larger blocks")]
    TooMany {
        /// Of the disk, in bytes.
        size: u64,
        /// Of the bitmap, in bytes.
        granularity: u64,
    },
}

/// A bit for each block of a disk, which threads set without locks.
pub struct Bitmap {
    shift: u32,
    size: u64,
    words: Box<[AtomicU64]>,
}

impl fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (granularity, size) = (self.granularity(), self.size);
        write!(f, "Bitmap of {size} bytes in blocks of {granularity}, {} marked", self.count())
    }
}

impl Bitmap {
    /// A bitmap of a disk of `size` bytes without a mark, each bit for `granularity` bytes.
    ///
    /// # Errors
    /// See [`BitmapError`].
    pub fn new(size: u64, granularity: u64) -> Result<Self, BitmapError> {
        if !granularity.is_power_of_two() || !(MIN_GRANULARITY..=MAX_GRANULARITY).contains(&granularity) {
            return Err(BitmapError::Granularity(granularity));
        }
        let bits = size.div_ceil(granularity);
        if bits > MOST_BITS {
            return Err(BitmapError::TooMany { size, granularity });
        }
        let words = (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(Bitmap { shift: granularity.trailing_zeros(), size, words })
    }

    /// The bytes that one bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many bits there are.
    pub fn bits(&self) -> u64 {
        self.size.div_ceil(self.granularity())
    }

    /// The bits of all blocks that a range of bytes touches; what lies beyond the disk has none.
    fn touched(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return 0..0;
        }
        offset >> self.shift..((end - 1) >> self.shift) + 1
    }

    /// Marks every block that the range of bytes touches.
    #[inline]
    pub fn mark(&self, offset: u64, len: u64) {
        let bits = self.touched(offset, len);
        if bits.end == bits.start + 1 {
            // A small write to a small part of the disk, most of the time to blocks that have their mark.
            let (word, bit) = place(bits.start);
            if let Some(word) = self.words.get(word)
                && word.load(Ordering::Acquire) & bit == 0
            {
                word.fetch_or(bit, Ordering::AcqRel);
            }
            return;
        }
        self.change(bits, |word, mask| {
            word.fetch_or(mask, Ordering::AcqRel);
        });
    }

    /// Takes the marks of these blocks away: only for blocks that nobody marks at the same time, or the mark may be
    /// lost.
    pub fn unmark(&self, offset: u64, len: u64) {
        self.change(self.touched(offset, len), |word, mask| {
            word.fetch_and(!mask, Ordering::AcqRel);
        });
    }

    /// Marks all blocks.
    pub fn mark_all(&self) {
        self.mark(0, self.size);
    }

    /// Calls `work` with each word that has some of the bits, and their mask in it.
    fn change(&self, bits: Range<u64>, work: impl Fn(&AtomicU64, u64)) {
        let mut at = bits.start;
        while at < bits.end {
            let next = ((at | 63) + 1).min(bits.end);
            let (word, _) = place(at);
            if let Some(word) = self.words.get(word) {
                work(word, mask(at, next));
            }
            at = next;
        }
    }

    /// Whether the block with this byte is marked.
    pub fn is_marked(&self, offset: u64) -> bool {
        self.any(offset, 1)
    }

    /// Whether any block that the range of bytes touches is marked.
    pub fn any(&self, offset: u64, len: u64) -> bool {
        let bits = self.touched(offset, len);
        self.next(bits.start, true) < bits.end
    }

    /// How many blocks are marked.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }

    /// How many bytes of the disk lie in marked blocks.
    pub fn marked_bytes(&self) -> u64 {
        self.runs(0..self.size).map(|run| run.end - run.start).sum()
    }

    /// The first bit from here on that is set, or that is not; the number of bits where there is none.
    fn next(&self, from: u64, set: bool) -> u64 {
        let bits = self.bits();
        let mut at = from;
        while at < bits {
            let (word, _) = place(at);
            let Some(word) = self.words.get(word) else { break };
            let value = word.load(Ordering::Acquire);
            let value = if set { value } else { !value } & (u64::MAX << (at % 64));
            if value != 0 {
                return ((at & !63) + u64::from(value.trailing_zeros())).min(bits);
            }
            at = (at | 63) + 1;
        }
        bits
    }

    /// The next run of marked blocks within `range` (bytes): from the first marked byte on to the first that is not.
    pub fn next_run(&self, range: Range<u64>) -> Option<Range<u64>> {
        let end = range.end.min(self.size);
        if range.start >= end {
            return None;
        }
        let first = self.next(range.start >> self.shift, true);
        let start = (first << self.shift).max(range.start);
        if first >= self.bits() || start >= end {
            return None;
        }
        let last = self.next(first, false);
        Some(start..(last << self.shift).min(end))
    }

    /// All runs of marked blocks within `range` (bytes), in order.
    pub fn runs(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut left = range;
        std::iter::from_fn(move || {
            let run = self.next_run(left.clone())?;
            left.start = run.end;
            Some(run)
        })
    }

    /// Marks whatever is marked in `other`, of any granularity.
    pub fn merge(&self, other: &Bitmap) {
        if self.shift == other.shift {
            for (word, more) in self.words.iter().zip(&other.words) {
                let more = more.load(Ordering::Acquire);
                if more != 0 {
                    word.fetch_or(more, Ordering::AcqRel);
                }
            }
            // A longer one has bits that this one may not have.
            self.trim();
        } else {
            other.runs(0..other.size).for_each(|run| self.mark(run.start, run.end - run.start));
        }
    }

    /// The same marks for a disk of another size.
    ///
    /// # Errors
    /// There would be too many bits.
    pub fn resized(&self, size: u64) -> Result<Bitmap, BitmapError> {
        let other = Bitmap::new(size, self.granularity())?;
        other.merge(self);
        Ok(other)
    }

    /// Clears what lies beyond the last bit.
    fn trim(&self) {
        let bits = self.bits();
        if let Some(word) = self.words.last()
            && !bits.is_multiple_of(64)
        {
            word.fetch_and(mask(0, bits % 64), Ordering::AcqRel);
        }
    }

    /// How many bytes [`read_bytes`](Self::read_bytes) has to give.
    pub fn byte_len(&self) -> u64 {
        self.bits().div_ceil(8)
    }

    /// The bitmap as bytes from byte `first` on: the first block's bit is the least significant of the first byte, as
    /// qcow2 stores bitmaps. Beyond the end there are zeroes.
    pub fn read_bytes(&self, first: u64, out: &mut [u8]) {
        for (index, byte) in (first..).zip(out) {
            let word = usize::try_from(index / 8).ok().and_then(|word| self.words.get(word));
            let bytes = word.map_or([0; 8], |word| word.load(Ordering::Acquire).to_le_bytes());
            *byte = bytes[usize::try_from(index % 8).unwrap_or(0)];
        }
    }

    /// Marks what these bytes say, from byte `first` of the bitmap on; what lies beyond the end is left out.
    pub fn load_bytes(&self, first: u64, bytes: &[u8]) {
        for (index, byte) in (first..).zip(bytes).filter(|(_, byte)| **byte != 0) {
            if let Some(word) = usize::try_from(index / 8).ok().and_then(|word| self.words.get(word)) {
                word.fetch_or(u64::from(*byte) << (index % 8 * 8), Ordering::AcqRel);
            }
        }
        self.trim();
    }
}

/// The word that has a bit, and the bit in it.
fn place(bit: u64) -> (usize, u64) {
    // No bit is beyond MOST_BITS.
    (usize::try_from(bit / 64).unwrap_or(usize::MAX), 1 << (bit % 64))
}

/// The bits from `start` to before `end`, which lie in one word.
fn mask(start: u64, end: u64) -> u64 {
    let width = end - start;
    let ones = if width >= 64 { u64::MAX } else { (1 << width) - 1 };
    ones << (start % 64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn granularities_and_sizes_out_of_bounds_are_refused() {
        for granularity in [0, 256, 1000, 1 << 32] {
            assert_eq!(Bitmap::new(1 << 20, granularity).err(), Some(BitmapError::Granularity(granularity)));
        }
        assert!(matches!(Bitmap::new(u64::MAX, 512), Err(BitmapError::TooMany { .. })));
        assert_eq!(Bitmap::new(1 << 20, 512).expect("fine").bits(), 2048);
        assert_eq!(Bitmap::new(0, 512).expect("fine").next_run(0..u64::MAX), None);
    }

    #[test]
    fn what_lies_beyond_the_disk_marks_nothing() {
        let bitmap = Bitmap::new(1000, 512).expect("fine");
        bitmap.mark(1000, 5000);
        bitmap.mark(u64::MAX, u64::MAX);
        assert_eq!(bitmap.count(), 0);
        bitmap.load_bytes(0, &[0xfc, 0xff]);
        assert_eq!(bitmap.count(), 0);
        bitmap.mark(999, u64::MAX);
        assert_eq!(bitmap.next_run(0..u64::MAX), Some(512..1000));
        assert_eq!(bitmap.marked_bytes(), 488);
    }

    proptest! {
        #[test]
        fn marks_are_those_of_a_list_of_blocks(
            size in 1u64..2_000_000,
            shift in 9u32..16,
            marks in prop::collection::vec((0u64..2_100_000, 0u64..100_000, any::<bool>()), 0..40),
        ) {
            let granularity = 1 << shift;
            let bitmap = Bitmap::new(size, granularity).expect("fine");
            let mut model = vec![false; usize::try_from(size.div_ceil(granularity)).expect("small")];
            for (offset, len, set) in marks {
                if set { bitmap.mark(offset, len) } else { bitmap.unmark(offset, len) }
                for (block, marked) in (0u64..).zip(&mut model) {
                    let (start, end) = (block * granularity, ((block + 1) * granularity).min(size));
                    if offset < end && start < offset + len {
                        *marked = set;
                    }
                }
            }
            for (block, marked) in (0u64..).zip(&model) {
                prop_assert_eq!(bitmap.is_marked(block * granularity), *marked);
            }
            prop_assert_eq!(bitmap.count(), model.iter().filter(|marked| **marked).count() as u64);
            // Runs are as long as they can be, and all of it.
            let runs: Vec<_> = bitmap.runs(0..size).collect();
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert_eq!(runs.iter().map(|run| run.end - run.start).sum::<u64>(), bitmap.marked_bytes());
            // As bytes, and back, in pieces.
            let mut bytes = vec![0; usize::try_from(bitmap.byte_len()).expect("small")];
            let half = bytes.len() / 2;
            bitmap.read_bytes(0, &mut bytes[..half]);
            bitmap.read_bytes(half as u64, &mut bytes[half..]);
            let other = Bitmap::new(size, granularity).expect("fine");
            other.load_bytes(half as u64, &bytes[half..]);
            other.load_bytes(0, &bytes[..half]);
            prop_assert_eq!(other.runs(0..size).collect::<Vec<_>>(), runs.clone());
            // Larger blocks have all of it, and so has a larger disk.
            let coarse = Bitmap::new(size, 1 << 17).expect("fine");
            coarse.merge(&bitmap);
            for run in &runs {
                prop_assert!((run.start..run.end).step_by(512).all(|byte| coarse.is_marked(byte)));
            }
            let grown = bitmap.resized(size + 100_000).expect("fine");
            prop_assert_eq!(grown.count(), bitmap.count());
            prop_assert_eq!(grown.resized(size).expect("fine").runs(0..size).collect::<Vec<_>>(), runs);
        }
    }
}
