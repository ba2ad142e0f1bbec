//! ext2, ext3 and ext4: the superblock at 1 KiB (kernel documentation, filesystems/ext4, "Super Block").

use super::Filesystem;
use super::head::Head;

const SUPERBLOCK: usize = 1024;
const MAGIC: u16 = 0xEF53;

const STATE_VALID: u16 = 1;
const STATE_ERRORS: u16 = 2;
const COMPAT_HAS_JOURNAL: u32 = 0x4;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_JOURNAL_DEV: u32 = 0x8;
const INCOMPAT_64BIT: u32 = 0x80;
/// Incompatible features that ext3 has: filetype, recover, meta_bg.
const INCOMPAT_EXT3: u32 = 0x2 | INCOMPAT_RECOVER | 0x10;
/// Read-only compatible features that ext3 has: sparse_super, large_file, btree_dir.
const RO_COMPAT_EXT3: u32 = 0x1 | 0x2 | 0x4;

pub(super) fn find(head: Head<'_>) -> Option<Filesystem> {
    let superblock = Head(head.0.get(SUPERBLOCK..)?);
    if superblock.u16(56)? != MAGIC {
        return None;
    }
    let state = superblock.u16(58)?;
    let (compat, incompat, ro_compat) = (superblock.u32(92)?, superblock.u32(96)?, superblock.u32(100)?);
    let (label, uuid) = (superblock.text(120, 16), superblock.uuid(104));
    if incompat & INCOMPAT_JOURNAL_DEV != 0 {
        return Some(Filesystem { label, uuid, ..Filesystem::new("jbd") });
    }
    let kind = if incompat & !INCOMPAT_EXT3 != 0 || ro_compat & !RO_COMPAT_EXT3 != 0 {
        "ext4"
    } else if compat & COMPAT_HAS_JOURNAL != 0 {
        "ext3"
    } else {
        "ext2"
    };

    // Blocks of 1 KiB to 64 KiB; a larger shift is damage.
    let block = superblock.u32(24).filter(|shift| *shift <= 6).map(|shift| 1024u64 << shift);
    let wide = incompat & INCOMPAT_64BIT != 0;
    let bytes = |low: usize, high: usize| {
        let high = if wide { u64::from(superblock.u32(high)?) << 32 } else { 0 };
        (high | u64::from(superblock.u32(low)?)).checked_mul(block?)
    };
    let trouble = if state & STATE_ERRORS != 0 {
        Some("has errors on record; run e2fsck")
    } else if incompat & INCOMPAT_RECOVER != 0 {
        Some("was not unmounted cleanly; its journal holds changes, which the next mount replays")
    } else if state & STATE_VALID == 0 {
        Some("was not unmounted cleanly; run e2fsck")
    } else {
        None
    };
    let found =
        Filesystem { label, uuid, size: bytes(4, 0x150), free: bytes(12, 0x158), ..Filesystem::new(kind) };
    Some(found.judged(trouble))
}
