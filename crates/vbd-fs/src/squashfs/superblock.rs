//! The superblock.

use super::block::Compression;
use super::inode::Reference;

/// Bytes of it.
pub(super) const SIZE: usize = 96;
/// Where a table is that does not exist.
const NONE: u64 = u64::MAX;
const FLAG_NO_XATTRS: u16 = 0x200;

pub(super) struct Superblock {
    pub(super) compression: Compression,
    /// Bytes of a data block, at most 1 MiB.
    pub(super) block_size: u32,
    pub(super) root: Reference,
    /// Where the tables of inodes and directories begin, and the latter ends at the latest.
    pub(super) inodes: u64,
    pub(super) directories: u64,
    pub(super) directories_end: u64,
    /// Where the table of users and groups is, and how many there are.
    pub(super) ids: (u64, u16),
    /// Where the table of fragments is, and how many there are.
    pub(super) fragments: Option<(u64, u32)>,
    pub(super) xattrs: Option<u64>,
}

/// Little-endian numbers at offsets, of bytes whose length was looked at.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl Superblock {
    /// Reads it from its [`SIZE`] bytes; `length` is how many bytes the file has.
    pub(super) fn parse(bytes: &[u8], length: u64) -> Result<Superblock, String> {
        if bytes.starts_with(b"sqsh") {
            return Err("is a squashfs of a big-endian machine, which is not supported".to_owned());
        }
        let version = (u16_at(bytes, 28), u16_at(bytes, 30));
        if !bytes.starts_with(b"hsqs") || version != (4, 0) {
            return Err(format!("is a squashfs of version {}.{}; 4.0 is supported", version.0, version.1));
        }
        let (block_size, block_log) = (u32_at(bytes, 12), u16_at(bytes, 22));
        if !(12..=20).contains(&block_log) || block_size != 1 << block_log {
            return Err(format!("is damaged: it has blocks of {block_size} bytes"));
        }
        let used = u64_at(bytes, 40);
        if used > length {
            return Err(format!("is cut off: it has {length} bytes and must have {used}"));
        }
        let table = |at| Some(u64_at(bytes, at)).filter(|&start| start != NONE);
        let fragments = table(80).zip(Some(u32_at(bytes, 16))).filter(|&(_, count)| count > 0);
        let xattrs = table(56).filter(|_| u16_at(bytes, 24) & FLAG_NO_XATTRS == 0);
        let (inodes, directories) = (u64_at(bytes, 64), u64_at(bytes, 72));
        if inodes < SIZE as u64 || directories <= inodes || directories > used {
            return Err("is damaged: its tables are not where they can be".to_owned());
        }
        Ok(Superblock {
            compression: Compression::of(u16_at(bytes, 20))?,
            block_size,
            root: Reference(u64_at(bytes, 32)),
            inodes,
            directories,
            directories_end: used,
            ids: (u64_at(bytes, 48), u16_at(bytes, 26)),
            fragments,
            xattrs,
        })
    }
}
