//! Inodes as they are on the disk, changed and put back.

use zerocopy::IntoBytes;

use super::{EditError, Editor, Result};
use crate::format::inode::{self, EXTRA_ISIZE, GOOD_OLD_SIZE};
use crate::format::quota::Kind;
use crate::format::{Attributes, Block, FileType, Ino, Timestamp};
use crate::read::Place;

/// An inode that is being changed: its fields, and all of its bytes.
#[derive(Debug, Clone)]
pub(super) struct Raw {
    pub(super) ino: Ino,
    pub(super) fields: inode::Inode,
    bytes: Vec<u8>,
}

impl Raw {
    /// Bytes that the fields have on the disk.
    fn length(&self) -> usize {
        let extra =
            if self.bytes.len() > GOOD_OLD_SIZE { usize::from(self.fields.extra_isize.get()) } else { 0 };
        (GOOD_OLD_SIZE + extra).min(self.bytes.len()).min(size_of::<inode::Inode>())
    }

    /// What is behind the fields: xattrs.
    pub(super) fn tail(&mut self) -> &mut [u8] {
        let extra = usize::from(self.fields.extra_isize.get());
        self.bytes.get_mut(GOOD_OLD_SIZE + extra..).unwrap_or_default()
    }

    pub(super) fn kind(&self) -> Option<FileType> {
        FileType::from_mode(self.fields.mode.get())
    }

    pub(super) fn is_directory(&self) -> bool {
        self.kind() == Some(FileType::Directory)
    }

    pub(super) fn has(&self, flag: u32) -> bool {
        self.fields.flags.get() & flag != 0
    }

    pub(super) fn set_flag(&mut self, flag: u32, value: bool) {
        let flags = self.fields.flags.get();
        self.fields.flags = if value { flags | flag } else { flags & !flag }.into();
    }

    /// Mode bits, owner and times; the room for fields stays as it is.
    pub(super) fn set_attributes(&mut self, attributes: &Attributes) {
        let room = self.fields.extra_isize;
        self.fields.set_attributes(attributes);
        self.fields.extra_isize = room;
    }

    /// Gives it a project, where it has room for one.
    pub(super) fn set_project(&mut self, project: u32) {
        if self.length() >= size_of::<inode::Inode>() {
            self.fields.project = project.into();
        }
    }

    /// The content changed at that time.
    pub(super) fn touch(&mut self, now: Timestamp) {
        let attributes = self.fields.attributes();
        self.set_attributes(&Attributes { mtime: now, ctime: now, ..attributes });
    }

    /// Something about it changed at that time.
    pub(super) fn touch_inode(&mut self, now: Timestamp) {
        let attributes = self.fields.attributes();
        self.set_attributes(&Attributes { ctime: now, ..attributes });
    }
}

impl Editor {
    fn inode_place(&self, ino: Ino) -> Result<(Block, usize)> {
        let geometry = &self.filesystem.geometry;
        let place = Place::Inode(ino);
        if ino == 0 || ino > geometry.inodes() {
            return Err(EditError::corrupt(
                place,
                format!("there are inodes from 1 to {}", geometry.inodes()),
            ));
        }
        let table = self.descriptor(self.group_of(ino))?.inode_table();
        let index = (ino - 1) % geometry.inodes_per_group;
        let offset = u64::from(index) * u64::from(geometry.inode_size);
        let block = table.saturating_add(offset / u64::from(geometry.block_size));
        if !self.filesystem.blocks.exist(block, 1) {
            return Err(EditError::corrupt(place, format!("it is said to be in block {block}")));
        }
        Ok((block, usize::try_from(offset % u64::from(geometry.block_size)).unwrap_or(0)))
    }

    /// An inode in use, to change it.
    pub(super) fn load(&self, ino: Ino) -> Result<Raw> {
        // The reader checks it.
        self.filesystem.inode(ino)?;
        self.load_any(ino)
    }

    /// An inode, whether it is in use or not.
    pub(super) fn load_any(&self, ino: Ino) -> Result<Raw> {
        let (block, at) = self.inode_place(ino)?;
        let block = self.filesystem.blocks.metadata(block, Place::Inode(ino))?;
        let bytes = block[at..at + usize::from(self.filesystem.geometry.inode_size)].to_vec();
        Ok(Raw { ino, fields: inode::Inode::read(&bytes), bytes })
    }

    /// An inode in use that may be changed: not one that was made immutable.
    pub(super) fn load_to_change(&self, ino: Ino) -> Result<Raw> {
        let raw = self.load(ino)?;
        let why = match () {
            () if raw.has(inode::flags::IMMUTABLE) => "is immutable (chattr +i)",
            () if raw.has(inode::flags::APPEND) => "may only be appended to (chattr +a)",
            () if raw.fields.links.get() == 0 => "was deleted, and something refers to it",
            () if self.is_own(ino) => "is the filesystem's own",
            () => return Ok(raw),
        };
        Err(EditError::Kind { ino, why })
    }

    /// Whether an inode belongs to the filesystem itself.
    pub(super) fn is_own(&self, ino: Ino) -> bool {
        let superblock = self.superblock();
        let first = superblock.first_ino.get().max(crate::format::ino::FIRST);
        ino < first && ino != crate::format::ino::ROOT
            || superblock.has_compat(crate::format::superblock::compat::ORPHAN_FILE)
                && ino == superblock.orphan_file_inum.get()
            || Kind::ALL.iter().any(|kind| ino == superblock.quota_inum(*kind))
    }

    /// A new inode in the place of a free one.
    pub(super) fn fresh(&self, ino: Ino, kind: FileType) -> Result<Raw> {
        let mut raw = self.load_any(ino)?;
        let generation = raw.fields.generation.get().wrapping_add(1);
        raw.bytes.fill(0);
        raw.fields = inode::Inode::default();
        raw.fields.mode = kind.mode().into();
        raw.fields.generation = generation.into();
        if raw.bytes.len() >= GOOD_OLD_SIZE + usize::from(EXTRA_ISIZE) {
            raw.fields.extra_isize = EXTRA_ISIZE.into();
        }
        Ok(raw)
    }

    /// Puts an inode into its place, with its checksum. What that changes in what its owners use is noted.
    pub(super) fn store(&mut self, mut raw: Raw) -> Result<()> {
        let length = raw.length();
        raw.bytes[..length].copy_from_slice(&raw.fields.as_bytes()[..length]);
        if let Some(seed) = self.filesystem.geometry.seed {
            inode::Inode::seal(&mut raw.bytes, raw.ino, seed);
        }
        let (block, at) = self.inode_place(raw.ino)?;
        let counted = self.counts_usage(raw.ino);
        let place =
            &mut self.filesystem.blocks.change(block, Place::Inode(raw.ino))?[at..at + raw.bytes.len()];
        if counted {
            self.usage.replace(place, &raw.bytes, self.filesystem.geometry.block_size);
        }
        place.copy_from_slice(&raw.bytes);
        Ok(())
    }

    /// Clears an inode that has no content any more and gives it back.
    pub(super) fn forget(&mut self, raw: Raw) -> Result<()> {
        let kind = raw.kind().unwrap_or(FileType::Regular);
        let ino = raw.ino;
        let mut bytes = raw.bytes;
        bytes.fill(0);
        let mut gone = Raw { ino, fields: inode::Inode::default(), bytes };
        gone.fields.generation = raw.fields.generation;
        gone.fields.extra_isize = raw.fields.extra_isize;
        // When it was deleted; zero would mean that it is in use.
        gone.fields.dtime = u32::try_from(self.now.seconds).unwrap_or(u32::MAX).max(1).into();
        self.store(gone)?;
        self.release_inode(ino, kind)
    }
}
