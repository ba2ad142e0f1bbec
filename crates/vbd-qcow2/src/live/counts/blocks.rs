//! Blocks of counts that are in memory, by their number.

use super::super::map::Pieces;
use super::bytes;

/// A block of counts, as it lies on disk.
pub(super) struct Block {
    pub(super) offset: u64,
    pub(super) bytes: Vec<u8>,
    pub(super) dirty: Pieces,
}

/// The blocks. There are no more than the refcount table has entries, which its format bounds.
#[derive(Default)]
pub(super) struct Blocks(Vec<Option<Box<Block>>>);

impl Blocks {
    #[inline]
    pub(super) fn get(&self, number: u64) -> Option<&Block> {
        self.0.get(bytes(number))?.as_deref()
    }

    #[inline]
    pub(super) fn get_mut(&mut self, number: u64) -> Option<&mut Block> {
        self.0.get_mut(bytes(number))?.as_deref_mut()
    }

    pub(super) fn insert(&mut self, number: u64, block: Block) {
        let place = bytes(number);
        if place >= self.0.len() {
            self.0.resize_with(place + 1, || None);
        }
        self.0[place] = Some(Box::new(block));
    }

    pub(super) fn remove(&mut self, number: u64) {
        if let Some(place) = self.0.get_mut(bytes(number)) {
            *place = None;
        }
    }
}
