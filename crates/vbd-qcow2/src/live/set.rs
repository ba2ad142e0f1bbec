//! Sets of clusters: the ones that tables of the image are in.

use std::collections::HashMap;

/// Clusters in one chunk.
const CHUNK: u64 = 4096;

/// A set of cluster numbers, dense where it has some.
#[derive(Default)]
pub(super) struct ClusterSet(HashMap<u64, Box<[u64; 64]>>);

impl ClusterSet {
    fn place(cluster: u64) -> (u64, usize, u64) {
        let inside = cluster % CHUNK;
        (cluster / CHUNK, usize::try_from(inside / 64).unwrap_or(0), 1 << (inside % 64))
    }

    /// Adds a cluster; false if it was there.
    pub(super) fn insert(&mut self, cluster: u64) -> bool {
        let (chunk, word, bit) = Self::place(cluster);
        let word = &mut self.0.entry(chunk).or_insert_with(|| Box::new([0; 64]))[word];
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    pub(super) fn remove(&mut self, cluster: u64) {
        let (chunk, word, bit) = Self::place(cluster);
        if let Some(words) = self.0.get_mut(&chunk) {
            words[word] &= !bit;
        }
    }

    pub(super) fn contains(&self, cluster: u64) -> bool {
        self.look().contains(cluster)
    }

    /// A look at many clusters, of which most have their neighbours near.
    pub(super) fn look(&self) -> Look<'_> {
        Look { set: self, chunk: None }
    }
}

/// Looks clusters up, and remembers where the last one was.
pub(super) struct Look<'a> {
    set: &'a ClusterSet,
    chunk: Option<(u64, Option<&'a [u64; 64]>)>,
}

impl Look<'_> {
    #[inline]
    pub(super) fn contains(&mut self, cluster: u64) -> bool {
        let (chunk, word, bit) = ClusterSet::place(cluster);
        let words = match self.chunk {
            Some((same, words)) if same == chunk => words,
            _ => {
                let words = self.set.0.get(&chunk).map(|words| &**words);
                self.chunk = Some((chunk, words));
                words
            }
        };
        words.is_some_and(|words| words[word] & bit != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_set_has_what_was_put_in_and_not_taken_out() {
        let (mut set, mut model) = (ClusterSet::default(), HashSet::new());
        let mut number = 1u64;
        for round in 0..20_000 {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let cluster = number >> 50;
            if round % 3 == 0 {
                set.remove(cluster);
                model.remove(&cluster);
            } else {
                assert_eq!(set.insert(cluster), model.insert(cluster));
            }
        }
        assert!((0..1 << 14).all(|cluster| set.contains(cluster) == model.contains(&cluster)));
    }
}
