//! GPT (UEFI specification 2.10, 5.3): a header and an array of entries after the first sector, and both once more at
//! the disk's end.

use std::io;

use super::bytes::{array, crc32, put, u32_at, u64_at};
use super::{Format, Guid, Kind, Partition, Table, mbr};
use crate::read_at::ReadAt;

const SIGNATURE: &[u8; 8] = b"EFI PART";
const REVISION: u32 = 0x0001_0000;
/// Bytes of a header that are defined.
const HEADER: usize = 92;
/// Bytes of an entry and number of entries, as everybody writes them; more entries than these are written if a number
/// asks for them.
const ENTRY: usize = 128;
const ENTRIES: u32 = 128;
/// More bytes of entries than these are not looked at, whatever a header says.
const MAX_ARRAY: u64 = 1 << 20;
/// The most entries that are read and written: as many numbers as Linux gives to a disk.
pub(super) const MAX_NUMBER: u32 = 256;

/// Bytes of the array of entries in a table whose highest number is `number`, in whole sectors.
fn array_bytes(number: u32, sector: u64) -> u64 {
    (u64::from(number.max(ENTRIES)) * ENTRY as u64).next_multiple_of(sector)
}

/// What partitions may lie in, in bytes, on a disk of `size` bytes: first and end. Nothing if the disk is too small.
pub(super) fn usable(size: u64, sector: u64, number: u32) -> Option<(u64, u64)> {
    let array = array_bytes(number, sector);
    let end = (size / sector * sector).checked_sub(array + sector)?;
    let first = 2 * sector + array;
    (first < end).then_some((first, end))
}

/// One copy of a table.
struct Copy {
    disk: Guid,
    partitions: Vec<Partition>,
    /// Whether an entry that is used had to be left out.
    odd: bool,
    valid: bool,
    /// Where the other header is said to be, in sectors.
    other: u64,
}

pub(super) fn read<S: ReadAt + ?Sized>(source: &S, size: u64) -> io::Result<Option<Table>> {
    for sector in [512, 4096] {
        let primary = copy(source, sector, 1)?;
        let last = (size / sector).checked_sub(1).filter(|last| *last > 1);
        if let Some(primary) = primary {
            // The backup is where the primary says, if that can be true; for repair the last sector.
            let place = Some(primary.other).filter(|other| *other > 1 && Some(*other) <= last);
            let backup = place.map(|place| copy(source, sector, place)).transpose()?.flatten();
            let backup = backup.filter(|backup| backup.valid && backup.disk == primary.disk);
            return Ok(Some(match backup {
                Some(backup) if !primary.valid => table(
                    backup,
                    sector,
                    vec!["has a damaged first copy; the backup at the disk's end is used"],
                ),
                None if primary.valid => {
                    let missing = "has no valid backup at the disk's end";
                    table(primary, sector, vec![missing])
                }
                None => table(primary, sector, vec!["has wrong checksums, and no valid backup"]),
                Some(backup) => {
                    let same = backup.partitions == primary.partitions;
                    let differs = "differs from its backup at the disk's end";
                    let moved = "has its backup before the disk's end: the disk has grown";
                    let at_end = Some(primary.other) == last;
                    let problems = [(!same).then_some(differs), (!at_end).then_some(moved)];
                    table(primary, sector, problems.into_iter().flatten().collect())
                }
            }));
        }
        let backup = last.map(|last| copy(source, sector, last)).transpose()?.flatten();
        if let Some(backup) = backup.filter(|backup| backup.valid) {
            let lost = "has lost its first copy; the backup at the disk's end is used";
            return Ok(Some(table(backup, sector, vec![lost])));
        }
    }
    Ok(None)
}

fn table(copy: Copy, sector: u64, mut problems: Vec<&'static str>) -> Table {
    let Copy { disk, partitions, odd, valid, .. } = copy;
    if odd {
        problems.push("has entries whose numbers make no sense");
    }
    Table { format: Format::Gpt(disk), sector, partitions, problems, valid }
}

/// The copy whose header is in the sector `place`; nothing if there is none.
fn copy<S: ReadAt + ?Sized>(source: &S, sector: u64, place: u64) -> io::Result<Option<Copy>> {
    let Some(offset) = place.checked_mul(sector) else { return Ok(None) };
    let mut header = [0; 4096];
    let length = source.fill_at(offset, &mut header)?;
    let in_sector = usize::try_from(sector).unwrap_or(512).min(length);
    if in_sector < HEADER || header[..8] != *SIGNATURE {
        return Ok(None);
    }
    let length = usize::try_from(u32_at(&header, 12)).unwrap_or(0);
    let checksum = u32_at(&header, 16);
    let mut valid = (HEADER..=in_sector).contains(&length) && u64_at(&header, 24) == place && {
        let mut header = header[..length].to_vec();
        put(&mut header, 16, &[0; 4]);
        crc32(&header) == checksum
    };
    let (count, step) = (u32_at(&header, 80), u32_at(&header, 84));
    let total = u64::from(count) * u64::from(step);
    let start = u64_at(&header, 72).checked_mul(sector);
    let plausible = (128..=4096).contains(&step) && step.is_multiple_of(8) && total <= MAX_ARRAY;
    let mut entries = Vec::new();
    if let Some(start) = start.filter(|_| plausible) {
        entries = vec![0; usize::try_from(total).unwrap_or(0)];
        let length = source.fill_at(start, &mut entries)?;
        entries.truncate(length);
    }
    valid &= entries.len() as u64 == total && total > 0 && crc32(&entries) == u32_at(&header, 88);
    let step = usize::try_from(step).unwrap_or(ENTRY).max(ENTRY);
    let used = |bytes: &[u8]| bytes[..16] != [0; 16];
    let all = || (1..).zip(entries.chunks_exact(step)).filter(|(_, bytes)| used(bytes));
    let partitions: Vec<_> = all().filter_map(|(number, bytes)| entry(number, bytes, sector)).collect();
    let odd = all().count() != partitions.len();
    let disk = Guid::from_disk(array(&header, 56));
    Ok(Some(Copy { disk, partitions, odd, valid, other: u64_at(&header, 32) }))
}

/// A partition, if the entry's numbers make sense.
fn entry(number: u32, bytes: &[u8], sector: u64) -> Option<Partition> {
    if number > MAX_NUMBER {
        return None;
    }
    let kind = Guid::from_disk(array(bytes, 0));
    let start = u64_at(bytes, 32).checked_mul(sector)?;
    let end = u64_at(bytes, 40).checked_add(1)?.checked_mul(sector)?;
    let size = end.checked_sub(start).filter(|size| *size > 0)?;
    let units = bytes[56..128].chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    Some(Partition {
        number,
        start,
        size,
        kind: Kind::Gpt(kind),
        uuid: Some(Guid::from_disk(array(bytes, 16))),
        name: String::from_utf16_lossy(&units),
        attributes: u64_at(bytes, 48),
    })
}

/// Backup entries and header, primary entries, the protective MBR, and the primary header. The table was checked.
pub(super) fn encode(table: &Table, disk: Guid, size: u64) -> Vec<(u64, Vec<u8>)> {
    let sector = table.sector;
    let highest = table.partitions.iter().map(|partition| partition.number).max().unwrap_or(0);
    let length = array_bytes(highest, sector);
    let mut entries = vec![0; usize::try_from(length).unwrap_or(0)];
    for partition in &table.partitions {
        let index = usize::try_from(partition.number - 1).unwrap_or(0);
        let entry = &mut entries[index * ENTRY..(index + 1) * ENTRY];
        if let Kind::Gpt(kind) = partition.kind {
            put(entry, 0, &kind.to_disk());
        }
        put(entry, 16, &partition.uuid.unwrap_or(Guid(0)).to_disk());
        put(entry, 32, &(partition.start / sector).to_le_bytes());
        put(entry, 40, &(partition.end() / sector - 1).to_le_bytes());
        put(entry, 48, &partition.attributes.to_le_bytes());
        for (n, unit) in partition.name.encode_utf16().take(36).enumerate() {
            put(entry, 56 + 2 * n, &unit.to_le_bytes());
        }
    }
    let count = highest.max(ENTRIES);
    let used = usize::try_from(count).unwrap_or(0) * ENTRY;
    let checksum = crc32(&entries[..used]);
    let last = size / sector - 1;
    let array_sectors = length / sector;
    let (first_usable, last_usable) = (2 + array_sectors, last - array_sectors - 1);
    let header = |own: u64, other: u64, array: u64| {
        let mut header = vec![0; usize::try_from(sector).unwrap_or(512)];
        put(&mut header, 0, SIGNATURE);
        put(&mut header, 8, &REVISION.to_le_bytes());
        put(&mut header, 12, &92u32.to_le_bytes());
        for (offset, value) in [(24, own), (32, other), (40, first_usable), (48, last_usable), (72, array)] {
            put(&mut header, offset, &value.to_le_bytes());
        }
        put(&mut header, 56, &disk.to_disk());
        put(&mut header, 80, &count.to_le_bytes());
        put(&mut header, 84, &128u32.to_le_bytes());
        put(&mut header, 88, &checksum.to_le_bytes());
        let own = crc32(&header[..HEADER]);
        put(&mut header, 16, &own.to_le_bytes());
        header
    };
    let backup = last - array_sectors;
    let mut at_end = entries.clone();
    at_end.extend(header(last, 1, backup));
    let mut at_start = header(1, last, 2);
    at_start.extend(entries);
    vec![
        (backup * sector, at_end),
        // Boot code in front is left alone.
        (mbr::CODE, mbr::protective(size / sector)),
        (sector, at_start),
    ]
}
