//! How often each cluster is used, in bounded memory: a window of the file at a time, of which only what is used takes
//! memory.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// What a cluster is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Kind {
    None,
    Header,
    RefcountTable,
    RefcountBlock,
    L1Table,
    SnapshotTable,
    SnapshotL1,
    L2Table,
    Data,
    Compressed,
    BitmapDirectory,
    BitmapTable,
    BitmapData,
    Luks,
}

impl Kind {
    /// What it is called, with its article.
    pub(super) fn text(self) -> &'static str {
        match self {
            Kind::None => "nothing",
            Kind::Header => "the header",
            Kind::RefcountTable => "the refcount table",
            Kind::RefcountBlock => "a refcount block",
            Kind::L1Table => "the L1 table",
            Kind::SnapshotTable => "the snapshot table",
            Kind::SnapshotL1 => "the L1 table of a snapshot",
            Kind::L2Table => "an L2 table",
            Kind::Data => "guest data",
            Kind::Compressed => "compressed guest data",
            Kind::BitmapDirectory => "the bitmap directory",
            Kind::BitmapTable => "the table of a bitmap",
            Kind::BitmapData => "the bits of a bitmap",
            Kind::Luks => "the LUKS header",
        }
    }

    /// Whether several entries may lead to one cluster of it.
    fn is_shared(self) -> bool {
        matches!(self, Kind::L2Table | Kind::Data | Kind::Compressed)
    }

    pub(super) fn is_refcount(self) -> bool {
        matches!(self, Kind::RefcountTable | Kind::RefcountBlock)
    }
}

/// Clusters that are counted together.
pub(super) const CHUNK: u64 = 4096;
const CHUNK_LEN: usize = 4096;

/// The counts of some clusters that lie one behind the other.
pub(super) struct Chunk {
    counts: Box<[u16; CHUNK_LEN]>,
    kinds: Box<[Kind; CHUNK_LEN]>,
}

/// Bytes that a chunk takes, and what keeps it.
const CHUNK_BYTES: usize = CHUNK_LEN * 3 + 64;

impl Chunk {
    fn new() -> Self {
        Chunk { counts: Box::new([0; CHUNK_LEN]), kinds: Box::new([Kind::None; CHUNK_LEN]) }
    }
}

/// How often clusters are used, for all clusters of the window.
pub(super) struct Counts {
    chunks: BTreeMap<u64, Chunk>,
    /// Counts from `u16::MAX` on.
    large: HashMap<u64, u64>,
    /// The first cluster of the window, and the first behind it. Both are those of a chunk.
    window: Range<u64>,
    /// Chunks that memory is there for: one at least.
    most: usize,
}

impl Counts {
    /// A window that begins at a cluster, and ends where the memory does.
    pub(super) fn new(start: u64, bytes: usize) -> Self {
        debug_assert!(start.is_multiple_of(CHUNK));
        Counts {
            chunks: BTreeMap::new(),
            large: HashMap::new(),
            window: start..u64::MAX - u64::MAX % CHUNK,
            most: (bytes / CHUNK_BYTES).max(1),
        }
    }

    /// The clusters that all uses are known of, when all of them were added.
    pub(super) fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// Counts a use of a cluster, `times` times. Gives what it is used for already, if that cannot be.
    pub(super) fn add(&mut self, cluster: u64, kind: Kind, times: u64) -> Option<Kind> {
        if !self.window.contains(&cluster) {
            return None;
        }
        let key = cluster / CHUNK;
        if !self.chunks.contains_key(&key) {
            if self.chunks.len() >= self.most
                && let Some((last, _)) = self.chunks.last_key_value()
            {
                // What is farthest behind is counted in a later window.
                let last = *last;
                if last < key {
                    self.window.end = self.window.end.min(key * CHUNK);
                    return None;
                }
                self.chunks.pop_last();
                self.window.end = last * CHUNK;
                self.large.retain(|cluster, _| *cluster < last * CHUNK);
            }
            self.chunks.insert(key, Chunk::new());
        }
        let chunk = self.chunks.get_mut(&key).expect("it was just made");
        let index = usize::try_from(cluster % CHUNK).expect("an index within a chunk");
        let before = chunk.kinds[index];
        if before == Kind::None {
            chunk.kinds[index] = kind;
        }
        let count = &mut chunk.counts[index];
        let sum = u64::from(*count).saturating_add(times);
        match u16::try_from(sum) {
            Ok(small) if small < u16::MAX && *count < u16::MAX => *count = small,
            _ => {
                let large = self
                    .large
                    .entry(cluster)
                    .or_insert(u64::from(*count).saturating_sub(u64::from(*count == u16::MAX)));
                *large = large.saturating_add(times);
                *count = u16::MAX;
            }
        }
        (before != Kind::None && (before != kind || !kind.is_shared())).then_some(before)
    }

    /// How often a cluster of the window is used.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        match self.chunks.get(&(cluster / CHUNK)) {
            Some(chunk) => self.in_chunk(chunk, cluster),
            None => 0,
        }
    }

    fn in_chunk(&self, chunk: &Chunk, cluster: u64) -> u64 {
        match chunk.counts[usize::try_from(cluster % CHUNK).expect("an index within a chunk")] {
            u16::MAX => self.large.get(&cluster).copied().unwrap_or(u16::MAX.into()),
            count => count.into(),
        }
    }

    /// Whether anything in a chunk is used.
    pub(super) fn has_chunk(&self, chunk: u64) -> bool {
        self.chunks.contains_key(&chunk)
    }

    /// The clusters of a range that are used, with their counts, in rising order.
    pub(super) fn used(&self, range: Range<u64>) -> impl Iterator<Item = (u64, u64)> + '_ {
        // An inverted range makes a map panic.
        let chunks = (!range.is_empty()).then(|| {
            let keys = range.start / CHUNK..=(range.end - 1) / CHUNK;
            self.chunks.range(keys)
        });
        let chunks = chunks.into_iter().flatten();
        chunks.flat_map(move |(key, chunk)| {
            let clusters = (key * CHUNK).max(range.start)..((key + 1) * CHUNK).min(range.end);
            clusters.map(|cluster| (cluster, self.in_chunk(chunk, cluster))).filter(|(_, count)| *count > 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However small the memory, windows one behind the other know every count, and each cluster is in one of them.
        #[test]
        fn windows_count_everything_once(
            uses in prop::collection::vec((0u64..1 << 18, 1u64..40_000), 0..300), chunks in 1usize..6,
        ) {
            let mut model = BTreeMap::new();
            for (cluster, times) in &uses {
                *model.entry(*cluster).or_insert(0) += times;
            }
            let (mut start, mut found) = (0, BTreeMap::new());
            while start < 1 << 18 {
                let mut counts = Counts::new(start, chunks * CHUNK_BYTES);
                for (cluster, times) in &uses {
                    counts.add(*cluster, Kind::Data, *times);
                }
                let window = counts.window();
                prop_assert!(window.start == start && window.end > start);
                prop_assert!(counts.chunks.len() <= chunks);
                for (cluster, count) in counts.used(window.clone()) {
                    prop_assert_eq!(count, counts.get(cluster));
                    prop_assert!(found.insert(cluster, count).is_none());
                }
                start = window.end;
            }
            prop_assert_eq!(found, model);
        }
    }

    #[test]
    fn two_uses_of_one_place_are_told() {
        let mut counts = Counts::new(0, 1 << 20);
        assert_eq!(counts.add(5, Kind::L2Table, 1), None);
        assert_eq!(counts.add(5, Kind::L2Table, 3), None);
        assert_eq!(counts.add(5, Kind::Data, 1), Some(Kind::L2Table));
        assert_eq!(counts.add(6, Kind::L1Table, 1), None);
        assert_eq!(counts.add(6, Kind::L1Table, 1), Some(Kind::L1Table));
        assert_eq!((counts.get(5), counts.get(6), counts.get(7)), (5, 2, 0));
    }
}
