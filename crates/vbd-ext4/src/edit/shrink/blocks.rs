//! Blocks behind the new end, copied to free ones below it.

use std::collections::HashMap;

use zerocopy::{FromBytes, IntoBytes};

use super::super::inodes::Raw;
use super::super::map::Mapped;
use super::super::{EditError, Editor, Result};
use super::Plan;
use crate::format::superblock::compat;
use crate::format::xattr::{self, BlockHeader};
use crate::format::{Block, Extent, Ino, ino, orphan};
use crate::read::Place;
use crate::write::Run;

/// Bytes that are copied at once.
const PIECE: usize = 4 << 20;

impl Editor {
    /// Moves all blocks of files.
    pub(super) fn move_blocks(
        &mut self,
        plan: &Plan,
        progress: &mut dyn FnMut(u32, u32) -> bool,
    ) -> Result<()> {
        // Blocks of xattrs by where they were: those who share one do so afterwards.
        let mut shared = HashMap::new();
        for group in 0..plan.old.groups {
            for ino in self.inodes_in_use(group)? {
                self.attempt(|editor| editor.move_blocks_of(plan, ino, &mut shared))?;
                self.pace()?;
            }
            if !progress(group + 1, plan.old.groups) {
                self.commit()?;
                return Err(EditError::Interrupted);
            }
        }
        self.commit()
    }

    fn move_blocks_of(&mut self, plan: &Plan, ino: Ino, shared: &mut HashMap<Block, Block>) -> Result<()> {
        // What these have was looked at before anything was moved.
        if [ino::RESIZE, ino::BAD_BLOCKS, self.superblock().journal_inum.get()].contains(&ino) {
            return Ok(());
        }
        let mut raw = self.load_any(ino)?;
        if raw.fields.links.get() == 0 {
            // A number that is kept for something that is not there.
            return Ok(());
        }
        let mut moved = false;
        if self.has_map(&raw)? {
            let mapped = self.mapped(&raw)?;
            let behind = |extent: &Extent| extent.physical + u64::from(extent.length) > plan.blocks;
            if mapped.extents.iter().any(behind) || mapped.nodes.iter().any(|node| *node >= plan.blocks) {
                self.move_content(plan, &mut raw, &mapped)?;
                moved = true;
            }
        }
        if raw.fields.xattr_block() >= plan.blocks {
            self.move_xattrs(&mut raw, shared)?;
            moved = true;
        }
        if moved { self.store(raw) } else { Ok(()) }
    }

    fn move_content(&mut self, plan: &Plan, raw: &mut Raw, mapped: &Mapped) -> Result<()> {
        let near = self.group_of(raw.ino);
        let mut extents: Vec<Extent> = Vec::with_capacity(mapped.extents.len());
        for extent in &mapped.extents {
            let keep = plan.blocks.saturating_sub(extent.physical).min(extent.length.into());
            let narrow = |count: u64| u32::try_from(count).expect("no more than the extent has");
            if keep > 0 {
                extents.push(Extent { length: narrow(keep), ..*extent });
            }
            let goes = Run::new(extent.physical + keep, u64::from(extent.length) - keep);
            if goes.length == 0 {
                continue;
            }
            let (mut from, mut logical) = (goes.start, extent.logical + narrow(keep));
            for run in self.allocate(goes.length, near)? {
                if !extent.unwritten {
                    self.copy_blocks(from, run)?;
                }
                let length = narrow(run.length);
                extents.push(Extent { logical, physical: run.start, length, ..*extent });
                (from, logical) = (from + run.length, logical + length);
            }
            self.release(goes)?;
        }
        self.set_map(raw, &mapped.nodes, &extents)?;
        let superblock = self.superblock();
        if superblock.has_compat(compat::ORPHAN_FILE) && superblock.orphan_file_inum.get() == raw.ino {
            self.seal_orphans(raw, &extents)?;
        }
        Ok(())
    }

    /// Copies blocks to others, which nobody has. They are durable before the transaction is.
    fn copy_blocks(&mut self, from: Block, to: Run) -> Result<()> {
        let size = u64::from(self.block_size());
        let mut buffer = vec![0; PIECE.min(usize::try_from(to.length * size).unwrap_or(PIECE))];
        let (mut at, end) = (0, to.length * size);
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let buffer = &mut buffer[..length];
            self.filesystem.blocks.read(from * size + at, buffer)?;
            self.write_at(buffer, to.start * size + at)?;
            at += length as u64;
        }
        self.filesystem.blocks.forget(to.start, to.length);
        Ok(())
    }

    /// The checksums of the file of orphans go by where its blocks are.
    fn seal_orphans(&mut self, raw: &Raw, extents: &[Extent]) -> Result<()> {
        let Some(seed) = self.filesystem.geometry.seed else { return Ok(()) };
        let begin = seed.of_inode(raw.ino, raw.fields.generation.get());
        for extent in extents {
            for block in extent.physical..extent.physical + u64::from(extent.length) {
                let bytes = self.filesystem.blocks.change(block, Place::Inode(raw.ino))?;
                orphan::seal(begin, block, bytes);
            }
        }
        Ok(())
    }

    /// Gives an inode a copy of its block of xattrs, the one that others got who shared it.
    fn move_xattrs(&mut self, raw: &mut Raw, shared: &mut HashMap<Block, Block>) -> Result<()> {
        let old = raw.fields.xattr_block();
        let place = Place::Xattrs { inode: raw.ino, block: old };
        let known = shared.get(&old).copied();
        let new = match known {
            Some(new) => new,
            None => self.allocate_one(self.group_of(raw.ino))?,
        };
        if !self.filesystem.blocks.exist(old, 1) {
            return Err(EditError::corrupt(place, "it is not in the filesystem"));
        }
        let mut bytes = match known {
            Some(new) => self.filesystem.blocks.metadata(new, place)?.to_vec(),
            None => self.filesystem.blocks.metadata(old, place)?.to_vec(),
        };
        let mut header = BlockHeader::read_from_prefix(&bytes).expect("a block has 1 KiB").0;
        let references = if known.is_some() { header.references.get() + 1 } else { 1 };
        header.references = references.into();
        bytes[..xattr::BLOCK_HEADER].copy_from_slice(header.as_bytes());
        if let Some(seed) = self.filesystem.geometry.seed {
            xattr::seal(seed, new, &mut bytes);
        }
        self.filesystem.blocks.stage(new, bytes.into());
        self.release_xattr_block(raw)?;
        raw.fields.set_xattr_block(new);
        self.count_block(raw, 1);
        shared.insert(old, new);
        Ok(())
    }
}
