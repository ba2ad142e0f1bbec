//! Bitmaps and group descriptors: which blocks and inodes are free ("Block Group Descriptors", "Block and inode Bitmaps").

use std::collections::BTreeMap;

use zerocopy::IntoBytes;

use super::{EditError, Editor, Result};
use crate::format::group::{GroupDescriptor, flags};
use crate::format::superblock::{compat, incompat, ro_compat};
use crate::format::{Block, FileType, Ino};
use crate::read::Place;
use crate::write::Run;

/// How many groups are looked through for blocks in a row before scattered ones are taken.
const CAREFUL: u32 = 64;
/// Blocks in a row that are as good as any more.
const ENOUGH: u64 = 2048;

fn bit(bitmap: &[u8], index: usize) -> bool {
    bitmap[index / 8] & 1 << (index % 8) != 0
}

fn set(bitmap: &mut [u8], range: std::ops::Range<usize>, value: bool) {
    for index in range {
        if value {
            bitmap[index / 8] |= 1 << (index % 8);
        } else {
            bitmap[index / 8] &= !(1 << (index % 8));
        }
    }
}

/// A number below that of blocks or inodes in a group.
fn index(number: u64) -> usize {
    usize::try_from(number).expect("a group has at most 2^19 blocks or inodes")
}

/// Which bitmap.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Blocks,
    Inodes,
}

impl Editor {
    pub(super) fn descriptor(&self, group: u32) -> Result<GroupDescriptor> {
        let geometry = &self.filesystem.geometry;
        Ok(geometry.descriptor(&self.filesystem.blocks, group, self.filesystem.verify)?)
    }

    /// Puts a descriptor into its block, with its checksum.
    fn put_descriptor(&mut self, group: u32, descriptor: &GroupDescriptor) -> Result<()> {
        let geometry = &self.filesystem.geometry;
        let (block, at) = geometry.descriptor_place(group);
        let size = usize::from(geometry.descriptor_size);
        let mut bytes = self.filesystem.blocks.metadata(block, Place::Group(group))?.to_vec();
        let place = &mut bytes[at..at + size];
        let known = size.min(size_of::<GroupDescriptor>());
        place[..known].copy_from_slice(&descriptor.as_bytes()[..known]);
        let superblock = &geometry.superblock;
        let sum = match geometry.seed {
            Some(seed) => Some(GroupDescriptor::sum(place, group, seed)),
            None if superblock.has_ro_compat(ro_compat::GDT_CSUM) => {
                Some(GroupDescriptor::sum16(place, group, &superblock.uuid))
            }
            None => None,
        };
        if let Some(sum) = sum {
            let at = std::mem::offset_of!(GroupDescriptor, checksum);
            place[at..at + 2].copy_from_slice(&sum.to_le_bytes());
        }
        self.filesystem.blocks.stage(block, bytes.into());
        Ok(())
    }

    /// Whether descriptors have flags that count.
    fn has_flags(&self) -> bool {
        let superblock = self.superblock();
        superblock.has_ro_compat(ro_compat::GDT_CSUM) || superblock.has_ro_compat(ro_compat::METADATA_CSUM)
    }

    /// The blocks of a group.
    fn blocks_of(&self, group: u32) -> Run {
        let geometry = &self.filesystem.geometry;
        let start = geometry.first_data_block + u64::from(group) * geometry.blocks_per_group;
        Run::new(start, geometry.blocks_per_group.min(geometry.blocks - start))
    }

    pub(super) fn group_of(&self, ino: Ino) -> u32 {
        (ino - 1) / self.filesystem.geometry.inodes_per_group
    }

    /// Bytes of a bitmap that its checksum is of.
    fn bitmap_bytes(&self, of: Of) -> usize {
        let geometry = &self.filesystem.geometry;
        match of {
            Of::Blocks => index(geometry.blocks_per_group) / 8,
            Of::Inodes => geometry.inodes_per_group as usize / 8,
        }
    }

    /// A bitmap; one that is not set up yet is made.
    fn bitmap(&self, of: Of, group: u32, descriptor: &GroupDescriptor) -> Result<Vec<u8>> {
        let bytes = self.bitmap_bytes(of);
        let (flag, block, stored) = match of {
            Of::Blocks => (flags::BLOCK_UNINIT, descriptor.block_bitmap(), descriptor.block_bitmap_sum()),
            Of::Inodes => (flags::INODE_UNINIT, descriptor.inode_bitmap(), descriptor.inode_bitmap_sum()),
        };
        if self.has_flags() && descriptor.flags.get() & flag != 0 {
            return match of {
                Of::Blocks => self.fresh_bitmap(group, descriptor),
                Of::Inodes => {
                    let mut bitmap = vec![0xff; self.block_size() as usize];
                    bitmap[..bytes].fill(0);
                    Ok(bitmap)
                }
            };
        }
        let place = Place::Group(group);
        if !self.filesystem.blocks.exist(block, 1) {
            return Err(EditError::corrupt(place, format!("a bitmap is said to be in block {block}")));
        }
        let bitmap = self.filesystem.blocks.metadata(block, place)?.to_vec();
        if let Some(seed) = self.filesystem.geometry.seed {
            let mask = if self.filesystem.geometry.descriptor_size >= 64 { !0 } else { 0xffff };
            if (seed.of_bitmap(&bitmap[..bytes]) ^ stored) & mask != 0 {
                return Err(EditError::corrupt(place, "the checksum of one of its bitmaps is wrong"));
            }
        }
        Ok(bitmap)
    }

    /// The bitmap of a group in which nothing but the filesystem's own structures is in use.
    fn fresh_bitmap(&self, group: u32, descriptor: &GroupDescriptor) -> Result<Vec<u8>> {
        let geometry = &self.filesystem.geometry;
        let superblock = &geometry.superblock;
        let all = self.blocks_of(group);
        let mut bitmap = vec![0xff; self.block_size() as usize];
        set(&mut bitmap, 0..index(all.length), false);
        let mut take = |run: Run| {
            let start = run.start.max(all.start);
            let end = (run.start.saturating_add(run.length)).min(all.start + all.length);
            if start < end {
                set(&mut bitmap, index(start - all.start)..index(end - all.start), true);
            }
        };
        let per_block = u64::from(geometry.block_size / u32::from(geometry.descriptor_size));
        let descriptors = u64::from(geometry.groups).div_ceil(per_block);
        let has_superblock = geometry.has_superblock(group);
        if has_superblock {
            take(Run::new(all.start, 1));
        }
        let meta = u64::from(group) / per_block;
        if superblock.has_incompat(incompat::META_BG) && meta >= u64::from(superblock.first_meta_bg.get()) {
            let within = u64::from(group) % per_block;
            if [0, 1, per_block - 1].contains(&within) {
                take(Run::new(all.start + u64::from(has_superblock), 1));
            }
        } else if has_superblock {
            let old = match superblock.has_incompat(incompat::META_BG) {
                true => u64::from(superblock.first_meta_bg.get()),
                false => descriptors,
            };
            let reserved = match superblock.has_compat(compat::RESIZE_INODE) {
                true => u64::from(superblock.reserved_gdt_blocks.get()),
                false => 0,
            };
            take(Run::new(all.start + 1, old + reserved));
        }
        // Bitmaps and tables of groups that are kept together may lie in any of them.
        let table = u64::from(geometry.inodes_per_group)
            .saturating_mul(geometry.inode_size.into())
            .div_ceil(geometry.block_size.into());
        let shift = match superblock.has_incompat(incompat::FLEX_BG) {
            true => u32::from(superblock.log_groups_per_flex).min(16),
            false => 0,
        };
        let first = group >> shift << shift;
        for other in first..first.saturating_add(1 << shift).min(geometry.groups) {
            let other = self.descriptor(other)?;
            take(Run::new(other.block_bitmap(), 1));
            take(Run::new(other.inode_bitmap(), 1));
            take(Run::new(other.inode_table(), table));
        }
        let free = (0..index(all.length)).filter(|index| !bit(&bitmap, *index)).count();
        if free as u64 != u64::from(descriptor.free_blocks()) {
            let reason = format!("it says that {} blocks are free, {free} are", descriptor.free_blocks());
            return Err(EditError::corrupt(Place::Group(group), reason));
        }
        Ok(bitmap)
    }

    /// Puts a bitmap into its place, and its checksum and that it is set up into the descriptor.
    fn put_bitmap(
        &mut self,
        of: Of,
        group: u32,
        descriptor: &mut GroupDescriptor,
        bitmap: Vec<u8>,
    ) -> Result<()> {
        let bytes = self.bitmap_bytes(of);
        if let Some(seed) = self.filesystem.geometry.seed {
            let mask = if self.filesystem.geometry.descriptor_size >= 64 { !0 } else { 0xffff };
            let sum = seed.of_bitmap(&bitmap[..bytes]) & mask;
            match of {
                Of::Blocks => descriptor.set_block_bitmap_sum(sum),
                Of::Inodes => descriptor.set_inode_bitmap_sum(sum),
            }
        }
        let (flag, block) = match of {
            Of::Blocks => (flags::BLOCK_UNINIT, descriptor.block_bitmap()),
            Of::Inodes => (flags::INODE_UNINIT, descriptor.inode_bitmap()),
        };
        if self.has_flags() {
            descriptor.flags = (descriptor.flags.get() & !flag).into();
        }
        if !self.filesystem.blocks.exist(block, 1) {
            let reason = format!("a bitmap is said to be in block {block}");
            return Err(EditError::corrupt(Place::Group(group), reason));
        }
        self.filesystem.blocks.stage(block, bitmap.into());
        self.put_descriptor(group, descriptor)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the halves of one number")]
    pub(super) fn set_free_blocks(&mut self, free: u64) {
        let wide = self.superblock().has_incompat(incompat::BITS64);
        let superblock = self.superblock_mut();
        superblock.free_blocks_low = (free as u32).into();
        if wide {
            superblock.free_blocks_high = ((free >> 32) as u32).into();
        }
    }

    /// Free runs of a group that are at least so long, as many as are needed.
    fn free_runs(&self, group: u32, shortest: u64, needed: u64) -> Result<Vec<Run>> {
        let descriptor = self.descriptor(group)?;
        let mut runs = Vec::new();
        if u64::from(descriptor.free_blocks()) < shortest {
            return Ok(runs);
        }
        let all = self.blocks_of(group);
        let mut bitmap = self.bitmap(Of::Blocks, group, &descriptor)?;
        let end = all.start + all.length;
        for (start, after) in self.freed.range(..end).rev() {
            if *after <= all.start {
                break;
            }
            let range = index((*start).max(all.start) - all.start)..index((*after).min(end) - all.start);
            set(&mut bitmap, range, true);
        }
        let (mut at, length, mut found) = (0, index(all.length), 0);
        while at < length && found < needed {
            if at % 8 == 0 && bitmap[at / 8] == 0xff {
                at += 8;
            } else if bit(&bitmap, at) {
                at += 1;
            } else {
                let from = at;
                while at < length && ((at - from) as u64) < needed - found && !bit(&bitmap, at) {
                    at += 1;
                }
                let run = Run::new(all.start + from as u64, (at - from) as u64);
                if run.length >= shortest.min(needed - found) {
                    found += run.length;
                    runs.push(run);
                }
            }
        }
        Ok(runs)
    }

    /// Takes so many free blocks, those near a group first, and in a row where that is possible.
    pub(super) fn allocate(&mut self, count: u64, near: u32) -> Result<Vec<Run>> {
        let groups = self.filesystem.geometry.groups;
        let order = move |number: u32| {
            let group = u64::from(near) + u64::from(number);
            u32::try_from(group % u64::from(groups)).expect("below a number of 32 bits")
        };
        let mut chosen: Vec<Run> = Vec::new();
        let mut left = count;
        for number in 0..groups.min(CAREFUL) {
            if left == 0 {
                break;
            }
            for run in self.free_runs(order(number), left.min(ENOUGH), left)? {
                left -= run.length;
                chosen.push(run);
            }
        }
        if left > 0 {
            // Scattered ones, from the beginning: what was chosen before is chosen again with it.
            (chosen, left) = (Vec::new(), count);
            for number in 0..groups {
                if left == 0 {
                    break;
                }
                for run in self.free_runs(order(number), 1, left)? {
                    left -= run.length;
                    chosen.push(run);
                }
            }
        }
        if left > 0 {
            let block_size = self.block_size();
            return Err(EditError::NoBlocks { needed: count, free: count - left, block_size });
        }
        for run in &chosen {
            self.mark(*run, true)?;
        }
        Ok(chosen)
    }

    /// Takes one block.
    pub(super) fn allocate_one(&mut self, near: u32) -> Result<Block> {
        Ok(self.allocate(1, near)?[0].start)
    }

    /// Gives blocks back. They are not given out again before the commit.
    pub(super) fn release(&mut self, run: Run) -> Result<()> {
        self.mark(run, false)?;
        let staged = self.filesystem.blocks.staged().range(run.start..run.start + run.length);
        for block in staged.map(|(block, _)| *block).collect::<Vec<_>>() {
            self.filesystem.blocks.unstage(block);
        }
        note(&mut self.freed, run);
        Ok(())
    }

    /// Says in the bitmaps that blocks are in use or free.
    fn mark(&mut self, run: Run, used: bool) -> Result<()> {
        let geometry = &self.filesystem.geometry;
        if !self.filesystem.blocks.exist(run.start, run.length) || run.start < geometry.first_data_block {
            let reason = format!("{} blocks from {} on are said to be in use", run.length, run.start);
            return Err(EditError::corrupt(Place::Superblock, reason));
        }
        let (first, per_group) = (geometry.first_data_block, geometry.blocks_per_group);
        let mut at = run.start;
        let end = run.start + run.length;
        while at < end {
            let group = u32::try_from((at - first) / per_group).expect("groups have numbers of 32 bits");
            let all = self.blocks_of(group);
            let stop = end.min(all.start + all.length);
            let mut descriptor = self.descriptor(group)?;
            let mut bitmap = self.bitmap(Of::Blocks, group, &descriptor)?;
            let range = index(at - all.start)..index(stop - all.start);
            if range.clone().any(|index| bit(&bitmap, index) == used) {
                let state = if used { "used" } else { "free" };
                let reason = format!("blocks between {at} and {stop} are {state} already");
                return Err(EditError::corrupt(Place::Group(group), reason));
            }
            set(&mut bitmap, range, used);
            let count = u32::try_from(stop - at).expect("less than a group");
            let free = descriptor.free_blocks();
            let free = if used { free.checked_sub(count) } else { free.checked_add(count) };
            let free = free
                .ok_or_else(|| EditError::corrupt(Place::Group(group), "its free blocks are miscounted"))?;
            descriptor.set_free_blocks(free);
            self.put_bitmap(Of::Blocks, group, &mut descriptor, bitmap)?;
            let free = self.superblock().free_blocks();
            let count = u64::from(count);
            self.set_free_blocks(if used { free.saturating_sub(count) } else { free.saturating_add(count) });
            at = stop;
        }
        Ok(())
    }

    /// Takes a free inode, near a group. Its place in the table, and all places before it, are set up.
    pub(super) fn allocate_inode(&mut self, near: u32, kind: FileType) -> Result<Ino> {
        let geometry = &self.filesystem.geometry;
        let (groups, per_group) = (geometry.groups, geometry.inodes_per_group);
        let first = geometry.superblock.first_ino.get().max(crate::format::ino::FIRST);
        let most = geometry.inodes();
        for number in 0..groups {
            let group =
                u32::try_from((u64::from(near) + u64::from(number)) % u64::from(groups)).expect("below");
            let mut descriptor = self.descriptor(group)?;
            if descriptor.free_inodes() == 0 {
                continue;
            }
            let mut bitmap = self.bitmap(Of::Inodes, group, &descriptor)?;
            let lowest = if group == 0 { first - 1 } else { 0 };
            let Some(at) = (lowest..per_group)
                .take_while(|at| u64::from(group) * u64::from(per_group) + u64::from(*at) < u64::from(most))
                .find(|at| !bit(&bitmap, *at as usize))
            else {
                continue;
            };
            set(&mut bitmap, at as usize..at as usize + 1, true);
            descriptor.set_free_inodes(descriptor.free_inodes() - 1);
            if kind == FileType::Directory {
                descriptor.set_directories(descriptor.directories() + 1);
            }
            if self.has_flags() {
                let uninit = descriptor.flags.get() & flags::INODE_UNINIT != 0;
                let unused = if uninit { per_group } else { descriptor.unused_inodes().min(per_group) };
                let used = per_group - unused;
                if at >= used {
                    self.clear_inodes(&descriptor, group, used, at)?;
                    descriptor.set_unused_inodes(per_group - at - 1);
                }
            }
            self.put_bitmap(Of::Inodes, group, &mut descriptor, bitmap)?;
            let superblock = self.superblock_mut();
            superblock.free_inodes = superblock.free_inodes.get().saturating_sub(1).into();
            return Ok(group * per_group + at + 1);
        }
        Err(EditError::NoInodes(most))
    }

    /// Zeroes inodes of a group that were never used, whatever is in the table there, up to the end of the last one's block.
    fn clear_inodes(&mut self, descriptor: &GroupDescriptor, group: u32, from: u32, to: u32) -> Result<()> {
        let size = usize::from(self.filesystem.geometry.inode_size);
        let block_size = self.block_size() as usize;
        let per_block = u32::try_from(block_size / size).expect("at most 512");
        let place = Place::Group(group);
        for number in from / per_block..=to / per_block {
            let block = descriptor.inode_table().saturating_add(number.into());
            if !self.filesystem.blocks.exist(block, 1) {
                return Err(EditError::corrupt(place, format!("its inode table is at block {block}")));
            }
            let mut bytes = self.filesystem.blocks.metadata(block, place)?.to_vec();
            let first = from.saturating_sub(number * per_block) as usize;
            bytes[first * size..].fill(0);
            self.filesystem.blocks.stage(block, bytes.into());
        }
        Ok(())
    }

    /// Gives an inode back.
    pub(super) fn release_inode(&mut self, ino: Ino, kind: FileType) -> Result<()> {
        let group = self.group_of(ino);
        let at = ((ino - 1) % self.filesystem.geometry.inodes_per_group) as usize;
        let mut descriptor = self.descriptor(group)?;
        let mut bitmap = self.bitmap(Of::Inodes, group, &descriptor)?;
        if !bit(&bitmap, at) {
            return Err(EditError::corrupt(Place::Inode(ino), "it is free, and something refers to it"));
        }
        set(&mut bitmap, at..at + 1, false);
        descriptor.set_free_inodes(descriptor.free_inodes() + 1);
        if kind == FileType::Directory {
            descriptor.set_directories(descriptor.directories().saturating_sub(1));
        }
        self.put_bitmap(Of::Inodes, group, &mut descriptor, bitmap)?;
        let superblock = self.superblock_mut();
        superblock.free_inodes = superblock.free_inodes.get().saturating_add(1).into();
        Ok(())
    }
}

/// Adds a run to those that are kept, joined to the one before it.
fn note(freed: &mut BTreeMap<Block, Block>, run: Run) {
    let end = run.start + run.length;
    match freed.range_mut(..run.start).next_back() {
        Some((_, before)) if *before == run.start => *before = end,
        _ => {
            freed.insert(run.start, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_runs_are_joined() {
        let mut freed = BTreeMap::new();
        for run in [Run::new(10, 5), Run::new(15, 1), Run::new(30, 2), Run::new(16, 4)] {
            note(&mut freed, run);
        }
        assert_eq!(freed, BTreeMap::from([(10, 20), (30, 32)]));
    }

    #[test]
    fn bits() {
        let mut bitmap = [0; 4];
        set(&mut bitmap, 3..12, true);
        assert_eq!(bitmap, [0xf8, 0x0f, 0, 0]);
        set(&mut bitmap, 4..5, false);
        assert!(!bit(&bitmap, 4) && bit(&bitmap, 5));
    }
}
