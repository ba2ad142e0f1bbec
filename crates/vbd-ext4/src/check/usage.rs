//! Which blocks belong to something.

use std::collections::HashMap;

use crate::format::Block;
use crate::read::raw::Numbers;

/// A bit for each block, by group; groups without any have none.
pub(super) struct Usage {
    first: Block,
    blocks: Block,
    per_group: u64,
    groups: HashMap<u32, Box<[u8]>>,
    count: u64,
}

impl Usage {
    pub(super) fn new(numbers: &Numbers) -> Usage {
        Usage {
            first: numbers.first_data_block,
            blocks: numbers.blocks,
            per_group: numbers.blocks_per_group,
            groups: HashMap::new(),
            count: 0,
        }
    }

    /// Whether these blocks exist and can belong to something.
    pub(super) fn exist(&self, start: Block, length: u64) -> bool {
        start >= self.first.max(1) && start.checked_add(length).is_some_and(|end| end <= self.blocks)
    }

    /// The group of a block and its number there.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the number of groups fits, and so does a group's bits"
    )]
    fn place(&self, block: Block) -> (u32, usize) {
        let from_first = block - self.first;
        ((from_first / self.per_group) as u32, (from_first % self.per_group) as usize)
    }

    /// Claims blocks, which have to exist; the first one that was claimed before.
    pub(super) fn claim(&mut self, start: Block, length: u64) -> Option<Block> {
        let mut twice = None;
        let bytes = usize::try_from(self.per_group / 8).unwrap_or(0);
        let mut at = start.max(self.first);
        let end = start.saturating_add(length).min(self.blocks);
        while at < end {
            let (group, from) = self.place(at);
            let until = (end - at + from as u64).min(self.per_group);
            let bits = self.groups.entry(group).or_insert_with(|| vec![0; bytes].into());
            #[expect(clippy::cast_possible_truncation, reason = "at most the bits of a group")]
            for bit in from..until as usize {
                let mask = 1 << (bit % 8);
                if bits[bit / 8] & mask != 0 {
                    twice.get_or_insert(at + (bit - from) as u64);
                } else {
                    bits[bit / 8] |= mask;
                    self.count += 1;
                }
            }
            at += until - from as u64;
        }
        twice
    }

    /// A group's bits; nothing: none of its blocks is used.
    pub(super) fn group(&self, group: u32) -> Option<&[u8]> {
        self.groups.get(&group).map(|bits| &**bits)
    }

    /// How many blocks were claimed.
    pub(super) fn count(&self) -> u64 {
        self.count
    }
}
