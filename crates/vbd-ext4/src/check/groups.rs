//! Group descriptors, where they say that bitmaps and tables are, and the backups of superblock and descriptors.

use zerocopy::FromBytes;

use super::Checker;
use crate::format::group::{GroupDescriptor, flags};
use crate::format::superblock::{self, Superblock, compat, incompat, ro_compat};
use crate::format::{Block, group};
use crate::read::{Place, Result};

impl Checker<'_> {
    pub(super) fn groups(&mut self) -> Result<()> {
        for number in 0..self.numbers.groups {
            self.header(number);
        }
        for number in 0..self.numbers.groups {
            let descriptor = self.filesystem.group(number, true);
            let descriptor = match self.found(descriptor)? {
                Some(descriptor) => descriptor,
                None => self.filesystem.group(number, false)?,
            };
            self.tables(number, &descriptor);
        }
        for number in 1..self.numbers.groups {
            if self.filesystem.superblock_in(number) {
                self.backup(number)?;
            }
        }
        if self.superblock.has_incompat(incompat::META_BG) {
            self.meta_backups()?;
        }
        if self.superblock.has_incompat(incompat::MMP) {
            let block = self.superblock.mmp_block.get();
            if self.used.exist(block, 1) {
                self.claim(&"the block against double mounts", block, 1);
            } else {
                self.bad("the superblock", format!("the block against double mounts is said to be {block}"));
            }
        }
        Ok(())
    }

    /// The first block of a group.
    pub(super) fn start(&self, group: u32) -> Block {
        self.numbers.first_data_block + u64::from(group) * self.numbers.blocks_per_group
    }

    /// The blocks of a group.
    pub(super) fn length(&self, group: u32) -> u64 {
        self.numbers.blocks_per_group.min(self.numbers.blocks - self.start(group))
    }

    fn per_block(&self) -> u32 {
        self.numbers.block_size / u32::from(self.numbers.descriptor_size)
    }

    /// Blocks of descriptors that are behind the superblock, without the reserved ones.
    pub(super) fn old_descriptors(&self) -> u64 {
        let all = u64::from(self.numbers.groups.div_ceil(self.per_block()));
        if self.superblock.has_incompat(incompat::META_BG) {
            all.min(u64::from(self.superblock.first_meta_bg.get()))
        } else {
            all
        }
    }

    /// The blocks at a group's beginning that are the superblock's and the descriptors', as ranges.
    pub(super) fn header_runs(&self, group: u32) -> Vec<(Block, u64)> {
        let mut runs = Vec::new();
        let start = self.start(group);
        if self.filesystem.superblock_in(group) {
            let reserved = match self.superblock.has_incompat(incompat::META_BG) {
                true => 0,
                false => u64::from(self.superblock.reserved_gdt_blocks.get()),
            };
            runs.push((start, 1 + self.old_descriptors() + reserved));
        }
        let meta = group / self.per_block();
        if self.superblock.has_incompat(incompat::META_BG)
            && meta >= self.superblock.first_meta_bg.get()
            && (matches!(group % self.per_block(), 0 | 1) || group % self.per_block() == self.per_block() - 1)
        {
            runs.push((start + u64::from(self.filesystem.superblock_in(group)), 1));
        }
        runs
    }

    fn header(&mut self, group: u32) {
        let whose = format!("the beginning of group {group}");
        for (start, length) in self.header_runs(group) {
            if self.start(group) + self.length(group) < start + length {
                self.bad(&whose, "superblock and descriptors do not fit into the group");
            }
            self.claim(&whose, start, length);
        }
    }

    /// Blocks of an inode table.
    pub(super) fn table_blocks(&self) -> u64 {
        (u64::from(self.numbers.inodes_per_group) * u64::from(self.numbers.inode_size))
            .div_ceil(u64::from(self.numbers.block_size))
    }

    /// The three places that a descriptor names, and how long each is.
    pub(super) fn places(&self, descriptor: &GroupDescriptor) -> [(&'static str, Block, u64); 3] {
        [
            ("block bitmap", descriptor.block_bitmap(), 1),
            ("inode bitmap", descriptor.inode_bitmap(), 1),
            ("inode table", descriptor.inode_table(), self.table_blocks()),
        ]
    }

    fn tables(&mut self, number: u32, descriptor: &GroupDescriptor) {
        let place = Place::Group(number);
        let flexible = self.superblock.has_incompat(incompat::FLEX_BG);
        let (start, end) = (self.start(number), self.start(number) + self.length(number));
        for (what, block, length) in self.places(descriptor) {
            let own = flexible || start <= block && block.saturating_add(length) <= end;
            if !self.used.exist(block, length) || !own {
                self.bad(place, format!("its {what} is said to be at block {block}"));
                continue;
            }
            self.claim(&format_args!("the {what} of group {number}"), block, length);
        }
        let numbers = self.numbers;
        let set = descriptor.flags.get();
        if set & (flags::INODE_UNINIT | flags::BLOCK_UNINIT) != 0 && !self.has_group_sums() {
            self.bad(place, "its bitmaps are left for later, which needs checksums");
        }
        if descriptor.unused_inodes() > numbers.inodes_per_group {
            self.bad(place, format!("{} of its inodes were never used", descriptor.unused_inodes()));
        }
    }

    /// A copy of the superblock, and of the descriptors behind it: what does not change while a filesystem is mounted.
    fn backup(&mut self, number: u32) -> Result<()> {
        let place = format!("the backup of the superblock in group {number}");
        let start = self.start(number);
        let block = self.filesystem.block(start, Place::Superblock)?;
        let Ok((copy, _)) = Superblock::read_from_prefix(&block) else { return Ok(()) };
        if copy.magic.get() != superblock::MAGIC {
            self.bad(place, "there is none");
            return Ok(());
        }
        if self.has_sums()
            && copy.has_ro_compat(ro_compat::METADATA_CSUM)
            && copy.sum() != copy.checksum.get()
        {
            self.bad(&place, "the checksum is wrong");
        }
        // What the kernel sets in the first one as it goes.
        let changing = (
            compat::EXT_ATTR | compat::DIR_INDEX,
            incompat::RECOVER | incompat::EXTENTS | incompat::EA_INODE,
            ro_compat::LARGE_FILE
                | ro_compat::DIR_NLINK
                | ro_compat::ORPHAN_PRESENT
                | ro_compat::EXTRA_ISIZE
                | ro_compat::HUGE_FILE
                | ro_compat::VERITY,
        );
        let first = &self.superblock;
        let differs = [
            (copy.blocks() != first.blocks(), "the number of blocks"),
            (copy.inodes_count != first.inodes_count, "the number of inodes"),
            (copy.blocks_per_group != first.blocks_per_group, "the blocks of a group"),
            (copy.inodes_per_group != first.inodes_per_group, "the inodes of a group"),
            (copy.log_block_size != first.log_block_size, "the size of blocks"),
            (copy.inode_size != first.inode_size, "the size of inodes"),
            (copy.uuid != first.uuid, "the UUID"),
            (u32::from(copy.block_group.get()) != number, "the number of its group"),
            ((copy.compat.get() ^ first.compat.get()) & !changing.0 != 0, "the compatible features"),
            ((copy.incompat.get() ^ first.incompat.get()) & !changing.1 != 0, "the incompatible features"),
            ((copy.ro_compat.get() ^ first.ro_compat.get()) & !changing.2 != 0, "the read-only features"),
        ];
        for (_, what) in differs.iter().filter(|(differs, _)| *differs) {
            self.bad(&place, format!("it has another value for {what}"));
        }
        for index in 0..self.old_descriptors() {
            let own = self.filesystem.place_of_descriptor(self.first_of(index)).0;
            self.descriptors(self.first_of(index), own, start + 1 + index)?;
        }
        Ok(())
    }

    /// The first group whose descriptor is in this block of descriptors.
    fn first_of(&self, block: u64) -> u32 {
        u32::try_from(block).unwrap_or(0).saturating_mul(self.per_block())
    }

    /// The copies of descriptors in the second and the last group of a meta group.
    fn meta_backups(&mut self) -> Result<()> {
        let per_block = self.per_block();
        for first in (0..self.numbers.groups).step_by(per_block as usize) {
            if first / per_block < self.superblock.first_meta_bg.get() {
                continue;
            }
            let own = self.filesystem.place_of_descriptor(first).0;
            let groups = self.numbers.groups;
            for group in [first + 1, first + per_block - 1].into_iter().filter(|group| *group < groups) {
                let copy = self.start(group) + u64::from(self.filesystem.superblock_in(group));
                self.descriptors(first, own, copy)?;
            }
        }
        Ok(())
    }

    /// Whether a block of descriptors and its copy name the same places.
    fn descriptors(&mut self, first: u32, own: Block, copy: Block) -> Result<()> {
        let size = usize::from(self.numbers.descriptor_size);
        let own = self.filesystem.block(own, Place::Group(first))?;
        let backup = self.filesystem.block(copy, Place::Group(first))?;
        for group in first..self.numbers.groups.min(first + self.per_block()) {
            let at = (group - first) as usize * size;
            let [own, backup] =
                [&own, &backup].map(|block| group::GroupDescriptor::read(&block[at..at + size]));
            if self.places(&own) != self.places(&backup) {
                let place = format!("the copy in block {copy} of the descriptor of group {group}");
                self.bad(place, "it names other places");
            }
        }
        Ok(())
    }
}
