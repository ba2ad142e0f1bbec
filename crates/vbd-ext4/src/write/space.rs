//! Which blocks are free: all are given out in rising order, once.

use super::error::{Result, WriteError};
use super::layout::Layout;
use super::run::{Run, merged};
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
    released: Vec<Run>,
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
            released: Vec::new(),
            block_size: layout.block_size(),
        }
    }

    /// Blocks not yet given out.
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

    /// Takes blocks back; they are free in the end, and not given out again.
    pub(crate) fn release(&mut self, run: Run) {
        debug_assert!(
            self.used.iter().any(|used| run.within(*used) == Some(run)),
            "{run:?} was not given out"
        );
        self.released.push(run);
    }

    /// What is in use in the end: the runs given out, and those taken back of them; both sorted.
    pub(crate) fn into_used(self) -> (Vec<Run>, Vec<Run>) {
        (self.used, merged(self.released))
    }
}
