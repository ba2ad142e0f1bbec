//! The inode tables: each inode in use with its blocks, and the bitmap and counts of each group.

use super::blocks::Blocks;
use super::{Checker, Directory, Used};
use crate::format::group::flags as group_flags;
use crate::format::inode::{self, Inode, flags};
use crate::format::superblock::{incompat, ro_compat};
use crate::format::{FileType, Ino, ino};
use crate::read::{Place, Result};

/// Bytes of a table that are read at once.
const PIECE: usize = 256 << 10;
/// Bytes of a symbolic link that fits into the inode.
const FAST: u64 = 60;

impl Checker<'_> {
    pub(super) fn inodes(&mut self, progress: &mut dyn FnMut(u32, u32)) -> Result<()> {
        for group in 0..self.numbers.groups {
            let first = self.inodes.len();
            self.table(group)?;
            self.inode_bitmap(group, first)?;
            progress(group + 1, self.numbers.groups);
        }
        if self.filesystem.replayed() == 0 && u64::from(self.superblock.free_inodes.get()) != self.free_inodes
        {
            let (said, free) = (self.superblock.free_inodes.get(), self.free_inodes);
            self.bad("the superblock", format!("it says that {said} inodes are free, and {free} are"));
        }
        if self.inode(ino::ROOT).is_none() {
            self.bad(Place::Inode(ino::ROOT), "the root directory is not in use");
        }
        Ok(())
    }

    /// How many inodes at the beginning of a group's table were ever used.
    fn reached(&self, group: u32) -> Result<u32> {
        let descriptor = self.filesystem.group(group, false)?;
        let all = self.numbers.inodes_per_group;
        if !self.has_group_sums() {
            return Ok(all);
        }
        if descriptor.flags.get() & group_flags::INODE_UNINIT != 0 {
            return Ok(0);
        }
        Ok(all.saturating_sub(descriptor.unused_inodes()))
    }

    fn table(&mut self, group: u32) -> Result<()> {
        let numbers = self.numbers;
        let size = usize::from(numbers.inode_size);
        let count = self.reached(group)? as usize;
        let table = self.filesystem.group(group, false)?.inode_table();
        if !self.used.exist(table, self.table_blocks()) {
            return Ok(());
        }
        let begin = table * u64::from(numbers.block_size);
        let mut piece = vec![0; PIECE.min(count * size)];
        for from in (0..count).step_by((PIECE / size).max(1)) {
            let length = ((count - from) * size).min(piece.len());
            let piece = &mut piece[..length];
            self.filesystem.bytes_at(begin + (from * size) as u64, piece)?;
            for (number, bytes) in piece.chunks_exact(size).enumerate() {
                if bytes.iter().all(|byte| *byte == 0) {
                    continue;
                }
                #[expect(clippy::cast_possible_truncation, reason = "below the inodes of a group")]
                let ino = group * numbers.inodes_per_group + (from + number) as u32 + 1;
                self.one(ino, bytes)?;
            }
        }
        Ok(())
    }

    /// An inode that is not all zeros.
    fn one(&mut self, ino: Ino, bytes: &[u8]) -> Result<()> {
        let place = Place::Inode(ino);
        let fields = Inode::read(bytes);
        if let Some(seed) = self.numbers.seed
            && Inode::sum(bytes, ino, seed) != Inode::stored_sum(bytes)
        {
            self.bad(place, "the checksum is wrong");
        }
        let reserved = ino < self.first_ino() && ino != ino::ROOT;
        if ino == ino::RESIZE && self.has_resize_inode() {
            return self.resize_inode(&fields);
        }
        let orphan = self.orphans.contains(&ino);
        if fields.links.get() == 0 && !orphan && ino != ino::BAD_BLOCKS {
            if fields.dtime.get() == 0 && fields.mode.get() != 0 && !reserved {
                self.bad(place, "it is free, and was never deleted");
            }
            return Ok(());
        }
        let kind = FileType::from_mode(fields.mode.get());
        let value = fields.flags.get() & flags::EA_INODE != 0;
        self.inodes.push(Used {
            ino,
            kind,
            links: fields.links.get(),
            found: 0,
            own: reserved || value || orphan || self.is_own(ino),
        });
        if kind.is_none() && ino != ino::BAD_BLOCKS && !reserved {
            self.bad(place, format!("its mode is {:o}, of no known kind", fields.mode.get()));
            return Ok(());
        }
        if fields.dtime.get() != 0 && !orphan && !value && ino != ino::BAD_BLOCKS {
            self.bad(place, "it is in use, and was deleted");
        }
        let extra = usize::from(fields.extra_isize.get());
        if bytes.len() > inode::GOOD_OLD_SIZE
            && (extra % 4 != 0 || inode::GOOD_OLD_SIZE + extra > bytes.len())
        {
            self.bad(place, format!("it says that it has {extra} bytes of further fields"));
            return Ok(());
        }
        self.features(ino, &fields);
        let (xattr_blocks, values) = self.xattrs(ino, &fields, bytes)?;
        let mut blocks = Blocks::new(kind == Some(FileType::Directory) || self.is_own(ino));
        self.content(ino, kind, &fields, xattr_blocks, &mut blocks)?;
        if !blocks.failed && !values {
            self.count(ino, &fields, blocks.count + xattr_blocks);
            self.count_usage(ino, &fields, blocks.count + xattr_blocks);
        } else {
            self.counted.fail();
        }
        if kind == Some(FileType::Directory) {
            self.directories.insert(
                ino,
                Directory {
                    flags: fields.flags.get(),
                    generation: fields.generation.get(),
                    size: self.size(kind, &fields),
                    runs: blocks.runs,
                    ..Directory::default()
                },
            );
        } else if self.is_own(ino) {
            self.own(ino, &fields, &blocks)?;
        }
        Ok(())
    }

    /// Inodes that belong to the filesystem itself whatever their number.
    pub(super) fn is_own(&self, ino: Ino) -> bool {
        let superblock = &self.superblock;
        [
            superblock.journal_inum,
            superblock.user_quota_inum,
            superblock.group_quota_inum,
            superblock.project_quota_inum,
            superblock.orphan_file_inum,
        ]
        .iter()
        .any(|own| own.get() == ino)
    }

    /// Flags that need a feature.
    fn features(&mut self, ino: Ino, fields: &Inode) {
        let (superblock, set) = (&self.superblock, fields.flags.get());
        let missing = [
            (set & flags::EXTENTS != 0 && !superblock.has_incompat(incompat::EXTENTS), "extents"),
            (set & flags::INLINE_DATA != 0 && !superblock.has_incompat(incompat::INLINE_DATA), "inline data"),
            (
                set & flags::EA_INODE != 0 && !superblock.has_incompat(incompat::EA_INODE),
                "the value of an attribute",
            ),
            (set & flags::ENCRYPT != 0 && !superblock.has_incompat(incompat::ENCRYPT), "encryption"),
            (set & flags::CASEFOLD != 0 && !superblock.has_incompat(incompat::CASEFOLD), "folded names"),
            (set & flags::VERITY != 0 && !superblock.has_ro_compat(ro_compat::VERITY), "verity"),
            (set & flags::HUGE_FILE != 0 && !superblock.has_ro_compat(ro_compat::HUGE_FILE), "a huge file"),
        ];
        for (_, what) in missing.into_iter().filter(|(missing, _)| *missing) {
            self.bad(Place::Inode(ino), format!("it has {what}, a feature that the filesystem has not"));
        }
    }

    fn size(&self, kind: Option<FileType>, fields: &Inode) -> u64 {
        // The upper half of the size was something else for directories once.
        let whole = kind != Some(FileType::Directory) || self.superblock.has_incompat(incompat::LARGEDIR);
        if whole { fields.size() } else { fields.size_low.get().into() }
    }

    /// What an inode's 60 bytes mean.
    fn content(
        &mut self,
        ino: Ino,
        kind: Option<FileType>,
        fields: &Inode,
        xattr_blocks: u64,
        blocks: &mut Blocks,
    ) -> Result<()> {
        let place = Place::Inode(ino);
        let set = fields.flags.get();
        let size = self.size(kind, fields);
        if set & flags::INLINE_DATA != 0 {
            return Ok(());
        }
        match kind {
            Some(FileType::Character | FileType::Block | FileType::Fifo | FileType::Socket) => {
                if set & flags::EXTENTS != 0 || size != 0 || fields.block[8..].iter().any(|byte| *byte != 0) {
                    self.bad(place, "it is a device, FIFO or socket, and has content");
                }
                return Ok(());
            }
            Some(FileType::Symlink)
                if set & flags::EXTENTS == 0
                    && size < FAST
                    && fields.sectors(self.numbers.block_size)
                        == xattr_blocks * u64::from(self.numbers.block_size / 512) =>
            {
                let length = fields.block.iter().position(|byte| *byte == 0).unwrap_or(60) as u64;
                if set & flags::ENCRYPT == 0 && (length != size || size == 0) {
                    self.bad(place, format!("it is a link of {size} bytes, and has {length}"));
                }
                return Ok(());
            }
            _ => {}
        }
        if set & flags::EXTENTS != 0 {
            self.extents(ino, fields.generation.get(), &fields.block, blocks)?;
        } else {
            self.map(ino, &fields.block, blocks)?;
        }
        let block_size = u64::from(self.numbers.block_size);
        match kind {
            Some(FileType::Symlink) if size == 0 || size > block_size || blocks.count == 0 => {
                self.bad(place, format!("it is a link of {size} bytes in {} blocks", blocks.count));
            }
            // What is allocated and not written may be behind the end.
            Some(FileType::Regular) if blocks.end > size.div_ceil(block_size) && set & flags::VERITY == 0 => {
                self.bad(place, format!("it has {size} bytes, and data up to block {}", blocks.end));
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether an inode has as many blocks as it says.
    fn count(&mut self, ino: Ino, fields: &Inode, blocks: u64) {
        let said = match self.superblock.has_ro_compat(ro_compat::HUGE_FILE) {
            true => fields.sectors(self.numbers.block_size),
            false => fields.blocks_low.get().into(),
        };
        let found = blocks * u64::from(self.numbers.block_size / 512);
        if said != found {
            self.bad(Place::Inode(ino), format!("it says it has {said} sectors, and has {found}"));
        }
    }

    /// The bitmap and the counts of a group; its inodes in use are those from `first` on.
    fn inode_bitmap(&mut self, group: u32, first: usize) -> Result<()> {
        let numbers = self.numbers;
        let place = format!("the inode bitmap of group {group}");
        let descriptor = self.filesystem.group(group, false)?;
        let base = group * numbers.inodes_per_group;
        let mut bits = vec![0u8; numbers.inodes_per_group.div_ceil(8) as usize];
        let mut used = 0u32;
        let mut directories = 0u32;
        let mut set = |ino: Ino| {
            let bit = (ino - 1 - base) as usize;
            used += u32::from(bits[bit / 8] & 1 << (bit % 8) == 0);
            bits[bit / 8] |= 1 << (bit % 8);
        };
        if group == 0 {
            (1..self.first_ino().min(numbers.inodes_per_group + 1)).for_each(&mut set);
        }
        for inode in &self.inodes[first..] {
            set(inode.ino);
            directories += u32::from(inode.kind == Some(FileType::Directory));
        }
        let free = numbers.inodes_per_group - used;
        self.free_inodes += u64::from(free);
        if descriptor.free_inodes() != free {
            let said = descriptor.free_inodes();
            self.bad(Place::Group(group), format!("it says that {said} inodes are free, and {free} are"));
        }
        if descriptor.directories() != directories {
            let said = descriptor.directories();
            self.bad(
                Place::Group(group),
                format!("it says that it has {said} directories, and it has {directories}"),
            );
        }
        if descriptor.flags.get() & group_flags::INODE_UNINIT != 0 && self.has_group_sums() {
            return Ok(());
        }
        if !self.used.exist(descriptor.inode_bitmap(), 1) {
            return Ok(());
        }
        let block = self.filesystem.block(descriptor.inode_bitmap(), Place::Group(group))?;
        if let Some(seed) = numbers.seed
            && !self.same_sum(seed.of_bitmap(&block[..bits.len()]), descriptor.inode_bitmap_sum())
        {
            self.bad(&place, "the checksum is wrong");
        }
        for (is, said, range) in differences(&bits, &block, bits.len() * 8) {
            let (from, to) = (u64::from(base) + range.0 + 1, u64::from(base) + range.1);
            debug_assert_ne!(is, said);
            self.bad(&place, said_of("inode", from, to, is));
        }
        if block[bits.len()..].iter().any(|byte| *byte != 0xff) {
            self.bad(&place, "the bits behind its inodes are not set");
        }
        Ok(())
    }

    /// Whether a bitmap's checksum is the one in a descriptor, which may have room for half of it.
    pub(super) fn same_sum(&self, sum: u32, stored: u32) -> bool {
        let mask = if self.numbers.descriptor_size >= 64 { !0 } else { 0xffff };
        (sum ^ stored) & mask == 0
    }
}

/// Where two bitmaps differ: the first one's bit, the second's, and the range.
pub(super) fn differences(is: &[u8], said: &[u8], bits: usize) -> Vec<(bool, bool, (u64, u64))> {
    let mut found: Vec<(bool, bool, (u64, u64))> = Vec::new();
    for byte in 0..bits.div_ceil(8) {
        if is[byte] == said[byte] {
            continue;
        }
        for bit in byte * 8..bits.min(byte * 8 + 8) {
            let mask = 1 << (bit % 8);
            let (is, said) = (is[byte] & mask != 0, said[byte] & mask != 0);
            if is == said {
                continue;
            }
            let at = bit as u64;
            match found.last_mut() {
                Some((last, _, range)) if *last == is && range.1 == at => range.1 += 1,
                _ => found.push((is, said, (at, at + 1))),
            }
        }
    }
    found
}

/// A range that is in use and not said to be, or the other way round.
pub(super) fn said_of(what: &str, from: u64, to: u64, used: bool) -> String {
    let (subject, verb) = if from == to {
        (format!("{what} {from}"), "is")
    } else {
        (format!("{what}s {from} to {to}"), "are")
    };
    match used {
        true => format!("{subject} {verb} in use and not marked"),
        false => format!("{subject} {verb} marked and nobody's"),
    }
}
