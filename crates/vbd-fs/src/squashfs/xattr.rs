//! Extended attributes.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::block::Compression;
use super::inode::Reference;
use super::metadata::{Metadata, Table};
use super::superblock::{u16_at, u32_at, u64_at};
use super::{ReadAt, read};
use crate::entry::Xattr;

/// The kernel's limits for a value, and for all names of an entry.
const VALUE: u32 = 1 << 16;
const NAMES: u32 = 1 << 16;
/// That a value is elsewhere.
const ELSEWHERE: u16 = 0x100;

pub(super) struct Xattrs<'a> {
    sets: Table<'a>,
    pairs: Metadata<'a>,
}

impl<'a> Xattrs<'a> {
    /// The attributes whose table is described at `start`.
    pub(super) fn open(
        source: &'a dyn ReadAt,
        compression: Compression,
        start: u64,
    ) -> Result<Xattrs<'a>, String> {
        let header = read(source, start, 16)?;
        let (pairs, count) = (u64_at(&header, 0), u32_at(&header, 8));
        Ok(Xattrs {
            sets: Table::new(source, compression, start + 16, count.into(), 16)?,
            pairs: Metadata::new(source, compression, pairs, start),
        })
    }

    /// The attributes of a set, ordered by their names.
    pub(super) fn get(&mut self, number: u32) -> Result<Vec<Xattr>, String> {
        let set = self.sets.get(number.into())?;
        let (block, offset) = Reference(u64_at(&set, 0)).parts();
        let mut cursor = self.pairs.cursor(block, offset)?;
        let mut xattrs = Vec::new();
        let mut room = NAMES;
        for _ in 0..u32_at(&set, 8) {
            let entry: [u8; 4] = self.pairs.array(&mut cursor)?;
            let (kind, length) = (u16_at(&entry, 0), u32::from(u16_at(&entry, 2)));
            let prefix: &[u8] = match kind & 0xff {
                0 => b"user.",
                1 => b"trusted.",
                2 => b"security.",
                other => return Err(format!("has an attribute of the unknown kind {other}")),
            };
            let bytes = self.pairs.bytes(&mut cursor, length, 255)?;
            if bytes.is_empty() || bytes.contains(&0) {
                return Err("has an attribute without a name, or with a NUL in it".to_owned());
            }
            let name = [prefix, &bytes].concat();
            let taken = u32::try_from(name.len()).unwrap_or(NAMES) + 1;
            room = room.checked_sub(taken).ok_or("has more attributes than an entry can have")?;
            let size = self.pairs.u32(&mut cursor)?;
            let value = if kind & ELSEWHERE == 0 {
                self.pairs.bytes(&mut cursor, size, VALUE)?
            } else {
                let place: [u8; 8] = self.pairs.array(&mut cursor)?;
                let (block, offset) = Reference(u64::from_le_bytes(place)).parts();
                let mut there = self.pairs.cursor(block, offset)?;
                let size = self.pairs.u32(&mut there)?;
                self.pairs.bytes(&mut there, size, VALUE)?
            };
            xattrs.push((OsString::from_vec(name), value));
        }
        xattrs.sort();
        if xattrs.windows(2).any(|two| two[0].0 == two[1].0) {
            return Err("has an attribute twice".to_owned());
        }
        Ok(xattrs)
    }
}
