//! Extended attributes: of the inode itself, of its block of them, and values that are inodes.

use zerocopy::FromBytes;

use super::inode::Inode;
use super::{Error, Filesystem, Place, Result};
use crate::format::inode::flags;
use crate::format::xattr::{self, BlockHeader, EntryHeader};
use crate::format::{Ino, Xattr, acl, checksum};

/// Bytes of all values of an inode at most: far more than the kernel's interface lets anybody read.
const MOST: usize = 16 << 20;
/// The rest of the name `system.data`, which inline data has.
const DATA: &[u8] = b"data";
/// A number of a prefix that GNU Hurd uses for what its own inodes have.
const HURD: u8 = 10;

/// An attribute as it is on the disk.
struct Raw {
    index: u8,
    name: Vec<u8>,
    value: Value,
    hash: u32,
}

enum Value {
    Here(Vec<u8>),
    Inode { number: Ino, size: u32 },
}

impl Filesystem {
    /// The extended attributes of an inode, by name: ACLs in the form that the kernel's interface has.
    ///
    /// # Errors
    ///
    /// Damaged ones, and those of reading.
    pub fn xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>> {
        let mut all: Vec<Xattr> = Vec::new();
        let mut room = MOST;
        let outside = self.outside_xattrs(inode)?;
        for (place, raw) in self.inside_xattrs(inode)?.into_iter().chain(outside) {
            let own = raw.index == xattr::SYSTEM && raw.name == DATA;
            if own || raw.index == xattr::ENCRYPTION || raw.index == HURD {
                continue;
            }
            let Some(name) = xattr::full_name(raw.index, &raw.name) else {
                return Err(Error::unsupported(place, format!("the attribute prefix {}", raw.index)));
            };
            let value = self.value(place, raw.value, raw.hash, &mut room)?;
            let value = match raw.index {
                xattr::ACL_ACCESS | xattr::ACL_DEFAULT => {
                    acl::from_disk(&value).map_err(|error| Error::corrupt(place, error.to_string()))?
                }
                _ => value,
            };
            all.push((name, value));
        }
        // The sort is stable: of two with one name the one in the inode counts, as in the kernel.
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all.dedup_by(|(later, _), (earlier, _)| later == earlier);
        Ok(all)
    }

    /// The rest of inline data, beyond what is in the place of the block map.
    pub(super) fn inline_rest(&self, inode: &Inode) -> Result<Vec<u8>> {
        for (place, raw) in self.inside_xattrs(inode)? {
            if raw.index == xattr::SYSTEM && raw.name == DATA {
                return self.value(place, raw.value, 0, &mut { MOST });
            }
        }
        Ok(Vec::new())
    }

    fn inside_xattrs(&self, inode: &Inode) -> Result<Vec<(Place, Raw)>> {
        let place = Place::Xattrs { inode: inode.number(), block: 0 };
        let Some((magic, area)) = inode.tail().split_first_chunk::<4>() else { return Ok(Vec::new()) };
        if u32::from_le_bytes(*magic) != xattr::MAGIC {
            return Ok(Vec::new());
        }
        parse(area, 0, place)
    }

    fn outside_xattrs(&self, inode: &Inode) -> Result<Vec<(Place, Raw)>> {
        let block = inode.xattr_block();
        if block == 0 {
            return Ok(Vec::new());
        }
        let place = Place::Xattrs { inode: inode.number(), block };
        let bytes = self.blocks.metadata(block, place)?;
        let header =
            BlockHeader::read_from_prefix(&bytes).map_err(|_| Error::corrupt(place, "it is too short"))?.0;
        if header.magic.get() != xattr::MAGIC || header.blocks.get() != 1 {
            return Err(Error::corrupt(place, "it does not begin as one does"));
        }
        if self.verify
            && let Some(seed) = self.geometry.seed
            && xattr::sum(seed, block, &bytes) != header.checksum.get()
        {
            return Err(Error::Checksum(place));
        }
        parse(&bytes, xattr::BLOCK_HEADER, place)
    }

    fn value(&self, place: Place, value: Value, hash: u32, room: &mut usize) -> Result<Vec<u8>> {
        let bytes = match value {
            Value::Here(bytes) => bytes,
            Value::Inode { number, size } => {
                let inode = self.inode(number)?;
                if !inode.has(flags::EA_INODE) || inode.size() != u64::from(size) {
                    let reason = format!("inode {number} is said to be a value of {size} bytes");
                    return Err(Error::corrupt(place, reason));
                }
                let bytes = self.read_all(&inode, *room as u64)?;
                // Its own hash is in the place of the access time; filesystems of Lustre have none.
                let sum = checksum::crc32c(self.geometry.superblock.seed().0, &bytes);
                if self.verify && hash != 0 && sum != inode.fields().atime.get() {
                    return Err(Error::Checksum(Place::Inode(number)));
                }
                bytes
            }
        };
        *room = room
            .checked_sub(bytes.len())
            .ok_or_else(|| Error::corrupt(place, "its values are larger than they can be"))?;
        Ok(bytes)
    }
}

/// The attributes in an area: entries from an offset on, values at offsets in it.
fn parse(area: &[u8], entries: usize, place: Place) -> Result<Vec<(Place, Raw)>> {
    let bad = |reason: &str| Error::corrupt(place, reason);
    let mut found = Vec::new();
    let (mut at, mut total) = (entries, 0usize);
    while let Some(rest) = area.get(at..).filter(|rest| rest.len() >= 4 && rest[..4] != [0; 4]) {
        let header = EntryHeader::read_from_prefix(rest).map_err(|_| bad("an entry is cut off"))?.0;
        let length = usize::from(header.name_length);
        let name = rest.get(xattr::ENTRY..xattr::ENTRY + length);
        let name = name.ok_or_else(|| bad("a name is cut off"))?.to_vec();
        let (size, offset) = (header.value_size.get(), usize::from(header.value_offset.get()));
        let value = if header.value_inum.get() != 0 {
            Value::Inode { number: header.value_inum.get(), size }
        } else {
            let size = size as usize;
            let range = if size == 0 { 0..0 } else { offset..offset.saturating_add(size) };
            let bytes = area.get(range).ok_or_else(|| bad("a value reaches beyond its end"))?;
            // Values do not share their bytes, so together they are no more than what they are in.
            total += size;
            if total > area.len() {
                return Err(bad("its values overlap"));
            }
            Value::Here(bytes.to_vec())
        };
        found.push((place, Raw { index: header.name_index, name, value, hash: header.hash.get() }));
        at += xattr::entry_size(length);
    }
    Ok(found)
}
