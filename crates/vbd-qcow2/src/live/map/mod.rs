//! The mapping: the L1 table, L2 tables in memory, and what they say of a range.

mod registry;
mod span;
mod table;

use vbd_ring::sync::atomic::{AtomicU64, Ordering};

use crate::format::L1Entry;

pub(super) use registry::Registry;
pub(super) use span::{Span, index_of, span};
pub(super) use table::{Entry, PIECE, Pieces, Table};

/// The active L1 table.
pub(super) struct L1(Box<[AtomicU64]>);

impl L1 {
    /// The table out of its entries.
    pub(super) fn new(entries: impl Iterator<Item = u64>) -> Self {
        L1(entries.map(AtomicU64::new).collect())
    }

    /// Its number of entries.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// An entry as it is now; none leads nowhere.
    #[inline]
    pub(super) fn get(&self, index: u64) -> L1Entry {
        let entry = usize::try_from(index).ok().and_then(|index| self.0.get(index));
        L1Entry(entry.map_or(0, |entry| entry.load(Ordering::Acquire)))
    }

    /// Sets an entry; its index is held in [`Registry::changing`].
    pub(super) fn set(&self, index: u64, entry: L1Entry) {
        if let Some(word) = usize::try_from(index).ok().and_then(|index| self.0.get(index)) {
            word.store(entry.0, Ordering::Release);
        }
    }

    /// All entries.
    pub(super) fn entries(&self) -> impl Iterator<Item = L1Entry> + '_ {
        self.0.iter().map(|word| L1Entry(word.load(Ordering::Acquire)))
    }
}
