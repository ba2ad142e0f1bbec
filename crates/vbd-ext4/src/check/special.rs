//! The filesystem's own inodes: where descriptors may grow, and the file of orphans.

use super::Checker;
use super::blocks::{Blocks, word};
use crate::format::inode::Inode;
use crate::format::superblock::compat;
use crate::format::{Ino, ino, orphan};
use crate::read::{Place, Result};

impl Checker<'_> {
    pub(super) fn has_resize_inode(&self) -> bool {
        self.superblock.has_compat(compat::RESIZE_INODE)
    }

    /// The inode that holds the blocks reserved for descriptors. Its double-indirect block lists those of the first group,
    /// each of which lists its copies; they were claimed with the groups' beginnings.
    pub(super) fn resize_inode(&mut self, fields: &Inode) -> Result<()> {
        let place = Place::Inode(ino::RESIZE);
        let reserved = u64::from(self.superblock.reserved_gdt_blocks.get());
        let list = word(&fields.block, 13);
        if reserved == 0 && list == 0 {
            return Ok(());
        }
        if !self.used.exist(list, 1) || fields.links.get() == 0 {
            self.bad(place, format!("the list of blocks for descriptors is said to be in block {list}"));
            return Ok(());
        }
        self.claim(&place, list, 1);
        if (0..15).any(|number| number != 13 && word(&fields.block, number) != 0) {
            self.bad(place, "it has other blocks than those for descriptors");
        }
        let copies: Vec<u32> =
            (1..self.numbers.groups).filter(|group| self.filesystem.superblock_in(*group)).collect();
        let bytes = self.filesystem.block(list, place)?;
        let fan = u64::from(self.numbers.block_size / 4);
        let descriptors = self.old_descriptors();
        let first = self.numbers.first_data_block + 1 + descriptors;
        let mut expected = vec![0; usize::try_from(fan).unwrap_or(0)];
        for number in 0..reserved.min(fan) {
            expected[usize::try_from((descriptors + number) % fan).unwrap_or(0)] = first + number;
        }
        if (0..expected.len()).any(|number| word(&bytes, number) != expected[number]) {
            self.bad(place, "it lists other blocks for descriptors than those behind the descriptors");
            return Ok(());
        }
        for number in 0..reserved.min(fan) {
            let block = first + number;
            let bytes = self.filesystem.block(block, place)?;
            let right = (0..expected.len()).all(|index| {
                let copy = copies.get(index).map_or(0, |group| self.start(*group) + 1 + descriptors + number);
                word(&bytes, index) == copy
            });
            if !right {
                self.bad(place, format!("block {block} lists other copies than those of the backups"));
            }
        }
        let sectors = (1 + reserved * (1 + copies.len() as u64)) * u64::from(self.numbers.block_size / 512);
        if fields.sectors(self.numbers.block_size) != sectors {
            let said = fields.sectors(self.numbers.block_size);
            self.bad(place, format!("it says it has {said} sectors, and has {sectors}"));
        }
        Ok(())
    }

    /// An inode that is the filesystem's own, and what is in it.
    pub(super) fn own(&mut self, ino: Ino, fields: &Inode, blocks: &Blocks) -> Result<()> {
        if self.superblock.has_compat(compat::ORPHAN_FILE) && ino == self.superblock.orphan_file_inum.get() {
            let place = "the file of orphans";
            let begin = self.numbers.seed.map(|seed| seed.of_inode(ino, fields.generation.get()));
            for run in &blocks.runs {
                for block in run.physical..run.physical + run.length {
                    let bytes = self.filesystem.block(block, Place::Inode(ino))?;
                    self.orphan_block(place, block, &bytes, begin);
                }
            }
        }
        Ok(())
    }

    fn orphan_block(&mut self, place: &str, block: u64, bytes: &[u8], begin: Option<u32>) {
        let at = bytes.len() - size_of::<orphan::Tail>();
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[at + byte]));
        if number(at) != orphan::MAGIC {
            self.bad(place, format!("block {block} of it does not end as one does"));
        } else if begin.is_some_and(|begin| orphan::sum(begin, block, bytes) != number(at + 4)) {
            self.bad(place, format!("the checksum of block {block} of it is wrong"));
        }
    }
}
