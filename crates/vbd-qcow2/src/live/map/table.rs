//! L2 tables in memory: read without a lock, changed under the lock of their clusters, written in pieces.

use vbd_core::memory::Buffer;
use vbd_ring::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::format::{L2Entry, Layout, Subclusters};

/// Bytes of a table that are written at once, where the cluster has as many.
pub(in crate::live) const PIECE: usize = 4096;
/// How often a pair that changes while it is read is read again. More is an image that says so on disk.
const TRIES: usize = 1000;

/// Which pieces of something are dirty.
pub(in crate::live) struct Pieces(Box<[AtomicU64]>);

impl Pieces {
    pub(in crate::live) fn new(count: usize) -> Self {
        Pieces((0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    pub(in crate::live) fn mark(&self, piece: usize) {
        self.0[piece / 64].fetch_or(1 << (piece % 64), Ordering::SeqCst);
    }

    /// Takes the marks away: the runs of pieces that had one.
    pub(in crate::live) fn take(&self) -> Vec<std::ops::Range<usize>> {
        let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
        for (word, bits) in self.0.iter().enumerate() {
            let mut bits = bits.swap(0, Ordering::SeqCst);
            while bits != 0 {
                let piece = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                match runs.last_mut() {
                    Some(run) if run.end == piece => run.end += 1,
                    _ => runs.push(piece..piece + 1),
                }
            }
        }
        runs
    }
}

/// An entry, with its bitmap where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::live) struct Entry {
    pub(in crate::live) cluster: L2Entry,
    /// Meaningless where the image has none.
    pub(in crate::live) parts: Subclusters,
}

impl Entry {
    pub(in crate::live) const NONE: Entry = Entry { cluster: L2Entry(0), parts: Subclusters(0) };
}

/// An L2 table of the active L1 table. There is one copy in memory at most.
pub(in crate::live) struct Table {
    /// Its entry in the L1 table, which says where it is on disk.
    pub(in crate::live) index: u64,
    /// It has entries that no correct image has: each is looked at before use.
    pub(in crate::live) suspect: bool,
    words: Box<[AtomicU64]>,
    pub(in crate::live) dirty: Pieces,
    /// It is on the list of those that have dirty pieces.
    pub(in crate::live) listed: AtomicBool,
}

impl Table {
    /// The table out of its bytes.
    pub(in crate::live) fn new(index: u64, bytes: &[u8], suspect: bool) -> Self {
        let word = |bytes: &[u8]| AtomicU64::new(u64::from_be_bytes(bytes.try_into().expect("eight bytes")));
        Table {
            index,
            suspect,
            words: bytes.chunks_exact(8).map(word).collect(),
            dirty: Pieces::new(bytes.len().div_ceil(PIECE)),
            listed: AtomicBool::new(false),
        }
    }

    /// An entry as it is now. What it points to was written before it was set.
    #[inline]
    pub(in crate::live) fn get(&self, layout: &Layout, index: usize) -> Entry {
        if !layout.extended_l2 {
            return Entry {
                cluster: L2Entry(self.words[index].load(Ordering::Acquire)),
                parts: Subclusters(0),
            };
        }
        let load = |word: usize| self.words[word].load(Ordering::SeqCst);
        let mut entry = Entry::NONE;
        for _ in 0..TRIES {
            // Written in the other order where something is allocated, so that the bitmap never says more than the entry
            // that was read after it has.
            let before = load(index * 2 + 1);
            entry = Entry { cluster: L2Entry(load(index * 2)), parts: Subclusters(before) };
            let there = entry.cluster.offset() != 0 || layout.data_file;
            if load(index * 2 + 1) == before && (there || entry.parts.allocated() == 0) {
                break;
            }
        }
        entry
    }

    /// Sets an entry. Whoever does so holds the lock of its cluster.
    pub(in crate::live) fn set(&self, layout: &Layout, index: usize, entry: Entry) {
        if !layout.extended_l2 {
            self.words[index].store(entry.cluster.0, Ordering::Release);
            return;
        }
        let store = |word: usize, value| self.words[word].store(value, Ordering::SeqCst);
        if entry.cluster.offset() != 0 || layout.data_file {
            store(index * 2, entry.cluster.0);
            store(index * 2 + 1, entry.parts.0);
        } else {
            store(index * 2 + 1, entry.parts.0);
            store(index * 2, entry.cluster.0);
        }
    }

    /// Pieces that it has.
    pub(in crate::live) fn pieces(&self) -> usize {
        (self.words.len() * 8).div_ceil(PIECE)
    }

    /// The piece that an entry is in.
    pub(in crate::live) fn piece_of(layout: &Layout, index: usize) -> usize {
        index * layout.l2_entry_size() / PIECE
    }

    /// A run of pieces as they are now, as they lie on disk, and where in the table they begin.
    pub(in crate::live) fn copy(&self, layout: &Layout, run: std::ops::Range<usize>) -> (u64, Buffer) {
        let (from, to) = (run.start * PIECE / 8, (run.end * PIECE / 8).min(self.words.len()));
        let mut buffer = Buffer::new((to - from) * 8);
        let stride = layout.l2_entry_size() / 8;
        for (at, bytes) in buffer.bytes_mut().chunks_exact_mut(stride * 8).enumerate() {
            let entry = self.get(layout, from / stride + at);
            bytes[..8].copy_from_slice(&entry.cluster.0.to_be_bytes());
            if stride == 2 {
                bytes[8..].copy_from_slice(&entry.parts.0.to_be_bytes());
            }
        }
        (from as u64 * 8, buffer)
    }
}
