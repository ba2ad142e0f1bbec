//! Which blocks are free: all are given out in rising order, and those that came back when no others are left.

use std::collections::BTreeMap;

use super::error::{Result, WriteError};
use super::layout::Layout;
use super::run::Run;
use crate::format::Block;

/// Gives out blocks.
#[derive(Debug)]
pub(crate) struct Space {
    /// Blocks that are none of a file's, sorted.
    metadata: Vec<Run>,
    /// The first of those after the cursor.
    next: usize,
    cursor: Block,
    end: Block,
    free: u64,
    used: Vec<Run>,
    /// Those of them that came back: the first block and how many, never two that lie side by side.
    released: BTreeMap<Block, u64>,
    block_size: u32,
}

impl Space {
    pub(crate) fn new(layout: &Layout) -> Space {
        let metadata = layout.metadata.clone();
        let taken: u64 = metadata.iter().map(|run| run.length).sum();
        Space {
            metadata,
            next: 0,
            cursor: layout.first,
            end: layout.blocks,
            free: layout.blocks - layout.first - taken,
            used: Vec::new(),
            released: BTreeMap::new(),
            block_size: layout.block_size(),
        }
    }

    /// Blocks that can be given out.
    pub(crate) fn free(&self) -> u64 {
        self.free
    }

    /// The next blocks.
    pub(crate) fn allocate(&mut self, blocks: u64) -> Result<Vec<Run>> {
        if blocks > self.free {
            return Err(WriteError::NoBlocks {
                needed: blocks,
                free: self.free,
                block_size: self.block_size,
            });
        }
        self.free -= blocks;
        let mut runs = Vec::with_capacity(1);
        let mut left = blocks;
        while left > 0 {
            if self.next == self.metadata.len() && self.cursor == self.end {
                let run = self.take_released(left);
                left -= run.length;
                runs.push(run);
                continue;
            }
            let wall = self.metadata.get(self.next).map_or(self.end, |run| run.start);
            if wall == self.cursor {
                self.cursor = self.metadata[self.next].end();
                self.next += 1;
                continue;
            }
            let run = Run::new(self.cursor, left.min(wall - self.cursor));
            self.cursor = run.end();
            left -= run.length;
            match self.used.last_mut() {
                Some(last) if last.end() == run.start => last.length += run.length,
                _ => self.used.push(run),
            }
            runs.push(run);
        }
        Ok(runs)
    }

    /// One block.
    pub(crate) fn one(&mut self) -> Result<Block> {
        Ok(self.allocate(1)?[0].start)
    }

    /// The first of those that came back, at most so many of them.
    fn take_released(&mut self, most: u64) -> Run {
        let (start, length) = self.released.pop_first().expect("as many as are said to be free");
        let run = Run::new(start, length.min(most));
        if run.length < length {
            self.released.insert(run.end(), length - run.length);
        }
        run
    }

    /// Whether some of these blocks may have been given out before: none is, as long as others are left.
    pub(crate) fn gives_again(&self) -> bool {
        self.next == self.metadata.len() && self.cursor == self.end
    }

    /// Takes blocks back; they are given out again when no others are left.
    pub(crate) fn release(&mut self, run: Run) {
        debug_assert!(
            self.used.iter().any(|used| run.within(*used) == Some(run)),
            "{run:?} was not given out"
        );
        self.free += run.length;
        let mut joined = run;
        if let Some((&start, &length)) = self.released.range(..run.start).next_back() {
            debug_assert!(start + length <= run.start, "{run:?} came back twice");
            if start + length == run.start {
                joined = Run::new(start, length + run.length);
            }
        }
        if let Some(length) = self.released.remove(&run.end()) {
            joined.length += length;
        }
        self.released.insert(joined.start, joined.length);
    }

    /// What is in use in the end: the runs given out, and those that came back of them; both sorted.
    pub(crate) fn into_used(self) -> (Vec<Run>, Vec<Run>) {
        (self.used, self.released.into_iter().map(|(start, length)| Run::new(start, length)).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::Settings;
    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        /// Whatever is given out and comes back: nobody has a block twice, none is lost, and what has never been given out
        /// comes first.
        #[test]
        fn every_block_is_somebodys_or_free(
            steps in proptest::collection::vec((any::<bool>(), 1u64..900, any::<prop::sample::Index>()), 1..60),
        ) {
            let layout = Layout::new(&Settings::new(16 << 20)).unwrap();
            let mut space = Space::new(&layout);
            let all = space.free();
            let mut held: Vec<Run> = Vec::new();
            let mut seen = BTreeSet::new();
            for (take, count, which) in steps {
                if take || held.is_empty() {
                    let free = space.free();
                    match space.allocate(count) {
                        Ok(runs) => {
                            prop_assert!(count <= free);
                            let given: Vec<Block> = runs.iter().flat_map(|run| run.start..run.end()).collect();
                            prop_assert_eq!(given.len() as u64, count);
                            let again = given.iter().filter(|block| seen.contains(*block)).count();
                            seen.extend(given);
                            prop_assert!(again == 0 || space.gives_again());
                            held.extend(runs);
                        }
                        Err(_) => prop_assert!(count > free),
                    }
                } else {
                    let run = held.swap_remove(which.index(held.len()));
                    // A part of it, or all.
                    let part = Run::new(run.start, count.min(run.length));
                    space.release(part);
                    if part.length < run.length {
                        held.push(Run::new(part.end(), run.length - part.length));
                    }
                }
                let mut blocks = BTreeSet::new();
                let taken: u64 = held.iter().map(|run| run.length).sum();
                prop_assert!(held.iter().flat_map(|run| run.start..run.end()).all(|block| blocks.insert(block)));
                prop_assert_eq!(taken + space.free(), all);
            }
            let (used, released) = space.into_used();
            let sum = |runs: &[Run]| runs.iter().map(|run| run.length).sum::<u64>();
            prop_assert_eq!(sum(&used) - sum(&released), sum(&held));
        }
    }
}
