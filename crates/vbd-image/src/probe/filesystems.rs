//! The other filesystems, and what else begins with a header of its own. One function each, with the source of its
//! fields.

use super::Filesystem;
use super::head::Head;

const NOT_UNMOUNTED: &str = "was not unmounted cleanly";

/// The first that is found. Those with a long signature at a place of their own come before boot sectors.
pub(super) fn find(head: Head<'_>) -> Option<Filesystem> {
    let all = [xfs, btrfs, squashfs, erofs, f2fs, swap, luks, lvm, iso9660, disk_format, exfat, ntfs, fat];
    all.into_iter().find_map(|find| find(head))
}

/// XFS (xfs_format.h, `struct xfs_dsb`; big-endian). Whether its log is clean takes reading the log.
fn xfs(head: Head<'_>) -> Option<Filesystem> {
    if !head.has(0, b"XFSB") {
        return None;
    }
    let block = u64::from(head.u32_be(4)?);
    let bytes = |offset| head.u64_be(offset)?.checked_mul(block);
    let (size, free) = (bytes(8), bytes(144));
    Some(Filesystem { label: head.text(108, 12), uuid: head.uuid(32), size, free, ..Filesystem::new("xfs") })
}

/// Btrfs (btrfs_tree.h, `struct btrfs_super_block`), the superblock at 64 KiB. A log tree holds what was synced since
/// the last transaction and is there after a crash only.
fn btrfs(head: Head<'_>) -> Option<Filesystem> {
    let superblock = Head(head.0.get(65_536..)?);
    if !superblock.has(64, b"_BHRfS_M") {
        return None;
    }
    // Over several devices the numbers are those of all of them, which says nothing about this one.
    let alone = superblock.u64(136)? == 1;
    let size = superblock.u64(112).filter(|_| alone);
    let free = size.zip(superblock.u64(120)).and_then(|(size, used)| size.checked_sub(used));
    let (label, uuid) = (superblock.text(299, 256), superblock.uuid(32));
    let found = Filesystem { label, uuid, size, free, ..Filesystem::new("btrfs") };
    let crashed = superblock.u64(96)? != 0;
    Some(if crashed {
        found.judged(Some("was not unmounted cleanly; its log is replayed by the next mount"))
    } else {
        found
    })
}

/// squashfs 4 (squashfs_fs.h, `struct squashfs_super_block`).
fn squashfs(head: Head<'_>) -> Option<Filesystem> {
    let found = head.has(0, b"hsqs") && head.u16(28)? == 4;
    found.then(|| Filesystem { size: head.u64(40), ..Filesystem::new("squashfs") })
}

/// EROFS (erofs_fs.h, `struct erofs_super_block`), at 1 KiB.
fn erofs(head: Head<'_>) -> Option<Filesystem> {
    let superblock = Head(head.0.get(1024..)?);
    if superblock.u32(0)? != 0xE0F5_E1E2 {
        return None;
    }
    let block = superblock.u8(12).filter(|bits| (9..=16).contains(bits)).map(|bits| 1u64 << bits);
    let size = block.zip(superblock.u32(36)).map(|(block, blocks)| u64::from(blocks) * block);
    let (label, uuid) = (superblock.text(64, 16), superblock.uuid(48));
    Some(Filesystem { label, uuid, size, ..Filesystem::new("erofs") })
}

/// F2FS (f2fs_fs.h, `struct f2fs_super_block`), at 1 KiB.
fn f2fs(head: Head<'_>) -> Option<Filesystem> {
    let superblock = Head(head.0.get(1024..)?);
    if superblock.u32(0)? != 0xF2F5_2010 {
        return None;
    }
    let block = superblock.u32(16).filter(|bits| (9..=16).contains(bits)).map(|bits| 1u64 << bits);
    let size = block.zip(superblock.u64(36)).and_then(|(block, blocks)| blocks.checked_mul(block));
    let (label, uuid) = (superblock.utf16(124, 1024), superblock.uuid(108));
    Some(Filesystem { label, uuid, size, ..Filesystem::new("f2fs") })
}

/// Swap (swap.h, `union swap_header`): the signature ends the first page, whose size the host may not share.
fn swap(head: Head<'_>) -> Option<Filesystem> {
    let page =
        [4096usize, 8192, 16_384, 65_536].into_iter().find(|page| head.has(page - 10, b"SWAPSPACE2"))?;
    let pages = u64::from(head.u32(1028)?) + 1;
    let size = Some(pages * page as u64);
    Some(Filesystem { label: head.text(1052, 16), uuid: head.uuid(1036), size, ..Filesystem::new("swap") })
}

/// LUKS 1 and 2 (the format specifications; big-endian).
fn luks(head: Head<'_>) -> Option<Filesystem> {
    if !head.has(0, b"LUKS\xba\xbe") {
        return None;
    }
    let label = if head.u16_be(6)? == 2 { head.text(24, 48) } else { None };
    Some(Filesystem { label, uuid: head.text(168, 40), ..Filesystem::new("crypto_LUKS") })
}

/// A physical volume of LVM 2 (its `label.h`): the label is in one of the first four sectors.
fn lvm(head: Head<'_>) -> Option<Filesystem> {
    let label =
        (0..4).map(|n| n * 512).find(|at| head.has(*at, b"LABELONE") && head.has(at + 24, b"LVM2 001"))?;
    let uuid = head.bytes(label + 32, 32).filter(|id| id.iter().all(u8::is_ascii_alphanumeric));
    let uuid = uuid.and_then(|id| std::str::from_utf8(id).ok()).map(|id| {
        let groups = [&id[..6], &id[6..10], &id[10..14], &id[14..18], &id[18..22], &id[22..26], &id[26..]];
        groups.join("-")
    });
    let size = head.u64(label + 64);
    Some(Filesystem { uuid, size, ..Filesystem::new("LVM2_member") })
}

/// ISO 9660 (ECMA-119 8.4): the primary volume descriptor at 32 KiB. Its creation time serves as UUID, as for blkid.
fn iso9660(head: Head<'_>) -> Option<Filesystem> {
    let volume = Head(head.0.get(32_768..)?);
    if !volume.has(0, b"\x01CD001") {
        return None;
    }
    let size = volume.u32(80).zip(volume.u16(128)).map(|(blocks, size)| u64::from(blocks) * u64::from(size));
    let time = volume.bytes(813, 16).filter(|digits| digits.iter().all(u8::is_ascii_digit));
    let uuid = time.and_then(|time| std::str::from_utf8(time).ok()).map(|time| {
        let parts =
            [&time[..4], &time[4..6], &time[6..8], &time[8..10], &time[10..12], &time[12..14], &time[14..]];
        parts.join("-")
    });
    Some(Filesystem { label: volume.text(40, 32), uuid, size, ..Filesystem::new("iso9660") })
}

/// Formats of disk files: a disk that contains one was perhaps meant to be opened as it.
fn disk_format(head: Head<'_>) -> Option<Filesystem> {
    let formats: [(&[u8], &str); 5] = [
        (b"QFI\xfb", "qcow2"),
        (b"KDMV", "vmdk"),
        (b"conectix", "vhd"),
        (b"vhdxfile", "vhdx"),
        (b"<<< Oracle VM VirtualBox", "vdi"),
    ];
    let kind = formats.into_iter().find(|(magic, _)| head.has(0, magic))?.1;
    Some(Filesystem::new(kind))
}

/// exFAT (its specification, 3.1): the label is in the root directory.
fn exfat(head: Head<'_>) -> Option<Filesystem> {
    if !head.has(3, b"EXFAT   ") {
        return None;
    }
    let sector = head.u8(108).filter(|bits| (9..=12).contains(bits)).map(|bits| 1u64 << bits);
    let size = sector.zip(head.u64(72)).and_then(|(sector, sectors)| sectors.checked_mul(sector));
    let dirty = head.u16(106)? & 2 != 0;
    let found = Filesystem { uuid: serial(head.u32(100)?), size, ..Filesystem::new("exfat") };
    Some(found.judged(dirty.then_some(NOT_UNMOUNTED)))
}

/// NTFS: the boot sector. Label and state are in its file table.
fn ntfs(head: Head<'_>) -> Option<Filesystem> {
    if !head.has(3, b"NTFS    ") {
        return None;
    }
    let size = head.u64(40)?.checked_mul(u64::from(head.u16(11)?));
    Some(Filesystem { uuid: Some(format!("{:016X}", head.u64(72)?)), size, ..Filesystem::new("ntfs") })
}

/// FAT12, FAT16, FAT32 (Microsoft's specification, and Linux's `struct fat_boot_sector` for the state).
fn fat(head: Head<'_>) -> Option<Filesystem> {
    let wide = head.has(82, b"FAT32   ");
    let known = wide || [b"FAT12   ", b"FAT16   ", b"FAT     "].iter().any(|name| head.has(54, *name));
    let sector = u64::from(head.u16(11)?);
    let cluster = u64::from(head.u8(13)?);
    if !known || !head.has(510, b"\x55\xaa") || !sector.is_power_of_two() || !cluster.is_power_of_two() {
        return None;
    }
    // State, volume number and label follow the parts that differ.
    let extended = if wide { 64 } else { 36 };
    let sectors = match head.u16(19)? {
        0 => head.u32(32)?,
        few => u32::from(few),
    };
    // FAT32 keeps the number of free clusters in a sector of its own; all ones if it is not known.
    let info = usize::from(head.u16(48)?) * usize::from(head.u16(11)?);
    let free = (wide && head.has(info, b"RRaA")).then(|| head.u32(info.checked_add(488)?)).flatten();
    let free = free.filter(|free| *free != u32::MAX).map(|free| u64::from(free) * cluster * sector);
    let found = Filesystem {
        label: head.text(extended + 7, 11).filter(|label| label != "NO NAME"),
        uuid: serial(head.u32(extended + 3)?),
        size: Some(u64::from(sectors) * sector),
        free,
        ..Filesystem::new("vfat")
    };
    let dirty = head.u8(extended + 1)? & 1 != 0;
    Some(found.judged(dirty.then_some(NOT_UNMOUNTED)))
}

/// The volume number of the FAT family, as it is written.
fn serial(number: u32) -> Option<String> {
    (number != 0).then(|| format!("{:04X}-{:04X}", number >> 16, number & 0xFFFF))
}
