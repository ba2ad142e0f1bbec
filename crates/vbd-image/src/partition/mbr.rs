//! MBR (UEFI specification 2.10, 5.2): four entries in the first sector, and a chain of records for logical partitions.

use std::io;

use super::bytes::{put, u32_at};
use super::{BOOTABLE, Format, Kind, Partition, Table};
use crate::read_at::ReadAt;

/// An MBR counts in these, whatever the disk's own are: that is what Linux does on a disk of 512-byte sectors.
pub(super) const SECTOR: u64 = 512;
/// Bytes of boot code before the disk's number and the entries.
pub(super) const CODE: u64 = 440;
const ENTRIES: usize = 446;
const SIGNATURE: [u8; 2] = [0x55, 0xAA];
/// The first number of a logical partition that is not looked for any more.
const MAX_LOGICAL: u32 = 132;
const PROTECTIVE: u8 = 0xEE;

/// One of the four entries of a boot record.
#[derive(Clone, Copy)]
struct Entry {
    active: bool,
    kind: u8,
    /// In sectors: from the start of the disk, or of whatever the record belongs to.
    first: u64,
    sectors: u64,
}

impl Entry {
    fn used(&self) -> bool {
        self.kind != 0 && self.sectors != 0
    }

    /// The partition; `base` is what `first` counts from, in sectors.
    fn partition(&self, number: u32, base: u64) -> Partition {
        Partition {
            number,
            // Three numbers of 32 bits and a factor of 512 fit into 64 bits.
            start: (base + self.first) * SECTOR,
            size: self.sectors * SECTOR,
            kind: Kind::Mbr(self.kind),
            uuid: None,
            name: String::new(),
            attributes: if self.active { BOOTABLE } else { 0 },
        }
    }
}

/// A boot record.
pub(super) struct Record {
    disk: u32,
    entries: [Entry; 4],
}

impl Record {
    /// The record in a sector, or `None` if there is none: it ends in a signature, and every status byte is 0 or 0x80.
    pub(super) fn read<S: ReadAt + ?Sized>(source: &S, sector: u64) -> io::Result<Option<Record>> {
        let mut bytes = [0; 512];
        let length = source.fill_at(sector * SECTOR, &mut bytes)?;
        if length < bytes.len() || bytes[510..] != SIGNATURE {
            return Ok(None);
        }
        let entries = [0, 1, 2, 3].map(|number| {
            let entry = &bytes[ENTRIES + 16 * number..ENTRIES + 16 * (number + 1)];
            let first = u32_at(entry, 8).into();
            let sectors = u32_at(entry, 12).into();
            (entry[0] & 0x7F == 0).then_some(Entry { active: entry[0] != 0, kind: entry[4], first, sectors })
        });
        let [Some(a), Some(b), Some(c), Some(d)] = entries else { return Ok(None) };
        Ok(Some(Record { disk: u32_at(&bytes, 440), entries: [a, b, c, d] }))
    }

    /// Whether it is a table rather than the end of some boot sector: a partition begins on the disk, and none in the
    /// table itself.
    pub(super) fn is_table(&self, size: u64) -> bool {
        let used = || self.entries.iter().filter(|entry| entry.used());
        used().any(|entry| entry.first != 0 && entry.first * SECTOR < size)
            && used().all(|entry| entry.first != 0)
    }

    /// Whether it says that a GPT follows.
    pub(super) fn protects(&self) -> bool {
        self.entries.iter().any(|entry| entry.used() && entry.kind == PROTECTIVE)
    }
}

/// The table that begins with `record`.
pub(super) fn read<S: ReadAt + ?Sized>(source: &S, record: &Record, size: u64) -> io::Result<Table> {
    let used = (1..).zip(&record.entries).filter(|(_, entry)| entry.used());
    let mut partitions: Vec<_> = used.map(|(number, entry)| entry.partition(number, 0)).collect();
    let extended = partitions.iter().find(|partition| partition.kind.is_extended());
    if let Some(start) = extended.map(|extended| extended.start) {
        logical(source, start / SECTOR, size, &mut partitions)?;
    }
    Ok(Table { partitions, ..Table::new(Format::Mbr(record.disk), SECTOR) })
}

/// Follows the chain of records in an extended partition: each has one logical partition, and the place of the next.
fn logical<S: ReadAt + ?Sized>(
    source: &S,
    extended: u64,
    size: u64,
    partitions: &mut Vec<Partition>,
) -> io::Result<()> {
    let mut at = extended;
    let mut number = 5;
    while number < MAX_LOGICAL && at.saturating_mul(SECTOR) < size {
        let Some(Record { entries: [partition, next, ..], .. }) = Record::read(source, at)? else { break };
        if partition.used() {
            partitions.push(partition.partition(number, at));
        }
        number += 1;
        // Only forward, so that the chain ends.
        if !next.used() || extended + next.first <= at {
            break;
        }
        at = extended + next.first;
    }
    Ok(())
}

/// What follows the boot code: number, entries, signature.
fn record(disk: u32, entries: &[(usize, Entry)]) -> Vec<u8> {
    let mut bytes = vec![0; 72];
    put(&mut bytes, 0, &disk.to_le_bytes());
    for (index, entry) in entries {
        let at = 6 + 16 * index;
        bytes[at] = if entry.active { 0x80 } else { 0 };
        // Cylinders, heads and sectors mean nothing on disks of today: all ones, as for what they cannot express.
        put(&mut bytes, at + 1, &[0xFE, 0xFF, 0xFF, entry.kind, 0xFE, 0xFF, 0xFF]);
        put(&mut bytes, at + 8, &narrow(entry.first).to_le_bytes());
        put(&mut bytes, at + 12, &narrow(entry.sectors).to_le_bytes());
    }
    put(&mut bytes, 70, &SIGNATURE);
    bytes
}

fn narrow(sectors: u64) -> u32 {
    u32::try_from(sectors).unwrap_or(u32::MAX)
}

/// The record in front of a GPT on a disk of so many sectors, without the boot code (UEFI 2.10, 5.2.3).
pub(super) fn protective(sectors: u64) -> Vec<u8> {
    let entry = Entry { active: false, kind: PROTECTIVE, first: 1, sectors: sectors - 1 };
    let mut bytes = record(0, &[(0, entry)]);
    // Sector 1 in the old way of counting, which this one place asks for.
    put(&mut bytes, 7, &[0x00, 0x02, 0x00]);
    bytes
}

/// The first sector without its boot code. The table was checked: it has primary partitions alone.
pub(super) fn encode(table: &Table, disk: u32) -> Vec<(u64, Vec<u8>)> {
    let entries = table.partitions.iter().map(|partition| {
        let kind = if let Kind::Mbr(kind) = partition.kind { kind } else { 0 };
        let active = partition.attributes & BOOTABLE != 0;
        let (first, sectors) = (partition.start / SECTOR, partition.size / SECTOR);
        let index = usize::try_from(partition.number - 1).unwrap_or(0);
        (index, Entry { active, kind, first, sectors })
    });
    vec![(CODE, record(disk, &entries.collect::<Vec<_>>()))]
}
