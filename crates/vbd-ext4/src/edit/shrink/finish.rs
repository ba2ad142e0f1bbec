//! The transaction that cuts off what nobody uses any more.

use super::super::{EditError, Editor, Result};
use super::Plan;
use crate::format::superblock::{compat, incompat};
use crate::format::{Block, ino};
use crate::read::Place;
use crate::write::Run;

impl Editor {
    /// Has the filesystem end where it shall; nothing but the groups' own is behind that.
    pub(super) fn cut(&mut self, plan: &Plan) -> Result<()> {
        let (used, own) = (self.used_behind(plan)?, self.own_behind(plan)?);
        if used != own || self.inodes_behind(plan)? != 0 {
            let reason =
                format!("{used} blocks behind its new end are in use, and {own} can be told whose they are");
            return Err(EditError::corrupt(Place::Superblock, reason));
        }
        self.attempt(|editor| editor.stage_cut(plan))
    }

    fn stage_cut(&mut self, plan: &Plan) -> Result<()> {
        let mut overhead = 0;
        for group in plan.groups..plan.old.groups {
            let descriptor = self.descriptor(group)?;
            overhead += 2 + plan.table;
            if self.filesystem.superblock_in(group) {
                overhead += plan.header();
            }
            for (place, length) in plan.places(&descriptor) {
                let below = (place + length).min(plan.blocks).saturating_sub(place);
                if below > 0 {
                    self.release(Run::new(place, below))?;
                }
            }
        }
        if plan.excess > 0 {
            let first = plan.header() - plan.excess;
            let backups = (0..plan.groups).filter(|group| self.filesystem.superblock_in(*group));
            for group in backups.collect::<Vec<_>>() {
                overhead += plan.excess;
                self.release(Run::new(plan.start(group) + first, plan.excess))?;
            }
        }
        let last = plan.groups - 1;
        let cut = self.free_in_cut(plan)?;
        self.end_group(last, plan.blocks - plan.start(last), cut)?;
        let mut gone = cut;
        for group in plan.groups..plan.old.groups {
            let mut descriptor = self.descriptor(group)?;
            gone += u64::from(descriptor.free_blocks());
            // For a kernel that replays this and does not know yet that the group is gone: it must not find anything free in
            // it, nor keep others from what was the group's below the new end.
            let header = if self.filesystem.superblock_in(group) { plan.header() } else { 0 };
            let own = plan.start(group) + header;
            descriptor.set_places(own, own + 1, own + 2);
            descriptor.set_free_blocks(0);
            descriptor.set_free_inodes(0);
            descriptor.set_unused_inodes(0);
            self.put_descriptor(group, &descriptor)?;
        }
        self.shrink_numbers(plan, gone, overhead);
        self.list_reserved(plan)?;
        for group in
            (1..plan.groups).filter(|group| self.filesystem.superblock_in(*group)).collect::<Vec<_>>()
        {
            self.stage_backup(group, plan.start(group));
        }
        Ok(())
    }

    /// The numbers in the superblock, with so many free blocks and blocks of groups' own less.
    fn shrink_numbers(&mut self, plan: &Plan, gone: u64, overhead: u64) {
        let superblock = self.superblock();
        let free = superblock.free_blocks().saturating_sub(gone);
        let reserved =
            u128::from(superblock.reserved_blocks()) * u128::from(plan.blocks) / u128::from(plan.old.blocks);
        let reserved = u64::try_from(reserved).unwrap_or(0);
        let wide = superblock.has_incompat(incompat::BITS64);
        #[expect(clippy::cast_possible_truncation, reason = "the halves of one number")]
        let halves = |number: u64| ((number as u32), if wide { (number >> 32) as u32 } else { 0 });
        let inodes = (plan.old.groups - plan.groups) * plan.old.inodes_per_group;
        self.set_free_blocks(free);
        let superblock = self.superblock_mut();
        let (low, high) = halves(plan.blocks);
        (superblock.blocks_count_low, superblock.blocks_count_high) = (low.into(), high.into());
        let (low, high) = halves(reserved);
        (superblock.reserved_blocks_low, superblock.reserved_blocks_high) = (low.into(), high.into());
        superblock.inodes_count = plan.inodes().into();
        superblock.free_inodes = superblock.free_inodes.get().saturating_sub(inodes).into();
        superblock.reserved_gdt_blocks = u16::try_from(plan.reserved).unwrap_or(0).into();
        let known = superblock.overhead_clusters.get();
        if known != 0 {
            superblock.overhead_clusters =
                known.saturating_sub(u32::try_from(overhead).unwrap_or(u32::MAX)).into();
        }
    }

    /// The inode that holds the blocks reserved for descriptors: what were descriptors comes to it, and the copies in groups
    /// that went are gone.
    fn list_reserved(&mut self, plan: &Plan) -> Result<()> {
        let Some(list) = self.reserved_list()? else { return Ok(()) };
        let backups: Vec<u32> =
            (1..plan.groups).filter(|group| self.filesystem.superblock_in(*group)).collect();
        let fewer = (plan.groups..plan.old.groups).any(|group| self.filesystem.superblock_in(group));
        if !self.superblock().has_compat(compat::RESIZE_INODE)
            || !fewer && plan.new_descriptors == plan.descriptors
        {
            return Ok(());
        }
        let place = Place::Inode(ino::RESIZE);
        let fan = u64::from(plan.old.block_size / 4);
        let put = |block: &mut [u8], index: u64, number: Block| {
            let at = usize::try_from(index % fan).unwrap_or(0) * 4;
            block[at..at + 4].copy_from_slice(&u32::try_from(number).unwrap_or(0).to_le_bytes());
        };
        let first = plan.old.first_data_block + 1;
        let listed = self.filesystem.blocks.change(list, place)?;
        listed.fill(0);
        for index in plan.new_descriptors..plan.new_descriptors + plan.reserved {
            put(listed, index, first + index);
        }
        for index in plan.new_descriptors..plan.new_descriptors + plan.reserved {
            let mut block = vec![0; plan.old.block_size as usize];
            for (number, group) in (0..).zip(&backups) {
                put(&mut block, number, plan.start(*group) + 1 + index);
            }
            self.filesystem.blocks.stage(first + index, block.into());
        }
        let mut raw = self.load_any(ino::RESIZE)?;
        raw.fields.set_blocks(1 + plan.reserved * (1 + backups.len() as u64), plan.old.block_size);
        self.store(raw)
    }
}
