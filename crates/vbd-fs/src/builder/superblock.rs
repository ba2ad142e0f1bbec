//! What the superblock of ext2, ext3 and ext4 says (Documentation/filesystems/ext4, "Super Block").

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::meter::{Geometry, Room};

/// The fields that a builder needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) block_size: u64,
    pub(crate) blocks: u64,
    pub(crate) free: Room,
    pub(crate) inode_size: u64,
    pub(crate) extents: bool,
    pub(crate) uuid: String,
    pub(crate) label: String,
}

const OFFSET: u64 = 1024;
const EXTENTS: u32 = 0x40;
const WIDE: u32 = 0x80;

impl Superblock {
    /// Reads the primary superblock of a filesystem that begins at `start`, in bytes.
    pub(crate) fn read(image: &File, start: u64) -> io::Result<Superblock> {
        let mut raw = [0; 1024];
        image.read_exact_at(&mut raw, start + OFFSET)?;
        let u16_at = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let log = u32_at(24);
        if u16_at(56) != 0xef53 || log > 6 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no ext filesystem in it"));
        }
        let incompatible = u32_at(96);
        let wide = |low: usize, high: usize| {
            let high = if incompatible & WIDE != 0 { u32_at(high) } else { 0 };
            u64::from(high) << 32 | u64::from(u32_at(low))
        };
        let label = &raw[120..136];
        let label = label.split(|&b| b == 0).next().unwrap_or_default();
        Ok(Superblock {
            block_size: 1024 << log,
            blocks: wide(4, 0x150),
            free: Room { blocks: wide(12, 0x158), inodes: u32_at(16).into() },
            inode_size: u16_at(88).into(),
            extents: incompatible & EXTENTS != 0,
            uuid: uuid_text(&raw[104..120]),
            label: String::from_utf8_lossy(label).into_owned(),
        })
    }

    /// How files are laid out in it.
    pub(crate) fn geometry(&self) -> Geometry {
        // 128 bytes of fields, 32 more of them, and 4 before the attributes, which end in 4 zeros.
        Geometry {
            block_size: self.block_size,
            xattr_space: self.inode_size.saturating_sub(128 + 32 + 4 + 4),
            extents: self.extents,
        }
    }
}

fn uuid_text(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(36);
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
