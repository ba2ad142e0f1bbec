//! `vbd compact`: what the filesystems in an image hold free becomes holes of the file, or is given up in its format.

use std::io;
use std::ops::Range;

use vbd_ext4::format::superblock::incompat;
use vbd_ext4::read::{Filesystem, Options};

use super::{Disk, Volume};
use crate::error::Context;
use crate::{Error, Progress, Result, Step};

/// Bytes that one call punches: the kernel holds the file's lock meanwhile, and a wish to stop is looked at between.
const PIECE: u64 = 1 << 30;

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Bytes of storage that were given back.
    pub punched: u64,
    /// Bytes of storage that the file had before.
    pub before: u64,
    /// Bytes of storage that it has now.
    pub after: u64,
}

/// Gives space back where the filesystems of an image use nothing. Everything is checked before the first hole: where the
/// bitmaps may be wrong nothing is touched.
///
/// # Errors
///
/// A filesystem that is damaged, was not unmounted, or cannot be looked at; a file whose filesystem has no holes.
pub fn compact(disk: &Disk, progress: &mut dyn Progress) -> Result<Compacted> {
    let allocated = || disk.device.allocated().at("look at", &disk.path);
    if disk.volumes.is_empty() {
        let reason = "it has no ext2, ext3 or ext4 filesystem, whose free blocks alone are known";
        return Err(Error::Inside(format!("{}: {reason}", disk.path.display())));
    }
    let before = allocated()?;
    let mut free = Vec::new();
    for volume in &disk.volumes {
        free.extend(unused(disk, volume, progress)?);
    }
    let total = free.iter().map(|range| range.end - range.start).sum();
    progress.step(Step::Write, Some(total));
    // Parts of the storage's blocks would only be written over with zeros.
    let block = disk.device.unit().at("look at", &disk.path)?;
    for range in free {
        let inner = range.start.next_multiple_of(block)..range.end / block * block;
        give_back(disk, &inner, progress)?;
        progress.advance(range.end - range.start);
    }
    progress.step(Step::Sync, None);
    disk.device.sync().at("flush", &disk.path)?;
    let after = allocated()?;
    Ok(Compacted { punched: before.saturating_sub(after), before, after })
}

/// The bytes of the file that a filesystem has and does not use.
fn unused(disk: &Disk, volume: &Volume, progress: &mut dyn Progress) -> Result<Vec<Range<u64>>> {
    let name = disk.name(volume);
    let failed = |error: vbd_ext4::read::Error| Error::Inside(format!("{name}: {error}"));
    let filesystem =
        Filesystem::open(disk.part(volume), Options { verify: false, replay: false }).map_err(failed)?;
    if filesystem.superblock().has_incompat(incompat::RECOVER) {
        let remedy = "its journal has to be replayed first: `vbd check --repair`, or a mount";
        return Err(Error::Inside(format!("{name}: it was not unmounted; {remedy}")));
    }
    drop(filesystem);
    progress.step(Step::Read, None);
    let (report, ranges) =
        vbd_ext4::check::unused(disk.part(volume), &mut |_, _| progress.advance(0)).map_err(failed)?;
    if !report.is_clean() {
        let first = report.problems.first().map(|problem| format!(" ({problem})")).unwrap_or_default();
        return Err(Error::Inside(format!(
            "{name}: it is damaged{first}, so what is free cannot be known; see `vbd check`"
        )));
    }
    Ok(ranges.into_iter().map(|range| volume.start + range.start..volume.start + range.end).collect())
}

/// Gives the space of a range back.
fn give_back(disk: &Disk, range: &Range<u64>, progress: &mut dyn Progress) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min(at + PIECE);
        match disk.device.discard(at..end) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let reason = match disk.device.plain() {
                    Some(_) => "its filesystem knows no holes",
                    None => "no space can be given back in images of its format",
                };
                return Err(Error::Inside(format!("{}: {reason}", disk.path.display())));
            }
            other => other.at("make a hole in", &disk.path)?,
        }
        at = end;
        if progress.cancelled() {
            // What is a hole by now is one that may be.
            return Err(Error::Stopped);
        }
    }
    Ok(())
}
