//! Partition tables, as [`crate::partition`] reads them, for people to read.

use std::io;

use serde::Serialize;

use super::Filesystem;
use super::head::plain;
use crate::partition::{self, Format};
use crate::read_at::ReadAt;

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
    /// What is wrong with it, as ends of a sentence that begins with "the table".
    pub problems: Vec<&'static str>,
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
    /// What `root=PARTUUID=` calls it.
    pub partuuid: Option<String>,
    /// Whether its end is within the disk.
    pub fits: bool,
    /// What is in it.
    pub filesystem: Option<Filesystem>,
}

/// Find the table of a disk of `size` bytes.
pub(super) fn find<S: ReadAt + ?Sized>(source: &S, size: u64) -> io::Result<Option<Table>> {
    let Some(found) = partition::read(source, size)? else { return Ok(None) };
    let (kind, uuid) = match found.format {
        Format::Gpt(disk) => (TableKind::Gpt, (!disk.is_nil()).then(|| disk.to_string())),
        Format::Mbr(disk) => (TableKind::Mbr, (disk != 0).then(|| format!("{disk:08x}"))),
    };
    let partitions = found.partitions.iter().map(|partition| Partition {
        number: partition.number,
        start: partition.start,
        size: partition.size,
        kind: partition.kind.to_string(),
        name: plain(&partition.name),
        partuuid: found.partuuid(partition),
        fits: partition.fits(size),
        filesystem: None,
    });
    let partitions = partitions.collect();
    Ok(Some(Table { kind, valid: found.valid, problems: found.problems, uuid, partitions }))
}
