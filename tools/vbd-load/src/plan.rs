//! Which request comes next, and what is known of the blocks' content.

use crate::cli::Pattern;
use crate::pattern::Random;

/// One request to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Op {
    /// Number of the block in the region.
    pub(crate) block: u64,
    pub(crate) write: bool,
    /// What a write stamps, or a read has to find; 0 when that is not known.
    pub(crate) sequence: u64,
}

/// The requests of one queue in its region of the disk.
pub(crate) struct Plan {
    pattern: Pattern,
    random: Random,
    blocks: u64,
    next: u64,
    ledger: Option<Ledger>,
}

/// What was written where. A block with a request in flight takes no other, so that its content is always known.
struct Ledger {
    sequences: Vec<u64>,
    busy: Vec<bool>,
    last: u64,
}

impl Plan {
    /// A plan over `blocks` blocks, more than will ever be in flight; `verify` keeps a ledger of them.
    pub(crate) fn new(pattern: Pattern, blocks: u64, seed: u64, verify: bool) -> anyhow::Result<Self> {
        let count = usize::try_from(blocks)?;
        let ledger = verify.then(|| Ledger { sequences: vec![0; count], busy: vec![false; count], last: 0 });
        Ok(Plan { pattern, random: Random::new(seed), blocks, next: 0, ledger })
    }

    /// The next request.
    pub(crate) fn next(&mut self) -> Op {
        let mut block = match self.pattern {
            Pattern::Read | Pattern::Write => self.next,
            _ => self.random.below(self.blocks),
        };
        let write = match self.pattern {
            Pattern::Randrw => self.random.next() & 1 == 0,
            pattern => pattern.writes(),
        };
        let mut sequence = 0;
        if let Some(ledger) = &mut self.ledger {
            while ledger.busy[index(block)] {
                block = (block + 1) % self.blocks;
            }
            ledger.busy[index(block)] = true;
            if write {
                ledger.last += 1;
                ledger.sequences[index(block)] = ledger.last;
            }
            sequence = ledger.sequences[index(block)];
        }
        self.next = (block + 1) % self.blocks;
        Op { block, write, sequence }
    }

    /// Takes note that a request has completed.
    pub(crate) fn done(&mut self, op: Op) {
        if let Some(ledger) = &mut self.ledger {
            ledger.busy[index(op.block)] = false;
        }
    }

    /// Every block that was written, as reads that have to find what was written last. Nothing may be in flight.
    pub(crate) fn read_back(&self) -> Vec<Op> {
        let written = |(block, &sequence): (usize, &u64)| {
            (sequence != 0).then_some(Op { block: block as u64, write: false, sequence })
        };
        self.ledger
            .iter()
            .flat_map(|ledger| ledger.sequences.iter().enumerate().filter_map(written))
            .collect()
    }
}

fn index(block: u64) -> usize {
    usize::try_from(block).expect("a ledger of this many blocks exists")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_block_is_in_flight_twice_and_the_last_write_is_what_is_read_back() {
        let mut plan = Plan::new(Pattern::Randrw, 8, 1, true).unwrap();
        let mut last = [0; 8];
        for _ in 0..100 {
            let ops: Vec<Op> = (0..7).map(|_| plan.next()).collect();
            let mut blocks: Vec<u64> = ops.iter().map(|op| op.block).collect();
            blocks.sort_unstable();
            blocks.dedup();
            assert_eq!(blocks.len(), 7);
            for op in ops {
                let known = &mut last[index(op.block)];
                if op.write {
                    *known = op.sequence;
                }
                assert_eq!(*known, op.sequence);
                plan.done(op);
            }
        }
        for op in plan.read_back() {
            assert_eq!(op.sequence, last[index(op.block)]);
        }
    }

    #[test]
    fn sequential_wraps() {
        let mut plan = Plan::new(Pattern::Write, 3, 1, false).unwrap();
        let blocks: Vec<u64> = (0..4).map(|_| plan.next().block).collect();
        assert_eq!(blocks, [0, 1, 2, 0]);
    }
}
