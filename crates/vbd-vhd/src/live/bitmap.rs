//! Bitmaps of blocks: a bit for each sector, the highest of a byte first ("Data Blocks").

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Bytes of bitmaps that are kept.
const MOST_KEPT: usize = 64 << 20;

/// The bitmap of a block, as it is in the file. Bits are only ever set, by whoever holds the block's lock.
pub(crate) struct Bitmap(Box<[AtomicU8]>);

impl Bitmap {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Bitmap(bytes.iter().map(|byte| AtomicU8::new(*byte)).collect())
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.iter().map(|byte| byte.load(Ordering::Acquire)).collect()
    }

    /// Takes the bits over that were written.
    pub(crate) fn set(&self, bytes: &[u8]) {
        for (mine, byte) in self.0.iter().zip(bytes) {
            mine.fetch_or(*byte, Ordering::AcqRel);
        }
    }

    pub(crate) fn has(&self, sector: u64) -> bool {
        let byte = usize::try_from(sector / 8).ok().and_then(|index| self.0.get(index));
        byte.is_some_and(|byte| byte.load(Ordering::Acquire) & 0x80 >> (sector % 8) != 0)
    }

    /// Whether the first sector of a range is there, and how many after it are alike.
    pub(crate) fn run(&self, sectors: std::ops::Range<u64>) -> (bool, u64) {
        let first = self.has(sectors.start);
        let alike = sectors.clone().take_while(|sector| self.has(*sector) == first).count();
        (first, alike as u64)
    }

    /// Whether all of these are there.
    pub(crate) fn has_all(&self, mut sectors: std::ops::Range<u64>) -> bool {
        sectors.all(|sector| self.has(sector))
    }
}

/// Sets the bits of these sectors.
pub(crate) fn set_bits(bytes: &mut [u8], sectors: std::ops::Range<u64>) {
    for sector in sectors {
        if let Some(byte) = usize::try_from(sector / 8).ok().and_then(|index| bytes.get_mut(index)) {
            *byte |= 0x80 >> (sector % 8);
        }
    }
}

/// Whether the bits of the first `count` sectors are set.
pub(crate) fn is_full(bytes: &[u8], count: u64) -> bool {
    let whole = usize::try_from(count / 8).unwrap_or(usize::MAX);
    let rest = u32::try_from(count % 8).expect("below 8");
    let mask = !(0xffu8.checked_shr(rest).unwrap_or(0));
    bytes.len() >= whole
        && bytes[..whole].iter().all(|byte| *byte == 0xff)
        && (rest == 0 || bytes.get(whole).is_some_and(|byte| byte & mask == mask))
}

/// The bitmaps that are in memory, the oldest of which go first. There may be two of one block for a moment, where one
/// has gone while a reader still holds it: they differ only by what was written since.
#[derive(Default)]
pub(crate) struct Bitmaps {
    kept: HashMap<u64, Arc<Bitmap>>,
    order: VecDeque<u64>,
    bytes: usize,
}

impl Bitmaps {
    pub(crate) fn get(&self, block: u64) -> Option<Arc<Bitmap>> {
        self.kept.get(&block).cloned()
    }

    /// Keeps the bitmap of a block, in place of one that was kept before.
    pub(crate) fn keep(&mut self, block: u64, bitmap: Arc<Bitmap>) {
        let len = bitmap.0.len();
        if self.kept.insert(block, bitmap).is_none() {
            self.order.push_back(block);
            self.bytes += len;
        }
        while self.bytes > MOST_KEPT && self.order.len() > 1 {
            if let Some(oldest) = self.order.pop_front() {
                self.forget(oldest);
            }
        }
    }

    /// Forgets one.
    pub(crate) fn forget(&mut self, block: u64) {
        if let Some(bitmap) = self.kept.remove(&block) {
            self.bytes -= bitmap.0.len();
            self.order.retain(|kept| *kept != block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_count_from_the_highest() {
        let mut bytes = vec![0; 4];
        set_bits(&mut bytes, 3..18);
        assert_eq!(bytes, [0x1f, 0xff, 0xc0, 0]);
        let bitmap = Bitmap::new(&bytes);
        assert_eq!(bitmap.run(0..32), (false, 3));
        assert_eq!(bitmap.run(3..32), (true, 15));
        assert_eq!(bitmap.run(3..8), (true, 5));
        assert_eq!(bitmap.run(18..32), (false, 14));
        assert!(bitmap.has_all(3..18) && !bitmap.has_all(2..18));
        assert!(!is_full(&bytes, 3) && is_full(&[0xff, 0xe0], 11) && !is_full(&[0xff, 0xe0], 12));
        assert!(!is_full(&[0xff], 9) && is_full(&[0xff], 8));
        bitmap.set(&[0x80, 0, 0, 1]);
        assert_eq!(bitmap.bytes(), [0x9f, 0xff, 0xc0, 1]);
    }

    #[test]
    fn the_oldest_bitmap_goes_first() {
        let mut bitmaps = Bitmaps::default();
        let large = || Arc::new(Bitmap::new(&vec![0; MOST_KEPT / 2]));
        for block in 0..3 {
            bitmaps.keep(block, large());
        }
        assert!(bitmaps.get(0).is_none() && bitmaps.get(1).is_some() && bitmaps.get(2).is_some());
        bitmaps.forget(1);
        bitmaps.keep(4, large());
        assert!(bitmaps.get(2).is_some() && bitmaps.get(4).is_some());
    }
}
