//! Inodes.

use std::sync::Arc;

use super::{Error, Filesystem, Place, Result};
use crate::format::inode;
use crate::format::superblock::{incompat, ro_compat};
use crate::format::{Attributes, Block, FileType, Ino, Timestamp};

/// What an inode says.
#[derive(Debug, Clone)]
pub struct Inode {
    number: Ino,
    kind: FileType,
    size: u64,
    xattr_block: Block,
    fields: inode::Inode,
    /// The whole inode where something is behind its fields.
    bytes: Option<Arc<[u8]>>,
}

impl Inode {
    /// Its number.
    pub fn number(&self) -> Ino {
        self.number
    }

    /// What kind of entry it is.
    pub fn file_type(&self) -> FileType {
        self.kind
    }

    /// Mode bits, owner and times.
    pub fn attributes(&self) -> Attributes {
        let mut attributes = self.fields.attributes();
        for time in
            [&mut attributes.atime, &mut attributes.ctime, &mut attributes.mtime, &mut attributes.crtime]
        {
            *time = Timestamp { nanoseconds: time.nanoseconds.min(999_999_999), ..*time };
        }
        attributes
    }

    /// Bytes of the content; for a symbolic link of its target.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its names; 1 for a directory that has too many to be counted.
    pub fn links(&self) -> u16 {
        self.fields.links.get()
    }

    /// Major and minor number, where it is a device.
    pub fn device(&self) -> Option<(u32, u32)> {
        matches!(self.kind, FileType::Character | FileType::Block).then(|| self.fields.device())
    }

    /// The flags ([`crate::format::inode::flags`]).
    pub fn flags(&self) -> u32 {
        self.fields.flags.get()
    }

    /// Its generation.
    pub fn generation(&self) -> u32 {
        self.fields.generation.get()
    }

    pub(crate) fn has(&self, flag: u32) -> bool {
        self.flags() & flag != 0
    }

    pub(crate) fn fields(&self) -> &inode::Inode {
        &self.fields
    }

    pub(crate) fn xattr_block(&self) -> Block {
        self.xattr_block
    }

    /// What is behind the fields: xattrs, if anything.
    pub(super) fn tail(&self) -> &[u8] {
        let Some(bytes) = &self.bytes else { return &[] };
        bytes.get(inode::GOOD_OLD_SIZE + usize::from(self.fields.extra_isize.get())..).unwrap_or_default()
    }

    /// The error of a directory that is in the tree more than once.
    pub fn twice(&self) -> Error {
        Error::corrupt(Place::Inode(self.number), "this directory is in the tree more than once")
    }
}

impl Filesystem {
    /// The inode of this number, which has to be in use.
    ///
    /// # Errors
    ///
    /// A number out of range, an inode that is free, damaged or of no known kind.
    pub fn inode(&self, number: Ino) -> Result<Inode> {
        let place = Place::Inode(number);
        let bad = |reason: &str| Error::corrupt(place, reason);
        let geometry = &self.geometry;
        if number == 0 || number > geometry.inodes() {
            return Err(bad(&format!("there are inodes from 1 to {}", geometry.inodes())));
        }
        let (group, index) =
            ((number - 1) / geometry.inodes_per_group, (number - 1) % geometry.inodes_per_group);
        let descriptor = geometry.descriptor(&self.blocks, group, self.verify)?;
        let offset = u64::from(index) * u64::from(geometry.inode_size);
        let block_size = u64::from(geometry.block_size);
        let table = descriptor.inode_table();
        if !self.blocks.exist(table, (offset / block_size).saturating_add(1)) {
            return Err(Error::corrupt(Place::Group(group), format!("its inode table is at block {table}")));
        }
        let block = self.blocks.metadata(table + offset / block_size, place)?;
        // Below a block's size.
        let at = usize::try_from(offset % block_size).unwrap_or(0);
        let bytes = &block[at..at + usize::from(geometry.inode_size)];

        let fields = inode::Inode::read(bytes);
        if fields.links.get() == 0 && fields.mode.get() == 0 {
            return Err(bad("it is free, and something refers to it"));
        }
        if self.verify
            && let Some(seed) = geometry.seed
            && inode::Inode::sum(bytes, number, seed) != inode::Inode::stored_sum(bytes)
        {
            return Err(Error::Checksum(place));
        }
        let extra = usize::from(fields.extra_isize.get());
        if bytes.len() > inode::GOOD_OLD_SIZE
            && (extra % 4 != 0 || inode::GOOD_OLD_SIZE + extra > bytes.len())
        {
            return Err(bad(&format!("it says that it has {extra} bytes of further fields")));
        }
        let kind = FileType::from_mode(fields.mode.get())
            .ok_or_else(|| bad(&format!("its mode is {:o}, of no known kind", fields.mode.get())))?;
        let superblock = &geometry.superblock;
        // The upper half of the size was something else for directories once.
        let whole = kind == FileType::Regular || superblock.has_incompat(incompat::LARGEDIR);
        let size = if whole { fields.size() } else { fields.size_low.get().into() };
        if i64::try_from(size).is_err() {
            return Err(bad(&format!("it says that it has {size} bytes")));
        }
        let xattr_block = match superblock.has_incompat(incompat::BITS64) {
            true => fields.xattr_block(),
            false => fields.xattr_block_low.get().into(),
        };
        let rest = bytes.get(inode::GOOD_OLD_SIZE + extra..).unwrap_or_default();
        let bytes = rest.iter().any(|byte| *byte != 0).then(|| Arc::from(bytes));
        Ok(Inode { number, kind, size, xattr_block, fields, bytes })
    }

    /// Bytes that an inode takes, its trees and its xattr block included.
    pub fn allocated(&self, inode: &Inode) -> u64 {
        let fields = inode.fields();
        let huge = self.geometry.superblock.has_ro_compat(ro_compat::HUGE_FILE);
        let sectors = match huge {
            true => fields.sectors(self.geometry.block_size),
            false => fields.blocks_low.get().into(),
        };
        sectors.saturating_mul(512)
    }
}
