//! Extended attributes: those in inodes, and the blocks of them that inodes share.

use zerocopy::FromBytes;

use super::Checker;
use crate::format::Ino;
use crate::format::inode::{self, Inode};
use crate::format::superblock::incompat;
use crate::format::xattr::{self, BlockHeader, EntryHeader};
use crate::read::{Place, Result};

/// A number of a prefix that GNU Hurd uses.
const HURD: u8 = 10;

impl Checker<'_> {
    /// The attributes of an inode: how many blocks they take (0 or 1), and whether values are in inodes of their own.
    pub(super) fn xattrs(&mut self, ino: Ino, fields: &Inode, bytes: &[u8]) -> Result<(u64, bool)> {
        let mut values = false;
        let begin = inode::GOOD_OLD_SIZE + usize::from(fields.extra_isize.get());
        if bytes.len() > inode::GOOD_OLD_SIZE
            && let Some((magic, area)) = bytes.get(begin..).and_then(<[u8]>::split_first_chunk::<4>)
            && u32::from_le_bytes(*magic) == xattr::MAGIC
        {
            values |= self.entries(Place::Xattrs { inode: ino, block: 0 }, area, 0, false).0;
        }
        let block = match self.superblock.has_incompat(incompat::BITS64) {
            true => fields.xattr_block(),
            false => fields.xattr_block_low.get().into(),
        };
        if block == 0 {
            return Ok((0, values));
        }
        let place = Place::Xattrs { inode: ino, block };
        if !self.used.exist(block, 1) {
            self.bad(Place::Inode(ino), format!("its extended attributes are said to be in block {block}"));
            return Ok((0, values));
        }
        let bytes = self.filesystem.block(block, place)?;
        let Ok((header, _)) = BlockHeader::read_from_prefix(&bytes) else { return Ok((0, values)) };
        let first = !self.xattr_blocks.contains_key(&block);
        let counts = self.xattr_blocks.entry(block).or_insert((header.references.get(), 0));
        counts.1 = counts.1.saturating_add(1);
        if !first {
            // It was looked at; what it says of values holds for this inode too.
            return Ok((1, values || self.entries_have_values(&bytes)));
        }
        self.claim(&place, block, 1);
        if header.magic.get() != xattr::MAGIC || header.blocks.get() != 1 {
            self.bad(place, "it does not begin as one does");
            return Ok((1, values));
        }
        if let Some(seed) = self.numbers.seed
            && xattr::sum(seed, block, &bytes) != header.checksum.get()
        {
            self.bad(place, "the checksum is wrong");
        }
        let (in_inodes, hashes) = self.entries(place, &bytes, xattr::BLOCK_HEADER, true);
        if header.hash.get() != 0 && header.hash.get() != xattr::block_hash(hashes) {
            self.bad(place, "its hash is wrong");
        }
        Ok((1, values | in_inodes))
    }

    fn entries_have_values(&self, block: &[u8]) -> bool {
        let mut at = xattr::BLOCK_HEADER;
        while let Some(rest) = block.get(at..).filter(|rest| rest.len() >= 4 && rest[..4] != [0; 4]) {
            let Ok((header, _)) = EntryHeader::read_from_prefix(rest) else { return false };
            if header.value_inum.get() != 0 {
                return true;
            }
            at += xattr::entry_size(usize::from(header.name_length));
        }
        false
    }

    /// Entries from a place in an area on: whether any value is an inode, and the hashes.
    fn entries(&mut self, place: Place, area: &[u8], from: usize, with_hashes: bool) -> (bool, Vec<u32>) {
        let mut at = from;
        let mut values: Vec<(usize, usize)> = Vec::new();
        let (mut in_inodes, mut hashes) = (false, Vec::new());
        while let Some(rest) = area.get(at..).filter(|rest| rest.len() >= 4 && rest[..4] != [0; 4]) {
            let entry = EntryHeader::read_from_prefix(rest).ok().map(|(header, _)| header);
            let name = entry.and_then(|e| rest.get(xattr::ENTRY..xattr::ENTRY + usize::from(e.name_length)));
            let (Some(entry), Some(name)) = (entry, name) else {
                self.bad(place, "an attribute is cut off");
                return (in_inodes, hashes);
            };
            at += xattr::entry_size(name.len());
            let shown = String::from_utf8_lossy(name).replace(char::is_control, "?");
            hashes.push(entry.hash.get());
            let known = xattr::full_name(entry.name_index, name).is_some()
                || matches!(entry.name_index, xattr::ENCRYPTION | HURD);
            if !known {
                self.bad(
                    place,
                    format!("the attribute {shown:?} has the unknown prefix {}", entry.name_index),
                );
            }
            if entry.value_inum.get() != 0 {
                in_inodes = true;
                *self.values.entry(entry.value_inum.get()).or_default() += 1;
                continue;
            }
            let (offset, size) = (usize::from(entry.value_offset.get()), entry.value_size.get() as usize);
            let value = if size == 0 { Some(&[][..]) } else { area.get(offset..offset.saturating_add(size)) };
            let Some(value) = value else {
                self.bad(place, format!("the value of the attribute {shown:?} reaches beyond its end"));
                continue;
            };
            if size > 0 {
                values.push((offset, offset + size));
            }
            let stored = entry.hash.get();
            let hashes = [xattr::entry_hash(name, value), xattr::entry_hash_signed(name, value)];
            if (with_hashes || stored != 0) && !hashes.contains(&stored) {
                self.bad(place, format!("the hash of the attribute {shown:?} is wrong"));
            }
        }
        // Behind the last entry there are four bytes of zeros.
        values.sort_unstable();
        let overlap = values.windows(2).any(|pair| pair[0].1 > pair[1].0);
        if overlap || values.first().is_some_and(|(start, _)| *start < at) {
            self.bad(place, "its values overlap");
        }
        (in_inodes, hashes)
    }

    /// Whether blocks are shared as often as they say, and inodes that are values exist.
    pub(super) fn xattr_references(&mut self) {
        let mut wrong: Vec<_> = self.xattr_blocks.iter().filter(|(_, (said, found))| said != found).collect();
        wrong.sort_unstable();
        let wrong: Vec<_> = wrong.into_iter().map(|(block, counts)| (*block, *counts)).collect();
        for (block, (said, found)) in wrong {
            let place = format!("block {block} of extended attributes");
            self.bad(place, format!("it says that {said} inodes have it, and {found} do"));
        }
        let mut values: Vec<Ino> = self.values.keys().copied().collect();
        values.sort_unstable();
        for ino in values {
            if self.inode(ino).is_none_or(|inode| !inode.own) {
                self.bad(Place::Inode(ino), "it is said to be the value of an attribute, and is not");
            }
        }
    }
}
