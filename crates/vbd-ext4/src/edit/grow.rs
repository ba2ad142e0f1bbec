//! A filesystem made larger in place: more blocks in its last group, and new groups behind it.
//!
//! What is new lies behind the old end, where the old filesystem has nothing, and is written first. What changes in the
//! old one is the bitmap of its last group, the group descriptors with their backups, the list of blocks reserved for
//! descriptors, and the superblock: one transaction.

use zerocopy::IntoBytes;

use super::{EditError, Editor, Result};
use crate::format::group::{GroupDescriptor, flags};
use crate::format::inode::Inode;
use crate::format::superblock::{compat, incompat, ro_compat};
use crate::format::{Block, ino};
use crate::read::Place;
use crate::read::raw::Numbers;

/// A last group with fewer blocks than this beyond its own structures is left away.
const FEWEST_IN_LAST: u64 = 50;

/// How large a filesystem was and is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resized {
    /// Bytes before.
    pub before: u64,
    /// Bytes now; less than was asked for where the rest makes no group.
    pub after: u64,
}

/// The numbers of the new filesystem.
struct Plan {
    old: Numbers,
    blocks: u64,
    groups: u32,
    /// Blocks of descriptors before and now, and blocks that stay reserved for more.
    descriptors: u64,
    new_descriptors: u64,
    reserved: u64,
    table: u64,
}

impl Plan {
    fn start(&self, group: u32) -> Block {
        self.old.first_data_block + u64::from(group) * self.old.blocks_per_group
    }

    fn length(&self, group: u32) -> u64 {
        self.old.blocks_per_group.min(self.blocks - self.start(group))
    }

    fn per_block(&self) -> u32 {
        self.old.block_size / u32::from(self.old.descriptor_size)
    }

    /// Blocks at the beginning of a group with a copy of the superblock; as many as before.
    fn header(&self) -> u64 {
        1 + self.new_descriptors + self.reserved
    }
}

impl Editor {
    /// Whether the filesystem can be made as large as `size` bytes; whether its journal is large enough shows later.
    ///
    /// # Errors
    ///
    /// [`EditError::Refused`] where it cannot.
    pub fn may_grow(&self, size: u64) -> Result<()> {
        self.plan(size / u64::from(self.block_size())).map(|_| ())
    }

    /// Makes the filesystem as large as `size` bytes have room for, which are there, and commits. The bytes behind its old
    /// end read as zeros.
    ///
    /// # Errors
    ///
    /// A filesystem that this cannot be done with (meta_bg, no room for more descriptors), a journal too small; those of
    /// reading and writing. Cut at any moment, it has the old size or the new one.
    pub fn grow(mut self, size: u64) -> Result<Resized> {
        let numbers = self.filesystem.numbers();
        let block_size = u64::from(numbers.block_size);
        let before = numbers.blocks * block_size;
        let Some(plan) = self.plan(size / block_size)? else { return Ok(Resized { before, after: before }) };
        // Bitmaps are changed here as they are read.
        self.seal_bitmaps()?;
        let mut descriptors = self.changed_descriptors(&plan)?;
        let mut free = plan.length(numbers.groups - 1) - (numbers.blocks - plan.start(numbers.groups - 1));
        let mut fresh: Vec<(Block, Vec<u8>)> = Vec::new();
        let mut overhead = 0;
        for group in numbers.groups..plan.groups {
            let used = self.new_group(&plan, group, &mut descriptors, &mut fresh);
            free += plan.length(group) - used;
            overhead += used;
        }
        self.count(&plan, free, overhead);
        self.write_backups(&plan, &descriptors, &mut fresh)?;
        self.reserved_descriptors(&plan)?;

        fresh.sort_by_key(|(block, _)| *block);
        self.write_blocks(fresh.iter().map(|(block, bytes)| (*block, &bytes[..])))?;
        self.sync()?;
        self.commit()?;
        Ok(Resized { before, after: plan.blocks * block_size })
    }

    fn plan(&self, wanted: u64) -> Result<Option<Plan>> {
        let old = self.filesystem.numbers();
        let superblock = self.superblock();
        let refuse = |why: String| Err(EditError::Refused(why));
        if superblock.has_incompat(incompat::META_BG) || superblock.has_compat(compat::SPARSE_SUPER2) {
            return refuse(
                "it has meta_bg or sparse_super2, with which it cannot grow here; use resize2fs".to_owned(),
            );
        }
        let per_block = old.block_size / u32::from(old.descriptor_size);
        let table =
            (u64::from(old.inodes_per_group) * u64::from(old.inode_size)).div_ceil(u64::from(old.block_size));
        let descriptors = u64::from(old.groups.div_ceil(per_block));
        let reserved = match superblock.has_compat(compat::RESIZE_INODE) {
            true => u64::from(superblock.reserved_gdt_blocks.get()),
            false => 0,
        };
        let most_groups = (descriptors + reserved) * u64::from(per_block);
        let mut blocks = wanted;
        // Numbers of blocks reserved for descriptors have 32 bits, too.
        let wide = superblock.has_incompat(incompat::BITS64) && !superblock.has_compat(compat::RESIZE_INODE);
        let most = most_groups.saturating_mul(old.blocks_per_group).saturating_add(old.first_data_block);
        let most = if wide { most } else { most.min(u64::from(u32::MAX)) };
        if blocks > most {
            let most = most * u64::from(old.block_size);
            return refuse(format!(
                "it has room for the descriptors of {most} bytes at most; make it larger with resize2fs"
            ));
        }
        loop {
            if blocks <= old.blocks {
                return Ok(None);
            }
            let groups = (blocks - old.first_data_block).div_ceil(old.blocks_per_group);
            let groups = u32::try_from(groups).unwrap_or(u32::MAX);
            let new_descriptors = u64::from(groups.div_ceil(per_block)).max(descriptors);
            let reserved = (descriptors + reserved).saturating_sub(new_descriptors);
            let plan = Plan { old, blocks, groups, descriptors, new_descriptors, reserved, table };
            let last = plan.length(groups - 1);
            let header = if self.filesystem.superblock_in(groups - 1) { plan.header() } else { 0 };
            if groups > old.groups && last < header + 2 + table + FEWEST_IN_LAST {
                blocks -= last;
                continue;
            }
            if u64::from(groups) * u64::from(old.inodes_per_group) > u64::from(u32::MAX) {
                return refuse(
                    "with so many groups it would have more inodes than there are numbers".to_owned(),
                );
            }
            return Ok(Some(plan));
        }
    }

    /// All blocks of descriptors that are new or change, with the last old group's own bitmap made longer.
    fn changed_descriptors(&mut self, plan: &Plan) -> Result<Vec<(u64, Vec<u8>)>> {
        let per_block = plan.per_block();
        let first = u64::from((plan.old.groups - 1) / per_block);
        let mut blocks = Vec::new();
        for index in first..plan.new_descriptors {
            let bytes = if index < plan.descriptors {
                let place = plan.old.first_data_block + 1 + index;
                self.filesystem.block(place, Place::Group(plan.old.groups - 1))?.to_vec()
            } else {
                vec![0; plan.old.block_size as usize]
            };
            blocks.push((index, bytes));
        }
        let last = plan.old.groups - 1;
        let before = plan.old.blocks - plan.start(last);
        let after = plan.length(last);
        if after == before {
            return Ok(blocks);
        }
        let mut descriptor = self.filesystem.group(last, true)?;
        let free = descriptor.free_blocks() + u32::try_from(after - before).unwrap_or(0);
        descriptor.set_free_blocks(free);
        if descriptor.flags.get() & flags::BLOCK_UNINIT == 0 || !self.has_group_sums() {
            let place = descriptor.block_bitmap();
            let mut bitmap = self.filesystem.block(place, Place::Group(last))?.to_vec();
            for bit in before..after {
                let bit = usize::try_from(bit).unwrap_or(0);
                bitmap[bit / 8] &= !(1 << (bit % 8));
            }
            if let Some(seed) = plan.old.seed {
                let bytes = usize::try_from(plan.old.blocks_per_group / 8).unwrap_or(0);
                descriptor.set_block_bitmap_sum(seed.of_bitmap(&bitmap[..bytes]));
            }
            self.filesystem.blocks.stage(place, bitmap.into());
        }
        self.put(plan, &mut blocks, last, &mut descriptor);
        Ok(blocks)
    }

    fn has_group_sums(&self) -> bool {
        self.superblock().has_ro_compat(ro_compat::GDT_CSUM)
            || self.superblock().has_ro_compat(ro_compat::METADATA_CSUM)
    }

    /// Puts a descriptor with its checksum among the blocks of them.
    fn put(&self, plan: &Plan, blocks: &mut [(u64, Vec<u8>)], group: u32, descriptor: &mut GroupDescriptor) {
        let size = usize::from(plan.old.descriptor_size);
        let known = size.min(size_of::<GroupDescriptor>());
        let index = u64::from(group / plan.per_block());
        let at = (group % plan.per_block()) as usize * size;
        let Some((_, block)) = blocks.iter_mut().find(|(number, _)| *number == index) else { return };
        let bytes = &mut block[at..at + size];
        bytes[..known].copy_from_slice(&descriptor.as_bytes()[..known]);
        descriptor.checksum = match plan.old.seed {
            Some(seed) => GroupDescriptor::sum(bytes, group, seed),
            None if self.superblock().has_ro_compat(ro_compat::GDT_CSUM) => {
                GroupDescriptor::sum16(bytes, group, &self.superblock().uuid)
            }
            None => 0,
        }
        .into();
        bytes[..known].copy_from_slice(&descriptor.as_bytes()[..known]);
    }

    /// A new group: its bitmaps at its beginning, its inodes behind them. How many of its blocks that takes.
    fn new_group(
        &self,
        plan: &Plan,
        group: u32,
        descriptors: &mut [(u64, Vec<u8>)],
        fresh: &mut Vec<(Block, Vec<u8>)>,
    ) -> u64 {
        let backup = self.filesystem.superblock_in(group);
        let header = if backup { plan.header() } else { 0 };
        let start = plan.start(group);
        let (block_bitmap, inode_bitmap) = (start + header, start + header + 1);
        let used = header + 2 + plan.table;
        let length = plan.length(group);
        let narrow = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        let mut descriptor = GroupDescriptor::default();
        descriptor.set_places(block_bitmap, inode_bitmap, inode_bitmap + 1);
        descriptor.set_free_blocks(narrow(length - used));
        descriptor.set_free_inodes(plan.old.inodes_per_group);
        let bits = |from: u64, upto: u64, set_from: u64| {
            let mut bitmap = vec![0; plan.old.block_size as usize];
            let all = bitmap.len() as u64 * 8;
            for bit in (from..upto).chain(set_from..all) {
                let bit = usize::try_from(bit).unwrap_or(0);
                bitmap[bit / 8] |= 1 << (bit % 8);
            }
            bitmap
        };
        let mut state = 0;
        if self.has_group_sums() {
            // The kernel sets the rest up when it comes to use the group.
            state |= flags::INODE_UNINIT | flags::INODE_ZEROED;
            descriptor.set_unused_inodes(plan.old.inodes_per_group);
        } else {
            fresh.push((inode_bitmap, bits(0, 0, u64::from(plan.old.inodes_per_group))));
        }
        if self.has_group_sums() && !backup && group + 1 < plan.groups {
            state |= flags::BLOCK_UNINIT;
        } else {
            let bitmap = bits(0, used, length);
            if let Some(seed) = plan.old.seed {
                let bytes = usize::try_from(plan.old.blocks_per_group / 8).unwrap_or(0);
                descriptor.set_block_bitmap_sum(seed.of_bitmap(&bitmap[..bytes]));
            }
            fresh.push((block_bitmap, bitmap));
        }
        descriptor.flags = state.into();
        self.put(plan, descriptors, group, &mut descriptor);
        used
    }

    /// The new numbers in the superblock.
    fn count(&mut self, plan: &Plan, free: u64, overhead: u64) {
        let inodes = (plan.groups - plan.old.groups) * plan.old.inodes_per_group;
        let superblock = self.superblock();
        let reserved =
            u128::from(superblock.reserved_blocks()) * u128::from(plan.blocks) / u128::from(plan.old.blocks);
        let reserved = u64::try_from(reserved).unwrap_or(0);
        let free = superblock.free_blocks() + free;
        let wide = superblock.has_incompat(incompat::BITS64);
        #[expect(clippy::cast_possible_truncation, reason = "the halves of one number")]
        let halves = |number: u64| ((number as u32), if wide { (number >> 32) as u32 } else { 0 });
        let superblock = self.superblock_mut();
        let (low, high) = halves(plan.blocks);
        (superblock.blocks_count_low, superblock.blocks_count_high) = (low.into(), high.into());
        let (low, high) = halves(free);
        (superblock.free_blocks_low, superblock.free_blocks_high) = (low.into(), high.into());
        let (low, high) = halves(reserved);
        (superblock.reserved_blocks_low, superblock.reserved_blocks_high) = (low.into(), high.into());
        superblock.inodes_count = (superblock.inodes_count.get() + inodes).into();
        superblock.free_inodes = (superblock.free_inodes.get() + inodes).into();
        superblock.reserved_gdt_blocks = u16::try_from(plan.reserved).unwrap_or(0).into();
        let known = superblock.overhead_clusters.get();
        if known != 0 {
            superblock.overhead_clusters = known.saturating_add(u32::try_from(overhead).unwrap_or(0)).into();
        }
    }

    /// The descriptors in their places and in the backups, and the backups of the superblock.
    fn write_backups(
        &mut self,
        plan: &Plan,
        descriptors: &[(u64, Vec<u8>)],
        fresh: &mut Vec<(Block, Vec<u8>)>,
    ) -> Result<()> {
        for group in 0..plan.groups {
            if !self.filesystem.superblock_in(group) {
                continue;
            }
            let start = plan.start(group);
            let new = group >= plan.old.groups;
            let mut blocks: Vec<(Block, Vec<u8>)> = Vec::new();
            if new {
                // Those in front of the first that changes are copies of what is there.
                for index in 0..descriptors.first().map_or(0, |(index, _)| *index) {
                    let bytes =
                        self.filesystem.block(plan.old.first_data_block + 1 + index, Place::Group(group))?;
                    blocks.push((start + 1 + index, bytes.to_vec()));
                }
            }
            blocks.extend(descriptors.iter().map(|(index, bytes)| (start + 1 + index, bytes.clone())));
            if group > 0 {
                blocks.push((start, self.backup_of(group)));
            }
            for (block, bytes) in blocks {
                if new {
                    fresh.push((block, bytes));
                } else {
                    self.filesystem.blocks.stage(block, bytes.into());
                }
            }
        }
        Ok(())
    }

    /// The superblock as its backup in a group has it.
    fn backup_of(&self, group: u32) -> Vec<u8> {
        let mut copy = self.superblock().clone();
        copy.block_group = u16::try_from(group).unwrap_or(u16::MAX).into();
        copy.incompat = (copy.incompat.get() & !incompat::RECOVER).into();
        if copy.has_ro_compat(ro_compat::METADATA_CSUM) {
            copy.seal();
        }
        let mut bytes = vec![0; self.block_size() as usize];
        bytes[..copy.as_bytes().len()].copy_from_slice(copy.as_bytes());
        bytes
    }

    /// Puts the backup of the superblock into a group that begins at this block.
    pub(super) fn stage_backup(&mut self, group: u32, start: Block) {
        let bytes = self.backup_of(group);
        self.filesystem.blocks.stage(start, bytes.into());
    }

    /// The inode that holds the blocks reserved for descriptors: those that are descriptors now go, and what stays has
    /// copies in the new backups.
    fn reserved_descriptors(&mut self, plan: &Plan) -> Result<()> {
        let place = Place::Inode(ino::RESIZE);
        let backups = |groups: std::ops::Range<u32>, editor: &Editor| -> Vec<u32> {
            groups.filter(|group| *group > 0 && editor.filesystem.superblock_in(*group)).collect()
        };
        let all = backups(0..plan.groups, self);
        let added = plan.new_descriptors > plan.descriptors;
        let copied = !backups(plan.old.groups..plan.groups, self).is_empty();
        if !self.superblock().has_compat(compat::RESIZE_INODE) || !added && !copied {
            return Ok(());
        }
        let group = self.filesystem.group(0, true)?;
        let offset = u64::from(ino::RESIZE - 1) * u64::from(plan.old.inode_size);
        let block_size = u64::from(plan.old.block_size);
        let table = group.inode_table() + offset / block_size;
        let at = usize::try_from(offset % block_size).unwrap_or(0);
        let mut inodes = self.filesystem.block(table, place)?.to_vec();
        let bytes = &mut inodes[at..at + usize::from(plan.old.inode_size)];
        let mut fields = Inode::read(bytes);
        let list = u64::from(u32::from_le_bytes([52, 53, 54, 55].map(|byte| fields.block[byte])));
        if list == 0 {
            return Ok(());
        }
        let fan = block_size / 4;
        let put = |block: &mut [u8], index: u64, number: Block| {
            let at = usize::try_from(index % fan).unwrap_or(0) * 4;
            block[at..at + 4].copy_from_slice(&u32::try_from(number).unwrap_or(0).to_le_bytes());
        };
        if !self.filesystem.blocks.exist(list, 1) {
            return Err(EditError::corrupt(place, format!("its list is said to be in block {list}")));
        }
        let mut listed = self.filesystem.block(list, place)?.to_vec();
        for index in plan.descriptors..plan.new_descriptors {
            put(&mut listed, index, 0);
        }
        self.filesystem.blocks.stage(list, listed.into());
        for index in plan.new_descriptors..plan.new_descriptors + plan.reserved {
            if !copied {
                break;
            }
            let mut block = vec![0; plan.old.block_size as usize];
            for (number, group) in (0..).zip(&all) {
                put(&mut block, number, plan.start(*group) + 1 + index);
            }
            self.filesystem.blocks.stage(plan.old.first_data_block + 1 + index, block.into());
        }
        fields.set_blocks(1 + plan.reserved * (1 + all.len() as u64), plan.old.block_size);
        let known = bytes.len().min(crate::format::inode::GOOD_OLD_SIZE);
        bytes[..known].copy_from_slice(&fields.as_bytes()[..known]);
        if let Some(seed) = plan.old.seed {
            Inode::seal(bytes, ino::RESIZE, seed);
        }
        self.filesystem.blocks.stage(table, inodes.into());
        Ok(())
    }
}
