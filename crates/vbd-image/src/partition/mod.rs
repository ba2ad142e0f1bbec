//! Partition tables: GPT (UEFI specification 2.10, 5.3) and MBR (5.2, with logical partitions), read and written.
//!
//! What a table says is hostile until checked: reading never fails for it, needs a bounded amount of memory, and gives
//! partitions whose numbers fit; whether they lie on the disk is for the caller to ask ([`Partition::fits`]).
//! [`Table::check`] says whether a table may be written.

mod bytes;
mod check;
mod gpt;
mod guid;
pub mod kind;
mod layout;
mod mbr;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::read_at::ReadAt;

pub use check::Misfit;
pub use guid::{Guid, NoGuid};
pub use kind::Kind;
pub use layout::{ALIGNMENT, Layout, Wish};

/// What kind of table it is, and what names the disk in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Of UEFI, with the disk's GUID.
    Gpt(Guid),
    /// In the first sector, of PCs before UEFI, with the disk's number (0: none).
    Mbr(u32),
}

/// A partition table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its kind and the disk's name.
    pub format: Format,
    /// Bytes in the sectors that it counts in: 512 or 4096.
    pub sector: u64,
    /// The partitions, by number.
    pub partitions: Vec<Partition>,
    /// What is wrong with the table as it was found: ends of a sentence that begins with "the table".
    pub problems: Vec<&'static str>,
    /// Whether a copy of the table with right checksums was found (an MBR has none and is taken as it is).
    pub valid: bool,
}

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, counted from 1, as in `/dev/sda1`. In an MBR logical ones begin at 5.
    pub number: u32,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Its size in bytes; start and size together fit into 64 bits.
    pub size: u64,
    /// What it is for.
    pub kind: Kind,
    /// Its own GUID, in a GPT.
    pub uuid: Option<Guid>,
    /// Its name, in a GPT: at most 36 units of UTF-16. Hostile: it can hold any character.
    pub name: String,
    /// Attribute bits of a GPT; bit 2 means that old BIOSes start from it, as the flag of an MBR does.
    pub attributes: u64,
}

/// Attribute (GPT) of a partition that old BIOSes start from; stands for the active flag of an MBR too.
pub const BOOTABLE: u64 = 1 << 2;
/// Attribute (GPT) of a partition whose filesystem is grown to fill it when it is mounted (discoverable partitions
/// specification, "GrowFileSystem").
pub const GROW_FILESYSTEM: u64 = 1 << 59;

impl Partition {
    /// Where it ends, in bytes.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }

    /// Whether its end is on a disk of `size` bytes.
    pub fn fits(&self, size: u64) -> bool {
        self.end() <= size
    }
}

impl Table {
    /// A table without partitions.
    pub fn new(format: Format, sector: u64) -> Table {
        Table { format, sector, partitions: Vec::new(), problems: Vec::new(), valid: true }
    }

    /// The partition of this number.
    pub fn partition(&self, number: u32) -> Option<&Partition> {
        self.partitions.iter().find(|partition| partition.number == number)
    }

    /// What the kernel calls a partition in `root=PARTUUID=…`: the GUID, or the disk's number and the partition's.
    pub fn partuuid(&self, partition: &Partition) -> Option<String> {
        match (self.format, partition.uuid) {
            (Format::Gpt(_), uuid) => uuid.map(|uuid| uuid.to_string()),
            (Format::Mbr(0), _) => None,
            (Format::Mbr(disk), _) => Some(format!("{disk:08x}-{:02x}", partition.number)),
        }
    }

    /// The bytes of the table for a disk of `size` bytes, with their offsets, in the order in which they are to be
    /// written: the backup first, what makes the table valid last. Of an MBR the boot code in front is not touched.
    ///
    /// # Errors
    ///
    /// What [`Table::check`] finds.
    pub fn encode(&self, size: u64) -> Result<Vec<(u64, Vec<u8>)>, Misfit> {
        self.check(size)?;
        Ok(match self.format {
            Format::Gpt(disk) => gpt::encode(self, disk, size),
            Format::Mbr(disk) => mbr::encode(self, disk),
        })
    }

    /// Writes the table to a disk of `size` bytes, in place of what is there. A backup is made durable before the
    /// table proper is touched, so that after a crash one of the two is whole.
    ///
    /// # Errors
    ///
    /// What [`Table::check`] finds, as [`io::ErrorKind::InvalidInput`]; those of writing.
    pub fn write(&self, file: &File, size: u64) -> io::Result<()> {
        let parts =
            self.encode(size).map_err(|misfit| io::Error::new(io::ErrorKind::InvalidInput, misfit))?;
        for (offset, bytes) in parts {
            file.write_all_at(&bytes, offset)?;
            file.sync_data()?;
        }
        Ok(())
    }
}

/// Reads the table of a disk of `size` bytes, if it has one. A boot sector of a filesystem can look like an MBR.
///
/// # Errors
///
/// Those of reading; never what is read.
pub fn read<S: ReadAt + ?Sized>(source: &S, size: u64) -> io::Result<Option<Table>> {
    let record = mbr::Record::read(source, 0)?;
    // As the kernel has it: what the first sector protects or does not protect decides. Without any table in the
    // first sector a GPT is still found, for it is there to be repaired.
    let legacy = record.as_ref().filter(|record| record.is_table(size));
    if let Some(record) = legacy
        && !record.protects()
    {
        return mbr::read(source, record, size).map(Some);
    }
    if let Some(mut table) = gpt::read(source, size)? {
        if legacy.is_none() {
            table.problems.push("has no protective MBR in front of it");
        }
        return Ok(Some(table));
    }
    legacy.map(|record| mbr::read(source, record, size)).transpose()
}

/// Reads the table of a disk whose bytes these are, writes what it read anew, and reads that. For fuzzing: it must end
/// without a panic, and a table that may be written reads as it was.
///
/// # Panics
///
/// When it does not.
pub fn fuzz(bytes: &[u8]) {
    let size = bytes.len() as u64;
    let Ok(Some(table)) = read(bytes, size) else { return };
    let Ok(parts) = table.encode(size) else { return };
    let mut copy = bytes.to_vec();
    for (offset, part) in parts {
        let offset = usize::try_from(offset).expect("in the disk, which is in memory");
        copy[offset..offset + part.len()].copy_from_slice(&part);
    }
    let again = read(&copy[..], size).expect("memory can be read").expect("it was written");
    assert_eq!((&again.partitions, again.format), (&table.partitions, table.format));
    assert_eq!((again.valid, &again.problems[..]), (true, &[][..]));
}
