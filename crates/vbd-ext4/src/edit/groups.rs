//! Bitmaps and group descriptors: which blocks and inodes are free ("Block Group Descriptors", "Block and inode Bitmaps").

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

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

/// The first index from `at` on, below `end`, whose bit has this value; `end` where none has.
fn next(bitmap: &[u8], mut at: usize, end: usize, value: bool) -> usize {
    let other = if value { 0 } else { 0xff };
    while at < end {
        if at.is_multiple_of(8) && bitmap[at / 8] == other {
            // Most of a bitmap is of one kind.
            at += 8 * bitmap[at / 8..end.div_ceil(8)].iter().take_while(|byte| **byte == other).count();
        } else if bit(bitmap, at) == value {
            return at;
        } else {
            at += 1;
        }
    }
    end
}

/// Which bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Of {
    Blocks,
    Inodes,
}

/// What is known of the space beyond what the filesystem says itself.
#[derive(Debug, Default)]
pub(super) struct Space {
    /// Blocks freed since the last commit: first block to the one after the last.
    freed: BTreeMap<Block, Block>,
    /// Nothing below these indices can be given out, by group.
    blocks_from: HashMap<u32, usize>,
    inodes_from: HashMap<u32, u32>,
    /// Bitmaps whose checksums are made with the commit.
    unsealed: BTreeSet<(Of, u32)>,
    /// Where the filesystem will end: nothing from that block and group on is given out.
    pub(super) end: Option<(Block, u32)>,
}

impl Space {
    /// What was changed is in its place.
    pub(super) fn settle(&mut self) {
        *self = Space { end: self.end, ..Space::default() };
    }

    /// The block behind the freed ones that this one is among; nothing where it is none.
    fn freed_until(&self, block: Block) -> Option<Block> {
        let (_, after) = self.freed.range(..=block).next_back()?;
        (*after > block).then_some(*after)
    }

    /// The next block that was freed, from one on that was not.
    fn next_freed(&self, block: Block) -> Option<Block> {
        self.freed.range(block..).next().map(|(start, _)| *start)
    }
}

impl Editor {
    pub(super) fn descriptor(&self, group: u32) -> Result<GroupDescriptor> {
        let geometry = &self.filesystem.geometry;
        Ok(geometry.descriptor(&self.filesystem.blocks, group, self.filesystem.verify)?)
    }

    /// Puts a descriptor into its block, with its checksum.
    pub(super) fn put_descriptor(&mut self, group: u32, descriptor: &GroupDescriptor) -> Result<()> {
        let geometry = &self.filesystem.geometry;
        let (block, at) = geometry.descriptor_place(group);
        let size = usize::from(geometry.descriptor_size);
        let place = &mut self.filesystem.blocks.change(block, Place::Group(group))?[at..at + size];
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
    fn bitmap(&self, of: Of, group: u32, descriptor: &GroupDescriptor) -> Result<Arc<[u8]>> {
        let bytes = self.bitmap_bytes(of);
        let (flag, block, stored) = match of {
            Of::Blocks => (flags::BLOCK_UNINIT, descriptor.block_bitmap(), descriptor.block_bitmap_sum()),
            Of::Inodes => (flags::INODE_UNINIT, descriptor.inode_bitmap(), descriptor.inode_bitmap_sum()),
        };
        if self.has_flags() && descriptor.flags.get() & flag != 0 {
            return match of {
                Of::Blocks => Ok(self.fresh_bitmap(group, descriptor)?.into()),
                Of::Inodes => {
                    let mut bitmap = vec![0xff; self.block_size() as usize];
                    bitmap[..bytes].fill(0);
                    Ok(bitmap.into())
                }
            };
        }
        let place = Place::Group(group);
        if !self.filesystem.blocks.exist(block, 1) {
            return Err(EditError::corrupt(place, format!("a bitmap is said to be in block {block}")));
        }
        let bitmap = self.filesystem.blocks.metadata(block, place)?;
        // One that was changed has its checksum with the commit.
        if let Some(seed) = self.filesystem.geometry.seed.filter(|_| !self.filesystem.blocks.is_staged(block))
        {
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

    /// Sets bits of a bitmap that was read, which is set up with that, and puts the descriptor into its place. The bitmap's
    /// checksum is made with the commit.
    fn set_bits(
        &mut self,
        (of, group): (Of, u32),
        descriptor: &mut GroupDescriptor,
        bitmap: Arc<[u8]>,
        range: std::ops::Range<usize>,
        value: bool,
    ) -> Result<()> {
        let (flag, block) = match of {
            Of::Blocks => (flags::BLOCK_UNINIT, descriptor.block_bitmap()),
            Of::Inodes => (flags::INODE_UNINIT, descriptor.inode_bitmap()),
        };
        let place = Place::Group(group);
        if !self.filesystem.blocks.exist(block, 1) {
            return Err(EditError::corrupt(place, format!("a bitmap is said to be in block {block}")));
        }
        let made = self.has_flags() && descriptor.flags.get() & flag != 0;
        if made || !self.filesystem.blocks.is_staged(block) {
            self.filesystem.blocks.stage(block, bitmap);
        } else {
            // It is changed where it is, unless somebody else looks at it.
            drop(bitmap);
        }
        if self.has_flags() {
            descriptor.flags = (descriptor.flags.get() & !flag).into();
        }
        set(self.filesystem.blocks.change(block, place)?, range, value);
        self.space.unsealed.insert((of, group));
        self.put_descriptor(group, descriptor)
    }

    /// Makes the checksums of the bitmaps that were changed.
    pub(super) fn seal_bitmaps(&mut self) -> Result<()> {
        let unsealed = std::mem::take(&mut self.space.unsealed);
        let Some(seed) = self.filesystem.geometry.seed else { return Ok(()) };
        for (of, group) in unsealed {
            let mut descriptor = self.descriptor(group)?;
            let bytes = self.bitmap_bytes(of);
            let mask = if self.filesystem.geometry.descriptor_size >= 64 { !0 } else { 0xffff };
            let block = match of {
                Of::Blocks => descriptor.block_bitmap(),
                Of::Inodes => descriptor.inode_bitmap(),
            };
            let bitmap = self.filesystem.blocks.metadata(block, Place::Group(group))?;
            let sum = seed.of_bitmap(&bitmap[..bytes]) & mask;
            match of {
                Of::Blocks => descriptor.set_block_bitmap_sum(sum),
                Of::Inodes => descriptor.set_inode_bitmap_sum(sum),
            }
            self.put_descriptor(group, &descriptor)?;
        }
        Ok(())
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
    fn free_runs(&mut self, group: u32, shortest: u64, needed: u64) -> Result<Vec<Run>> {
        let descriptor = self.descriptor(group)?;
        let mut runs = Vec::new();
        if u64::from(descriptor.free_blocks()) < shortest {
            return Ok(runs);
        }
        let all = self.blocks_of(group);
        let bitmap = self.bitmap(Of::Blocks, group, &descriptor)?;
        let end = self.space.end.map_or(all.end(), |(end, _)| end.clamp(all.start, all.end()));
        let (mut at, length, mut found) =
            (self.space.blocks_from.get(&group).copied().unwrap_or(0), index(end - all.start), 0);
        let mut first = None;
        while found < needed {
            let from = next(&bitmap, at, length, false);
            if from >= length {
                break;
            }
            let block = all.start + from as u64;
            if let Some(after) = self.space.freed_until(block) {
                at = index(after.min(all.end()) - all.start);
                continue;
            }
            let wall = self.space.next_freed(block).map_or(length, |freed| index(freed.min(end) - all.start));
            let most = from.saturating_add(usize::try_from(needed - found).unwrap_or(usize::MAX));
            at = next(&bitmap, from, wall.min(most), true);
            first.get_or_insert(from);
            let run = Run::new(block, (at - from) as u64);
            if run.length >= shortest.min(needed - found) {
                found += run.length;
                runs.push(run);
            }
        }
        self.space.blocks_from.insert(group, first.unwrap_or(length));
        Ok(runs)
    }

    /// Groups that something may be taken from.
    fn groups_to_come(&self) -> u32 {
        self.space.end.map_or(self.filesystem.geometry.groups, |(_, groups)| groups)
    }

    /// Takes so many free blocks, those near a group first, and in a row where that is possible.
    pub(super) fn allocate(&mut self, count: u64, near: u32) -> Result<Vec<Run>> {
        let groups = self.groups_to_come();
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
        note(&mut self.space.freed, run);
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
            let bitmap = self.bitmap(Of::Blocks, group, &descriptor)?;
            let range = index(at - all.start)..index(stop - all.start);
            if next(&bitmap, range.start, range.end, used) < range.end {
                let state = if used { "used" } else { "free" };
                let reason = format!("blocks between {at} and {stop} are {state} already");
                return Err(EditError::corrupt(Place::Group(group), reason));
            }
            let count = u32::try_from(stop - at).expect("less than a group");
            let free = descriptor.free_blocks();
            let free = if used { free.checked_sub(count) } else { free.checked_add(count) };
            let free = free
                .ok_or_else(|| EditError::corrupt(Place::Group(group), "its free blocks are miscounted"))?;
            descriptor.set_free_blocks(free);
            self.set_bits((Of::Blocks, group), &mut descriptor, bitmap, range, used)?;
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
        let (groups, per_group) = (self.groups_to_come(), geometry.inodes_per_group);
        let first = geometry.superblock.first_ino.get().max(crate::format::ino::FIRST);
        let most = geometry.inodes();
        for number in 0..groups {
            let group =
                u32::try_from((u64::from(near) + u64::from(number)) % u64::from(groups)).expect("below");
            let mut descriptor = self.descriptor(group)?;
            if descriptor.free_inodes() == 0 {
                continue;
            }
            let bitmap = self.bitmap(Of::Inodes, group, &descriptor)?;
            let lowest = if group == 0 { first - 1 } else { 0 };
            let lowest = lowest.max(self.space.inodes_from.get(&group).copied().unwrap_or(0));
            let end = u64::from(most).saturating_sub(u64::from(group) * u64::from(per_group));
            let end = u32::try_from(end).unwrap_or(u32::MAX).min(per_group);
            let at = next(&bitmap, lowest as usize, end as usize, false);
            let at = u32::try_from(at).expect("a group has at most 2^19 inodes");
            if at >= end {
                continue;
            }
            self.space.inodes_from.insert(group, at + 1);
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
            let range = at as usize..at as usize + 1;
            self.set_bits((Of::Inodes, group), &mut descriptor, bitmap, range, true)?;
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
            let first = from.saturating_sub(number * per_block) as usize;
            self.filesystem.blocks.change(block, place)?[first * size..].fill(0);
        }
        Ok(())
    }

    /// Gives an inode back.
    pub(super) fn release_inode(&mut self, ino: Ino, kind: FileType) -> Result<()> {
        let group = self.group_of(ino);
        let at = ((ino - 1) % self.filesystem.geometry.inodes_per_group) as usize;
        let mut descriptor = self.descriptor(group)?;
        let bitmap = self.bitmap(Of::Inodes, group, &descriptor)?;
        if !bit(&bitmap, at) {
            return Err(EditError::corrupt(Place::Inode(ino), "it is free, and something refers to it"));
        }
        self.space.inodes_from.remove(&group);
        descriptor.set_free_inodes(descriptor.free_inodes() + 1);
        if kind == FileType::Directory {
            descriptor.set_directories(descriptor.directories().saturating_sub(1));
        }
        self.set_bits((Of::Inodes, group), &mut descriptor, bitmap, at..at + 1, false)?;
        let superblock = self.superblock_mut();
        superblock.free_inodes = superblock.free_inodes.get().saturating_add(1).into();
        Ok(())
    }

    /// How many blocks of a group are in use from an index on, and how many there are.
    pub(super) fn used_blocks(&self, group: u32, from: u64) -> Result<(u64, u64)> {
        let bitmap = self.bitmap(Of::Blocks, group, &self.descriptor(group)?)?;
        let length = self.blocks_of(group).length;
        let used = (index(from)..index(length)).filter(|at| bit(&bitmap, *at)).count();
        Ok((used as u64, length - from))
    }

    /// The inodes of a group that are in use, those reserved included.
    pub(super) fn inodes_in_use(&self, group: u32) -> Result<Vec<Ino>> {
        let geometry = &self.filesystem.geometry;
        let descriptor = self.descriptor(group)?;
        let bitmap = self.bitmap(Of::Inodes, group, &descriptor)?;
        let first = group * geometry.inodes_per_group + 1;
        let used = (0..geometry.inodes_per_group).filter(|at| bit(&bitmap, *at as usize));
        Ok(used.map(|at| first + at).collect())
    }

    /// Has a group end at an index, behind which so many blocks are free and all others nobody's any more.
    pub(super) fn end_group(&mut self, group: u32, from: u64, free: u64) -> Result<()> {
        let range = index(from)..index(self.blocks_of(group).length);
        if range.is_empty() {
            return Ok(());
        }
        let mut descriptor = self.descriptor(group)?;
        let bitmap = self.bitmap(Of::Blocks, group, &descriptor)?;
        let left = u64::from(descriptor.free_blocks()).saturating_sub(free);
        descriptor.set_free_blocks(u32::try_from(left).expect("fewer than before"));
        self.set_bits((Of::Blocks, group), &mut descriptor, bitmap, range, true)
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
        let bitmap = [0xff, 0xff, 0xf7, 0, 0];
        assert_eq!((next(&bitmap, 0, 40, false), next(&bitmap, 19, 19, false)), (19, 19));
        assert_eq!((next(&bitmap, 20, 40, false), next(&bitmap, 24, 40, true)), (24, 40));
        assert_eq!((next(&bitmap, 3, 12, false), next(&bitmap, 19, 40, true)), (12, 20));
    }
}
