//! Extended attributes of an inode, set anew.

use zerocopy::{FromBytes, IntoBytes};

use super::inodes::Raw;
use super::{EditError, Editor, Result};
use crate::format::Xattr;
use crate::format::xattr::{self, BLOCK_HEADER, BlockHeader};
use crate::read::Place;
use crate::write::{Run, xattrs};

impl Editor {
    /// Gives an inode these attributes instead of those that it had.
    pub(super) fn put_xattrs(&mut self, raw: &mut Raw, list: &[Xattr]) -> Result<()> {
        let room = raw.tail().len().saturating_sub(4);
        let split = xattrs::split_for(list, room, self.block_size())?;
        self.release_xattr_block(raw)?;
        raw.tail().fill(0);
        if room > 0 {
            split.put_at(raw.tail());
        }
        // Where it goes is a part of its checksum.
        let seed = self.superblock().seed();
        let block_size = self.block_size();
        if split.own_block(seed, 0, block_size).is_some() {
            let place = self.allocate_one(self.group_of(raw.ino))?;
            if let Some(bytes) = split.own_block(seed, place, block_size) {
                self.filesystem.blocks.stage(place, bytes.into());
            }
            raw.fields.set_xattr_block(place);
            self.count_block(raw, 1);
        }
        Ok(())
    }

    /// Takes the block of attributes away from an inode; it is free when no other has it.
    pub(super) fn release_xattr_block(&mut self, raw: &mut Raw) -> Result<()> {
        let block = raw.fields.xattr_block();
        if block == 0 {
            return Ok(());
        }
        let place = Place::Xattrs { inode: raw.ino, block };
        if !self.filesystem.blocks.exist(block, 1) {
            return Err(EditError::corrupt(place, "it is not in the filesystem"));
        }
        let mut bytes = self.filesystem.blocks.metadata(block, place)?.to_vec();
        let mut header = BlockHeader::read_from_prefix(&bytes)
            .map_err(|_| EditError::corrupt(place, "it is too short"))?
            .0;
        if header.magic.get() != xattr::MAGIC {
            return Err(EditError::corrupt(place, "it does not begin as one does"));
        }
        let references = header.references.get();
        if references > 1 {
            header.references = (references - 1).into();
            bytes[..BLOCK_HEADER].copy_from_slice(header.as_bytes());
            if let Some(seed) = self.filesystem.geometry.seed {
                xattr::seal(seed, block, &mut bytes);
            }
            self.filesystem.blocks.stage(block, bytes.into());
        } else {
            self.release(Run::new(block, 1))?;
        }
        raw.fields.set_xattr_block(0);
        self.count_block(raw, -1);
        Ok(())
    }

    /// Counts a block more or less of those that an inode has.
    pub(super) fn count_block(&self, raw: &mut Raw, more: i64) {
        let sectors = raw.fields.sectors(self.block_size());
        let blocks = sectors / u64::from(self.block_size() / 512);
        raw.fields.set_blocks(blocks.saturating_add_signed(more), self.block_size());
    }
}
