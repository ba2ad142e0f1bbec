//! The bitmaps of blocks, and how many are free.

use super::Checker;
use super::inodes::{differences, said_of};
use crate::format::group::flags;
use crate::read::{Place, Result};

impl Checker<'_> {
    pub(super) fn bitmaps(&mut self) -> Result<()> {
        for group in 0..self.numbers.groups {
            self.block_bitmap(group)?;
        }
        if self.filesystem.replayed() == 0 && self.superblock.free_blocks() != self.free_blocks {
            let (said, free) = (self.superblock.free_blocks(), self.free_blocks);
            self.bad("the superblock", format!("it says that {said} blocks are free, and {free} are"));
        }
        self.report.blocks = self.used.count();
        self.report.inodes = self.inodes.len() as u64;
        self.report.directories = self.directories.len() as u64;
        Ok(())
    }

    fn block_bitmap(&mut self, group: u32) -> Result<()> {
        let numbers = self.numbers;
        let place = format!("the block bitmap of group {group}");
        let descriptor = self.filesystem.group(group, false)?;
        let length = self.length(group);
        let bytes = usize::try_from(numbers.blocks_per_group / 8).unwrap_or(0);
        let bits = self.used.group(group).map_or_else(|| vec![0; bytes], <[u8]>::to_vec);
        let used: u64 = bits.iter().map(|byte| u64::from(byte.count_ones())).sum();
        let free = length - used;
        self.free_blocks += free;
        if u64::from(descriptor.free_blocks()) != free {
            let said = descriptor.free_blocks();
            self.bad(Place::Group(group), format!("it says that {said} blocks are free, and {free} are"));
        }
        let start = self.start(group);
        let count = usize::try_from(length).unwrap_or(0);
        let uninit = descriptor.flags.get() & flags::BLOCK_UNINIT != 0 && self.has_group_sums();
        if !uninit && !self.used.exist(descriptor.block_bitmap(), 1) {
            return Ok(());
        }
        let said = if uninit {
            self.set_up(group, bytes)?
        } else {
            let block = self.filesystem.block(descriptor.block_bitmap(), Place::Group(group))?;
            if let Some(seed) = numbers.seed
                && !self.same_sum(seed.of_bitmap(&block[..bytes]), descriptor.block_bitmap_sum())
            {
                self.bad(&place, "the checksum is wrong");
            }
            let behind = count..block.len() * 8;
            if behind.into_iter().any(|bit| block[bit / 8] & 1 << (bit % 8) == 0) {
                self.bad(&place, "the bits behind its blocks are not set");
            }
            block[..bytes].to_vec()
        };
        for (is, _, range) in differences(&bits, &said, count) {
            self.bad(&place, said_of("block", start + range.0, start + range.1 - 1, is));
        }
        Ok(())
    }

    /// The bitmap of a group that is left for later: what belongs to the group's own structures, where they are in it.
    fn set_up(&self, group: u32, bytes: usize) -> Result<Vec<u8>> {
        let mut bits = vec![0; bytes];
        let start = self.start(group);
        let end = start + self.length(group);
        let descriptor = self.filesystem.group(group, false)?;
        let tables = self.places(&descriptor).map(|(_, block, length)| (block, length));
        for (block, length) in self.header_runs(group).into_iter().chain(tables) {
            for block in block.max(start)..block.saturating_add(length).min(end) {
                let bit = usize::try_from(block - start).unwrap_or(0);
                bits[bit / 8] |= 1 << (bit % 8);
            }
        }
        Ok(bits)
    }
}
