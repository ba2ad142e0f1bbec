//! Names in directories.

use super::inode::{Names, Reference};
use super::metadata::Metadata;
use super::superblock::{u16_at, u32_at};

/// More names than these follow no header.
const RUN: u32 = 256;
/// The longest name.
const NAME: u32 = 255;

/// The names in a directory with what they lead to, in their order.
pub(super) fn list(table: &mut Metadata<'_>, names: &Names) -> Result<Vec<(Vec<u8>, Reference)>, String> {
    let mut entries = Vec::new();
    let mut left = names.size;
    if left == 0 {
        return Ok(entries);
    }
    let mut cursor = table.cursor(names.block.into(), names.offset.into())?;
    let mut take = |bytes: u32| -> Result<u32, String> {
        left = left.checked_sub(bytes).ok_or("is a damaged directory: a name goes beyond its end")?;
        Ok(left)
    };
    loop {
        let header: [u8; 12] = table.array(&mut cursor)?;
        let mut left = take(12)?;
        let count = u32_at(&header, 0);
        if count >= RUN {
            return Err(format!("is a damaged directory: it has {count} names in a row"));
        }
        for _ in 0..=count {
            let entry: [u8; 8] = table.array(&mut cursor)?;
            let length = u32::from(u16_at(&entry, 6)) + 1;
            left = take(8 + length)?;
            let name = table.bytes(&mut cursor, length, NAME)?;
            let inode = u64::from(u32_at(&header, 4)) << 16 | u64::from(u16_at(&entry, 0));
            entries.push((name, Reference(inode)));
        }
        if left == 0 {
            return Ok(entries);
        }
    }
}
