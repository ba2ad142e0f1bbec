//! `vbd grow` without a server: file, partition and filesystem together, in place.
//!
//! Each step leaves an image that is right: a larger file, then a larger partition in it, then a larger filesystem in that.
//! Cut between them, the same command goes on.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use vbd_ext4::edit::{Editor, Timestamp};
use vbd_image::partition::{ALIGNMENT, Format, Table};

use super::{Disk, Volume};
use crate::error::Context;
use crate::{Error, Result, Time};

/// Bytes that are made zeros at once.
const PIECE: u64 = 1 << 30;

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
    let now = Timestamp { seconds: now.seconds, nanoseconds: now.nanoseconds };
    let failed = |volume: &Volume, error: vbd_ext4::edit::EditError| {
        Error::Inside(format!("{}: {error}; --file-only leaves the filesystem as it is", disk.name(volume)))
    };
    // Everything that can refuse is asked first.
    if let Some(volume) = &volume {
        let old = disk.volumes.iter().find(|old| old.start == volume.start).unwrap_or(volume);
        let editor = Editor::open(disk.part(old)?, now).map_err(|error| failed(volume, error))?;
        editor.may_grow(volume.size).map_err(|error| failed(volume, error))?;
    }

    if size > before {
        disk.file.set_len(size).and_then(|()| disk.file.sync_all()).at("make larger", &disk.path)?;
    }
    if let Some((table, _)) = &table {
        table.write(&disk.file, size).at("write the partition table of", &disk.path)?;
    }
    let Some(volume) = volume else { return Ok(Larger { before, size, filesystem: None }) };
    let editor = Editor::open(disk.part(&volume)?, now).map_err(|error| failed(&volume, error))?;
    let superblock = editor.filesystem().superblock();
    let end = superblock.blocks() * u64::from(editor.filesystem().block_size());
    // A partition has what was there before, such as the table's old backup.
    zeros(&disk.file, &disk.path, volume.start + end, volume.start + volume.size)?;
    let grown = editor.grow(volume.size).map_err(|error| failed(&volume, error))?;
    Ok(Larger { before, size, filesystem: Some((volume, grown.before, grown.after)) })
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

/// Makes a range read as zeros, where it has data.
pub(super) fn zeros(file: &File, path: &Path, start: u64, end: u64) -> Result<()> {
    let mut at = start;
    while at < end {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) if data < end => data.max(at),
            Ok(_) | Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error).at("look for data in", path),
        };
        let hole = seek(file, SeekFrom::Hole(data)).at("look for holes in", path)?;
        let until = hole.clamp(data + 1, end).min(data + PIECE);
        match fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, data, until - data) {
            Ok(()) => {}
            Err(Errno::INTR) => continue,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let empty = vec![0; 1 << 20];
                let mut from = data;
                while from < until {
                    let length = usize::try_from(until - from).unwrap_or(usize::MAX).min(empty.len());
                    file.write_all_at(&empty[..length], from).at("write to", path)?;
                    from += length as u64;
                }
            }
            Err(error) => return Err(error).at("make a hole in", path),
        }
        at = until;
    }
    Ok(())
}
