//! Partition tables: MBR (with logical partitions) and GPT (UEFI specification, 5.2 and 5.3).

use std::io;

use serde::Serialize;

use super::head::Head;
use super::{Filesystem, Source};

/// The sector of an MBR, and the usual one of a GPT.
const SECTOR: u64 = 512;
/// More partitions than these are not listed, whatever a table says.
const MAX_PARTITIONS: usize = 256;
/// The first number of a logical partition that is not looked for any more.
const MAX_LOGICAL: u32 = 132;

/// The kind of a partition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TableKind {
    /// In the first sector; of PCs before UEFI.
    Mbr,
    /// Of UEFI.
    Gpt,
}

/// A partition table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Table {
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: TableKind,
    /// Whether its checksums are right, as far as it has any.
    pub valid: bool,
    /// Its identity, if it has one.
    pub uuid: Option<String>,
    /// The partitions in use, by number.
    pub partitions: Vec<Partition>,
}

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// Its number, counted from 1, as in `/dev/sda1`.
    pub number: u32,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Its type, as a name if it is a common one.
    #[serde(rename = "type")]
    pub kind: String,
    /// The name that a GPT gives it.
    pub name: Option<String>,
    /// Whether its end is within the disk.
    pub fits: bool,
    /// What is in it.
    pub filesystem: Option<Filesystem>,
}

/// Find a table in the first bytes of a disk of `size` bytes.
pub(super) fn find<S: Source + ?Sized>(source: &S, head: Head<'_>, size: u64) -> io::Result<Option<Table>> {
    if let Some(table) = [SECTOR, 4096].into_iter().find_map(|sector| gpt(head, sector, size)) {
        return Ok(Some(table));
    }
    mbr(source, head, size)
}

fn gpt(head: Head<'_>, sector: u64, size: u64) -> Option<Table> {
    let at = usize::try_from(sector).ok()?;
    let header = Head(head.0.get(at..)?);
    if !header.has(0, b"EFI PART") {
        return None;
    }
    let length = usize::try_from(header.u32(12)?).ok().filter(|length| (92..=at).contains(length));
    let mut copy = length.and_then(|length| header.bytes(0, length)).unwrap_or_default().to_vec();
    if let Some(checksum) = copy.get_mut(16..20) {
        checksum.fill(0);
    }
    let mut valid = header.u32(16) == Some(crc32(&copy));

    let (count, step) = (header.u32(80)?, usize::try_from(header.u32(84)?).ok()?);
    let entries = usize::try_from(header.u64(72)?.checked_mul(sector)?).ok();
    let length = usize::try_from(count).ok().and_then(|count| count.checked_mul(step));
    let entries = entries.zip(length).and_then(|(start, length)| head.bytes(start, length));
    valid &= entries.is_some_and(|entries| header.u32(88) == Some(crc32(entries)));

    let step = if (128..=4096).contains(&step) { step } else { usize::MAX };
    let partitions =
        (1..).zip(entries.unwrap_or_default().chunks_exact(step)).filter_map(|(number, entry)| {
            let entry = Head(entry);
            let kind = entry.guid(0)?;
            let (first, last) = (entry.u64(32)?, entry.u64(40)?);
            let start = first.checked_mul(sector)?;
            let end = last.checked_add(1)?.checked_mul(sector)?;
            Some(Partition {
                number,
                start,
                size: end.checked_sub(start)?,
                kind: guid_name(&kind).map_or(kind, str::to_owned),
                name: entry.utf16(56, 72),
                fits: end <= size,
                filesystem: None,
            })
        });
    let partitions = partitions.take(MAX_PARTITIONS).collect();
    Some(Table { kind: TableKind::Gpt, valid, uuid: header.guid(56), partitions })
}

fn guid_name(guid: &str) -> Option<&'static str> {
    Some(match guid {
        "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" => "EFI system",
        "21686148-6449-6e6f-744e-656564454649" => "BIOS boot",
        "0fc63daf-8483-4772-8e79-3d69d8477de4" => "Linux filesystem",
        "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f" => "Linux swap",
        "e6d6d379-f507-44c2-a23c-238f2a3df928" => "Linux LVM",
        "4f68bce3-e8cd-4db1-96e7-fbcaf984b709" => "Linux root (x86-64)",
        "b921b045-1df0-41c3-af44-4c6f280d3fae" => "Linux root (ARM-64)",
        "bc13c2ff-59e6-4262-a352-b275fd6f7172" => "Linux extended boot",
        "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7" => "Microsoft basic data",
        _ => return None,
    })
}

/// One of the four entries of a boot record.
struct Entry {
    kind: u8,
    /// In sectors: from the start of the disk, or of whatever the record belongs to.
    first: u64,
    sectors: u64,
}

impl Entry {
    /// The entries of a boot record, or `None` if it is none: every status byte is 0 or 0x80.
    fn all(record: Head<'_>) -> Option<[Entry; 4]> {
        let entry = |number: usize| {
            let entry = Head(record.bytes(446 + 16 * number, 16)?);
            (entry.u8(0)? & 0x7F == 0).then_some(Entry {
                kind: entry.u8(4)?,
                first: entry.u32(8)?.into(),
                sectors: entry.u32(12)?.into(),
            })
        };
        let entries = [entry(0)?, entry(1)?, entry(2)?, entry(3)?];
        record.has(510, b"\x55\xaa").then_some(entries)
    }

    fn used(&self) -> bool {
        self.kind != 0 && self.sectors != 0
    }

    fn extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0F | 0x85)
    }

    /// The partition, if the entry is one; `base` is what `first` counts from, in sectors.
    fn partition(&self, number: u32, base: u64, size: u64) -> Partition {
        // Three numbers of 32 bits and a factor of 512 fit into 64 bits.
        let start = (base + self.first) * SECTOR;
        let length = self.sectors * SECTOR;
        Partition {
            number,
            start,
            size: length,
            kind: mbr_name(self.kind).map_or_else(|| format!("0x{:02x}", self.kind), str::to_owned),
            name: None,
            fits: start + length <= size,
            filesystem: None,
        }
    }
}

fn mbr<S: Source + ?Sized>(source: &S, head: Head<'_>, size: u64) -> io::Result<Option<Table>> {
    let Some(entries) = Entry::all(head) else { return Ok(None) };
    // Many a boot sector ends in the signature without being a table; one without a partition that begins on the disk
    // and behind the table is none.
    let plausible = |entry: &Entry| entry.used() && entry.first != 0 && entry.first * SECTOR < size;
    if !entries.iter().any(plausible) || entries.iter().any(|entry| entry.used() && entry.first == 0) {
        return Ok(None);
    }
    let used = (1..).zip(&entries).filter(|(_, entry)| entry.used());
    let mut partitions: Vec<_> = used.map(|(number, entry)| entry.partition(number, 0, size)).collect();
    if let Some(extended) = entries.iter().find(|entry| entry.used() && entry.extended()) {
        logical(source, extended.first, size, &mut partitions)?;
    }
    let uuid = head.u32(440).filter(|number| *number != 0).map(|number| format!("{number:08x}"));
    Ok(Some(Table { kind: TableKind::Mbr, valid: true, uuid, partitions }))
}

/// Follow the chain of records in an extended partition: each has one logical partition, and the place of the next.
fn logical<S: Source + ?Sized>(
    source: &S,
    extended: u64,
    size: u64,
    partitions: &mut Vec<Partition>,
) -> io::Result<()> {
    let mut record = extended;
    for number in 5..MAX_LOGICAL {
        let mut sector = [0; 512];
        let read = source.read(record * SECTOR, &mut sector)?;
        let Some([partition, next, ..]) = Entry::all(Head(&sector[..read])) else { break };
        if partition.used() {
            partitions.push(partition.partition(number, record, size));
        }
        // Only forward, so that the chain ends.
        if !next.used() || extended + next.first <= record {
            break;
        }
        record = extended + next.first;
    }
    Ok(())
}

fn mbr_name(kind: u8) -> Option<&'static str> {
    Some(match kind {
        0x05 | 0x0F | 0x85 => "extended",
        0x07 => "NTFS or exFAT",
        0x0B | 0x0C => "FAT32",
        0x0E => "FAT16",
        0x82 => "Linux swap",
        0x83 => "Linux",
        0x8E => "Linux LVM",
        0xEE => "GPT protective",
        0xEF => "EFI system",
        0xFD => "Linux RAID",
        _ => return None,
    })
}

/// The CRC of a GPT (CRC-32 of ISO 3309, reflected): a few KiB, so a bit at a time is enough.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}
