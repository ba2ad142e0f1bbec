//! Blocks in a row.

use crate::format::Block;

/// Blocks in a row on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    /// The first.
    pub start: Block,
    /// How many.
    pub length: u64,
}

impl Run {
    /// From this block.
    pub fn new(start: Block, length: u64) -> Run {
        Run { start, length }
    }

    /// The block after the last.
    pub fn end(self) -> Block {
        self.start + self.length
    }

    /// What of it lies in another one.
    pub(crate) fn within(self, other: Run) -> Option<Run> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| Run::new(start, end - start))
    }
}

/// Sorted runs as few as possible; they must not overlap.
pub(crate) fn merged(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_unstable_by_key(|run| run.start);
    runs.dedup_by(|next, before| {
        debug_assert!(before.end() <= next.start, "{before:?} and {next:?} overlap");
        let adjacent = before.end() == next.start;
        if adjacent {
            before.length += next.length;
        }
        adjacent
    });
    runs
}

/// The runs of a sorted list that touch a range, from an index on that the caller keeps while ranges rise.
pub(crate) fn touching<'a>(runs: &'a [Run], from: &mut usize, range: Run) -> impl Iterator<Item = Run> + 'a {
    while runs.get(*from).is_some_and(|run| run.end() <= range.start) {
        *from += 1;
    }
    runs[*from..].iter().map_while(move |run| run.within(range))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_merge_and_are_found_again() {
        let runs = merged(vec![Run::new(10, 5), Run::new(0, 4), Run::new(15, 5), Run::new(30, 1)]);
        assert_eq!(runs, [Run::new(0, 4), Run::new(10, 10), Run::new(30, 1)]);
        let mut from = 0;
        let touching = |from: &mut usize, range| touching(&runs, from, range).collect::<Vec<_>>();
        assert_eq!(touching(&mut from, Run::new(0, 12)), [Run::new(0, 4), Run::new(10, 2)]);
        assert_eq!(touching(&mut from, Run::new(12, 18)), [Run::new(12, 8)]);
        assert_eq!(touching(&mut from, Run::new(30, 10)), [Run::new(30, 1)]);
        assert_eq!(touching(&mut from, Run::new(40, 10)), []);
    }
}
