//! `vbd grow` without a server: file, partition and filesystem together, in place.
//!
//! Each step leaves an image that is right: a larger file, then a larger partition in it, then a larger filesystem in that.
//! Cut between them, the same command goes on.

use vbd_ext4::edit::{Editor, Timestamp};
use vbd_image::partition::{ALIGNMENT, Format, Table};

use super::device::write_table;
use super::{Disk, Volume};
use crate::error::Context;
use crate::{Error, Result, Time};

/// What became larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Larger {
    /// Bytes of the file before.
    pub before: u64,
    /// Bytes of it now.
    pub size: u64,
    /// The filesystem that grew, and its bytes before and now.
    pub filesystem: Option<(Volume, u64, u64)>,
}

/// Makes an image `size` bytes large, its last partition and the filesystem in it with it. What cannot be is refused
/// before the first write.
///
/// # Errors
///
/// A smaller size; a filesystem or a table that cannot be changed; those of writing.
pub fn grow(disk: &Disk, size: u64, now: Time) -> Result<Larger> {
    let before = disk.size;
    let Plan { table, volume } = plan(disk, size, now)?;
    if size > before {
        disk.device.grow(size).and_then(|()| disk.device.sync()).at("make larger", &disk.path)?;
    }
    if let Some((table, _)) = &table {
        write_table(&*disk.device, table, size).at("write the partition table of", &disk.path)?;
    }
    let Some(volume) = volume else { return Ok(Larger { before, size, filesystem: None }) };
    let editor = Editor::open(disk.part(&volume), timestamp(now));
    let editor = editor.map_err(|error| failed(disk, &volume, error))?;
    let superblock = editor.filesystem().superblock();
    let end = superblock.blocks() * u64::from(editor.filesystem().block_size());
    // A partition has what was there before, such as the table's old backup.
    let behind = volume.start + end..volume.start + volume.size;
    disk.device.zero(behind).at("make zeros in", &disk.path)?;
    let grown = editor.grow(volume.size).map_err(|error| failed(disk, &volume, error))?;
    Ok(Larger { before, size, filesystem: Some((volume, grown.before, grown.after)) })
}

/// Whether [`grow`] can be, for those who make the disk itself larger by other means, and then call it.
///
/// # Errors
///
/// Those that it has before its first write.
pub fn may_grow(disk: &Disk, size: u64, now: Time) -> Result<()> {
    plan(disk, size, now).map(|_| ())
}

/// What is to be.
struct Plan {
    /// The table, and the number of its last partition.
    table: Option<(Table, Option<u32>)>,
    /// The filesystem that grows, as large as it may become.
    volume: Option<Volume>,
}

fn timestamp(now: Time) -> Timestamp {
    Timestamp { seconds: now.seconds, nanoseconds: now.nanoseconds }
}

fn failed(disk: &Disk, volume: &Volume, error: vbd_ext4::edit::EditError) -> Error {
    Error::Inside(format!("{}: {error}; --file-only leaves the filesystem as it is", disk.name(volume)))
}

/// Asks everything that can refuse.
fn plan(disk: &Disk, size: u64, now: Time) -> Result<Plan> {
    let before = disk.size;
    if size < before {
        return Err(Error::Invalid(format!(
            "{}: it has {before} bytes; `vbd shrink` makes it smaller",
            disk.path.display()
        )));
    }
    let table = disk.table.as_ref().map(|table| larger_table(disk, table, size)).transpose()?;
    let volume = match &table {
        None => disk.volumes.first().map(|volume| Volume { size, ..*volume }),
        Some((table, number)) => {
            disk.volumes.iter().find(|volume| volume.partition == *number && number.is_some()).and_then(
                |volume| {
                    table.partition(volume.partition?).map(|found| Volume { size: found.size, ..*volume })
                },
            )
        }
    };
    if let Some(volume) = &volume {
        let old = disk.volumes.iter().find(|old| old.start == volume.start).unwrap_or(volume);
        let editor =
            Editor::open(disk.part(old), timestamp(now)).map_err(|error| failed(disk, volume, error))?;
        editor.may_grow(volume.size).map_err(|error| failed(disk, volume, error))?;
    }
    Ok(Plan { table, volume })
}

/// The table for the larger disk, with its last partition as large as can be, and the number of that.
fn larger_table(disk: &Disk, table: &Table, size: u64) -> Result<(Table, Option<u32>)> {
    let refuse = |why: String| Err(Error::Inside(format!("{}: {why}", disk.path.display())));
    let moved = "has its backup before the disk's end: the disk has grown";
    if let Some(problem) = table.problems.iter().find(|problem| **problem != moved) {
        return refuse(format!(
            "the partition table {problem}; repair it first, or leave it with --file-only"
        ));
    }
    let mut table = table.clone();
    table.problems.clear();
    let Some(last) = table.partitions.iter().filter(|p| !p.kind.is_extended()).max_by_key(|p| p.end()) else {
        return Ok((table, None));
    };
    let number = last.number;
    let end = room(&table, size);
    if let Some(last) = table.partitions.iter_mut().find(|partition| partition.number == number) {
        let end = end.max(last.end());
        last.size = end - last.start;
    }
    if let Err(misfit) = table.check(size) {
        return refuse(format!("its partition table cannot be changed: {misfit}; --file-only leaves it"));
    }
    Ok((table, Some(number)))
}

/// Where the last partition of a disk may end.
pub(super) fn room(table: &Table, size: u64) -> u64 {
    let end = match table.format {
        // The copies of entries and header at the end, entries for at least 128 partitions.
        Format::Gpt(_) => {
            let highest =
                table.partitions.iter().map(|partition| partition.number).max().unwrap_or(0).max(128);
            size.saturating_sub((u64::from(highest) * 128).next_multiple_of(table.sector) + table.sector)
        }
        Format::Mbr(_) => size.min(u64::from(u32::MAX) * table.sector),
    };
    end / ALIGNMENT * ALIGNMENT
}
