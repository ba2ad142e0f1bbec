//! A filesystem made smaller in place.
//!
//! Three passes, each of transactions after which the filesystem is whole, as large as before, and nearer to its end:
//! blocks behind the new end are copied to free ones below it before the map that names them changes; inodes of the groups
//! that go get other numbers, with the names that lead to them; and at last one transaction cuts off what is left, which
//! then belongs to nobody but the groups themselves. The file can be cut after that.
//!
//! Cut at any moment it can be done again. A kernel that mounts in the middle of the last transaction has read the old
//! numbers of groups before it replays the journal: the descriptors of groups that go say that nothing in them is free.

mod blocks;
mod finish;
mod inodes;

use super::{EditError, Editor, Resized, Result};
use crate::format::group::GroupDescriptor;
use crate::format::superblock::{compat, incompat};
use crate::format::{Block, Ino, ino};
use crate::read::Place;
use crate::read::raw::Numbers;

/// A last group with fewer blocks than this beyond its own structures is left away.
const FEWEST_IN_LAST: u64 = 50;
/// Blocks of metadata that one transaction may have before it ends.
const STAGED: usize = 1024;

/// The numbers of the smaller filesystem.
struct Plan {
    old: Numbers,
    /// Blocks, and so the first one that goes.
    blocks: u64,
    groups: u32,
    /// Blocks of an inode table.
    table: u64,
    /// Blocks of descriptors before and after, and blocks reserved for more after.
    descriptors: u64,
    new_descriptors: u64,
    reserved: u64,
    /// Blocks that were descriptors or reserved for them, and are neither afterwards.
    excess: u64,
}

impl Plan {
    fn start(&self, group: u32) -> Block {
        self.old.first_data_block + u64::from(group) * self.old.blocks_per_group
    }

    /// The last inode that keeps its number.
    fn inodes(&self) -> Ino {
        self.groups * self.old.inodes_per_group
    }

    /// Blocks at the beginning of a group with a copy of the superblock, as long as it has them all.
    fn header(&self) -> u64 {
        1 + self.new_descriptors + self.reserved + self.excess
    }

    /// The places of a group's own structures, and how long they are.
    fn places(&self, descriptor: &GroupDescriptor) -> [(Block, u64); 3] {
        [
            (descriptor.block_bitmap(), 1),
            (descriptor.inode_bitmap(), 1),
            (descriptor.inode_table(), self.table),
        ]
    }
}

fn refuse<T>(why: impl Into<String>) -> Result<T> {
    Err(EditError::Refused(why.into()))
}

impl Editor {
    /// Whether the filesystem can be made as small as `size` bytes: nothing is written. What a larger map of moved blocks
    /// takes does not count.
    ///
    /// # Errors
    ///
    /// [`EditError::Refused`] where this is not done, [`EditError::NoBlocks`] and [`EditError::NoInodes`] where what is in
    /// use does not fit; those of reading.
    pub fn may_shrink(&self, size: u64) -> Result<()> {
        match self.shrink_plan(size / u64::from(self.block_size()))? {
            Some(plan) => self.fits(&plan),
            None => Ok(()),
        }
    }

    /// Makes the filesystem no larger than `size` bytes. `progress` is told of how many groups what was in use was looked
    /// at, and of how many; where it says no, the filesystem stays as it is until then, as large as before.
    ///
    /// # Errors
    ///
    /// Those of [`Editor::may_shrink`], [`EditError::Interrupted`], and those of writing. The filesystem is as large as
    /// before then, and whole.
    pub fn shrink(mut self, size: u64, progress: &mut dyn FnMut(u32, u32) -> bool) -> Result<Resized> {
        let block_size = u64::from(self.block_size());
        let before = self.filesystem.numbers().blocks * block_size;
        let Some(plan) = self.shrink_plan(size / block_size)? else {
            return Ok(Resized { before, after: before });
        };
        self.fits(&plan)?;
        self.commit()?;
        self.space.end = Some((plan.blocks, plan.groups));
        self.move_blocks(&plan, progress)?;
        self.move_inodes(&plan, progress)?;
        self.cut(&plan)?;
        self.commit()?;
        Ok(Resized { before, after: plan.blocks * block_size })
    }

    /// What the filesystem will be; nothing where it is small enough.
    fn shrink_plan(&self, wanted: u64) -> Result<Option<Plan>> {
        let old = self.filesystem.numbers();
        let superblock = self.superblock();
        if wanted >= old.blocks {
            return Ok(None);
        }
        if superblock.has_incompat(incompat::META_BG) || superblock.has_compat(compat::SPARSE_SUPER2) {
            return refuse("it has meta_bg or sparse_super2, with which it is not made smaller in place");
        }
        let per_block = old.block_size / u32::from(old.descriptor_size);
        let table =
            (u64::from(old.inodes_per_group) * u64::from(old.inode_size)).div_ceil(u64::from(old.block_size));
        let descriptors = u64::from(old.groups.div_ceil(per_block));
        let resizes = superblock.has_compat(compat::RESIZE_INODE);
        let reserved = if resizes { u64::from(superblock.reserved_gdt_blocks.get()) } else { 0 };
        let mut blocks = wanted;
        let plan = loop {
            if blocks <= old.first_data_block {
                return refuse("nothing would be left of it");
            }
            let groups = (blocks - old.first_data_block).div_ceil(old.blocks_per_group);
            let groups = u32::try_from(groups).unwrap_or(u32::MAX);
            let new_descriptors = u64::from(groups.div_ceil(per_block));
            // What were descriptors is reserved for more, as far as the list of those has room.
            let all = reserved + descriptors - new_descriptors;
            let listed = if reserved > 0 { all.min((old.block_size / 4).into()) } else { 0 };
            let (reserved, excess) = (listed, all - listed);
            let plan = Plan { old, blocks, groups, table, descriptors, new_descriptors, reserved, excess };
            let last = plan.start(groups - 1);
            let header = if self.filesystem.superblock_in(groups - 1) { plan.header() } else { 0 };
            let descriptor = self.descriptor(groups - 1)?;
            let own = plan.places(&descriptor).into_iter().filter(|(place, _)| *place >= last);
            let own = own.map(|(place, length)| place + length).max().unwrap_or(0).max(last + header);
            if blocks >= own + FEWEST_IN_LAST {
                break plan;
            }
            // It goes with the rest.
            blocks = last;
        };
        self.stays(&plan)?;
        Ok(Some(plan))
    }

    /// Whether all is below the new end that is not moved.
    fn stays(&self, plan: &Plan) -> Result<()> {
        for group in 0..plan.groups {
            let descriptor = self.descriptor(group)?;
            if plan.places(&descriptor).iter().any(|(place, length)| place + length > plan.blocks) {
                return refuse(format!(
                    "the bitmaps or inodes of group {group}, which stays, are behind its new end"
                ));
            }
        }
        let superblock = self.superblock();
        for number in [superblock.journal_inum.get(), ino::BAD_BLOCKS] {
            let raw = self.load_any(number)?;
            if number == ino::BAD_BLOCKS && raw.fields.sectors(plan.old.block_size) == 0 {
                continue;
            }
            let mapped = self.mapped(&raw)?;
            let content = mapped.extents.iter().map(|extent| extent.physical + u64::from(extent.length));
            let end = content.chain(mapped.nodes.iter().map(|node| node + 1)).max().unwrap_or(0);
            if end > plan.blocks {
                let what = if number == ino::BAD_BLOCKS { "a block with a defect" } else { "its journal" };
                return refuse(format!("{what} is behind its new end, and cannot be moved safely"));
            }
        }
        if self.reserved_list()?.is_some_and(|list| list >= plan.blocks) {
            return refuse("the list of its blocks for descriptors is behind its new end");
        }
        let own = crate::format::quota::Kind::ALL.map(|kind| superblock.quota_inum(kind));
        let orphans = match superblock.has_compat(compat::ORPHAN_FILE) {
            true => superblock.orphan_file_inum.get(),
            false => 0,
        };
        if own.into_iter().chain([orphans]).any(|number| number > plan.inodes()) {
            return refuse("an inode of its own is in a group that goes");
        }
        if superblock.has_compat(compat::STABLE_INODES) && self.inodes_behind(plan)? > 0 {
            return refuse("it has stable_inodes, and inodes would get other numbers");
        }
        Ok(())
    }

    /// Inodes in use in groups that go.
    fn inodes_behind(&self, plan: &Plan) -> Result<u32> {
        let mut used = 0;
        for group in plan.groups..plan.old.groups {
            used += plan.old.inodes_per_group.saturating_sub(self.descriptor(group)?.free_inodes());
        }
        Ok(used)
    }

    /// Whether what is in use has room below the new end.
    fn fits(&self, plan: &Plan) -> Result<()> {
        let (mut free, mut free_inodes) = (0, 0);
        for group in 0..plan.groups {
            let descriptor = self.descriptor(group)?;
            free += u64::from(descriptor.free_blocks());
            free_inodes += descriptor.free_inodes();
        }
        let free = free.saturating_sub(self.free_in_cut(plan)?);
        let needed = self.used_behind(plan)?.saturating_sub(self.own_behind(plan)?);
        if needed > free {
            return Err(EditError::NoBlocks { needed, free, block_size: self.block_size() });
        }
        if self.inodes_behind(plan)? > free_inodes {
            return Err(EditError::NoInodes(plan.inodes()));
        }
        Ok(())
    }

    /// Free blocks in the part of the last group that goes.
    fn free_in_cut(&self, plan: &Plan) -> Result<u64> {
        let last = plan.groups - 1;
        let (used, length) = self.used_blocks(last, plan.blocks - plan.start(last))?;
        Ok(length - used)
    }

    /// Blocks in use behind the new end.
    fn used_behind(&self, plan: &Plan) -> Result<u64> {
        let last = plan.groups - 1;
        let (mut used, _) = self.used_blocks(last, plan.blocks - plan.start(last))?;
        for group in plan.groups..plan.old.groups {
            let length = plan.old.blocks_per_group.min(plan.old.blocks - plan.start(group));
            used += length.saturating_sub(self.descriptor(group)?.free_blocks().into());
        }
        Ok(used)
    }

    /// Blocks behind the new end that belong to the groups that go themselves.
    fn own_behind(&self, plan: &Plan) -> Result<u64> {
        let mut own = 0;
        for group in plan.groups..plan.old.groups {
            if self.filesystem.superblock_in(group) {
                own += plan.header();
            }
            for (place, length) in plan.places(&self.descriptor(group)?) {
                own += (place + length).saturating_sub(place.max(plan.blocks));
            }
        }
        Ok(own)
    }

    /// The block that lists the blocks reserved for descriptors.
    fn reserved_list(&self) -> Result<Option<Block>> {
        if !self.superblock().has_compat(compat::RESIZE_INODE) {
            return Ok(None);
        }
        let raw = self.load_any(ino::RESIZE)?;
        let list = u64::from(u32::from_le_bytes([52, 53, 54, 55].map(|byte| raw.fields.block[byte])));
        if list != 0 && !self.filesystem.blocks.exist(list, 1) {
            let reason = format!("its list is said to be in block {list}");
            return Err(EditError::corrupt(Place::Inode(ino::RESIZE), reason));
        }
        Ok((list != 0).then_some(list))
    }

    /// Commits where much was changed.
    fn pace(&mut self) -> Result<()> {
        let most = STAGED.min(self.journal_room() / 4);
        if self.filesystem.blocks.staged().len() > most { self.commit() } else { Ok(()) }
    }
}
