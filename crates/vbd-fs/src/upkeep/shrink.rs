//! `vbd shrink`: an image made smaller, filesystem, partition and file together.
//!
//! That is done in place where it can be: the filesystem through its journal, then the partition table, then the end of the
//! file; cut between them, the same command goes on. For what the journal cannot do there is resize2fs, which is not
//! crash-safe: it works on a copy beside the image, which takes the image's place when all is done. Where the filesystem
//! below shares blocks the copy costs nothing.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;
use vbd_image::size::Human;

use super::check::run;
use super::copy::{copy, range};
use super::device::{Device, Plain};
use super::smaller::in_place;
use super::{Disk, Volume};
use crate::digest::hex;
use crate::error::Context;
use crate::process::e2fsprogs;
use crate::{Error, Progress, Result, Step, Time};

/// Bytes of an image's name that leave room in a name for what a shrink adds.
const LONGEST: usize = 200;

/// What became smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Smaller {
    /// Bytes of the file before.
    pub before: u64,
    /// Bytes of it now.
    pub size: u64,
}

/// Makes an image `size` bytes large. Where that takes a copy, which is told, it is another file afterwards: hard links to
/// the old one stay with the old one.
///
/// # Errors
///
/// A size that is larger, or below what is used; a damaged filesystem; resize2fs missing or failing. The image has then
/// what it had, and is as large as it was.
pub fn shrink(disk: Disk, size: u64, now: Time, progress: &mut dyn Progress) -> Result<Smaller> {
    let refuse = |why: String| Err(Error::Inside(format!("{}: {why}", disk.path.display())));
    let before = disk.size;
    if size >= before {
        return refuse(format!(
            "it has {} ({before} bytes) already; `vbd grow` makes it larger",
            Human(before)
        ));
    }
    if disk.table.is_none() && disk.volumes.is_empty() {
        return refuse(
            "no ext2, ext3 or ext4 filesystem is in it, and others are not made smaller".to_owned(),
        );
    }
    let table = match &disk.table {
        None => None,
        Some(table) => {
            let mut table = table.clone();
            // What a shrink leaves that was cut between the table and the end of the file.
            let moved = "has its backup before the disk's end: the disk has grown";
            let problem = table.problems.iter().find(|problem| **problem != moved).copied();
            table.problems.retain(|problem| *problem != moved);
            if let Some(problem) = problem {
                return refuse(format!("the partition table {problem}; repair it first"));
            }
            let end = super::grow::room(&table, size);
            let (last, number) = match table.partitions.iter_mut().max_by_key(|partition| partition.end()) {
                Some(last) if last.end() > end => {
                    if last.start >= end {
                        return refuse(format!("partition {} begins behind its new end", last.number));
                    }
                    last.size = end - last.start;
                    (Some(last.size), last.number)
                }
                _ => (None, 0),
            };
            if let Err(misfit) = table.check(size) {
                return refuse(format!("its partition table cannot be changed: {misfit}"));
            }
            if last.is_some() && !disk.volumes.iter().any(|volume| volume.partition == Some(number)) {
                return refuse(format!(
                    "partition {number} has no ext2, ext3 or ext4 filesystem, and would be cut off"
                ));
            }
            Some((table, last, number))
        }
    };
    let volume = match &table {
        None => disk.volumes.first().map(|volume| (*volume, size)),
        Some((_, None, _)) => None,
        Some((_, Some(size), number)) => disk
            .volumes
            .iter()
            .find(|volume| volume.partition == Some(*number))
            .map(|volume| (*volume, *size)),
    };
    if let Some((volume, size)) = &volume {
        enough(&disk, volume, *size)?;
    }
    let done = match &volume {
        Some((volume, size)) => in_place(&disk, volume, *size, now, progress)?,
        None => true,
    };
    if done {
        if let Some((table, ..)) = &table {
            table.write(disk.plain()?, size).at("write the partition table of", &disk.path)?;
        }
        let file = disk.plain()?;
        file.set_len(size).and_then(|()| file.sync_all()).at("make smaller", &disk.path)?;
        return Ok(Smaller { before, size });
    }

    let directory = disk.path.canonicalize().at("find", &disk.path)?;
    let target = directory.clone();
    let directory = directory.parent().unwrap_or(Path::new("/"));
    let beside = Beside::new(&target, directory, progress)?;
    let new = beside.image()?;
    copy(disk.plain()?, disk.size, &disk.path, new.as_file(), None, progress)?;
    progress.step(Step::Write, None);
    match &volume {
        Some((volume, size)) if volume.start == 0 => resize(&disk, new.path(), volume, *size, progress)?,
        Some((volume, size)) => in_a_file(&disk, new.as_file(), &beside, volume, *size, progress)?,
        None => {}
    }
    new.as_file().set_len(size).at("make smaller", new.path())?;
    if let Some((table, ..)) = &table {
        table.write(new.as_file(), size).at("write the partition table of", new.path())?;
    }
    let metadata = disk.plain()?.metadata().at("look at", &disk.path)?;
    new.as_file().set_permissions(metadata.permissions()).at("set the mode of", new.path())?;
    std::os::unix::fs::fchown(new.as_file(), Some(metadata.uid()), Some(metadata.gid()))
        .at("set the owner of", new.path())?;
    new.as_file().sync_all().at("flush", new.path())?;
    new.persist(&target)
        .map_err(|error| Error::io(format!("cannot replace {}", target.display()), error.error))?;
    File::open(directory).and_then(|directory| directory.sync_all()).at("flush", directory)?;
    Ok(Smaller { before, size })
}

/// The files that a shrink makes beside the image: the new one, and one for a filesystem in a partition of it.
struct Beside<'a> {
    directory: &'a Path,
    names: [OsString; 2],
}

impl<'a> Beside<'a> {
    /// Their names go by the image's. What has them was left by a shrink that was killed, for only who has the image's lease
    /// shrinks it: it is removed.
    fn new(target: &Path, directory: &'a Path, progress: &mut dyn Progress) -> Result<Beside<'a>> {
        let name = target.file_name().unwrap_or_default().as_bytes();
        let name =
            if name.len() <= LONGEST { name.to_vec() } else { hex(&Sha256::digest(name)).into_bytes() };
        let full = |end: &[u8]| OsString::from_vec([b".vbd-".as_slice(), name.as_slice(), end].concat());
        let names = [full(b".shrunk"), full(b".part.shrunk")];
        for left in names.iter().map(|name| directory.join(name)) {
            match std::fs::remove_file(&left) {
                Ok(()) => {
                    let what = "which a shrink left that was killed";
                    progress.message(&format!("removed {}, {what}", left.display()));
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).at("remove what a killed shrink left,", &left),
            }
        }
        Ok(Beside { directory, names })
    }

    fn make(&self, name: &OsStr) -> Result<NamedTempFile> {
        let new = tempfile::Builder::new().prefix(name).rand_bytes(0).tempfile_in(self.directory);
        new.at("make", &self.directory.join(name))
    }

    fn image(&self) -> Result<NamedTempFile> {
        self.make(&self.names[0])
    }

    fn partition(&self) -> Result<NamedTempFile> {
        self.make(&self.names[1])
    }
}

/// Refuses a size below what is used: resize2fs would refuse or fail later, and say less.
fn enough(disk: &Disk, volume: &Volume, size: u64) -> Result<()> {
    let failed = |error: vbd_ext4::read::Error| Error::Inside(format!("{}: {error}", disk.name(volume)));
    let report = vbd_ext4::check::check(disk.part(volume), &mut |_, _| {}).map_err(failed)?;
    if !report.is_clean() {
        return Err(Error::Inside(format!("{}: it is damaged; see `vbd check`", disk.name(volume))));
    }
    let filesystem = vbd_ext4::read::Filesystem::open(disk.part(volume), vbd_ext4::read::Options::default());
    let filesystem = filesystem.map_err(failed)?;
    let usage = filesystem.usage().map_err(failed)?;
    let used = usage.size - usage.free;
    // Bitmaps and tables of groups that go are part of what is used now.
    let groups = usage.size.div_ceil(128 << 20);
    let tables = usage.inodes * u64::from(filesystem.superblock().inode_size.get()) + groups * 8192;
    let least = used.saturating_sub(tables.min(used));
    if size < least {
        let name = disk.name(volume);
        return Err(Error::Inside(format!(
            "{name}: {} ({used} bytes) of it are used, and it was to have {} ({size} bytes)",
            Human(used),
            Human(size)
        )));
    }
    Ok(())
}

/// Shrinks a filesystem in a partition: in a file of its own, for resize2fs cuts the file that it works on to the size of the
/// filesystem, wherever in the file that begins.
fn in_a_file(
    disk: &Disk,
    new: &File,
    beside: &Beside<'_>,
    volume: &Volume,
    size: u64,
    progress: &mut dyn Progress,
) -> Result<()> {
    let alone = beside.partition()?;
    alone.as_file().set_len(volume.size).at("set the size of", alone.path())?;
    let whole = (volume.start, volume.start + volume.size);
    let interrupted = |done: bool| if done { Ok(()) } else { Err(Error::Interrupted) };
    interrupted(range(disk.plain()?, whole, alone.as_file(), 0, progress)?)?;
    let own = Volume { start: 0, ..*volume };
    resize(disk, alone.path(), &own, size, progress)?;
    // resize2fs may have put another file in its place, or cut this one.
    let shrunk = File::open(alone.path()).at("open", alone.path())?;
    let length = shrunk.metadata().at("look at", alone.path())?.len().min(size);
    Plain::new(new.try_clone().at("open once more", &disk.path)?, u64::MAX, None)
        .zero(whole.0..whole.1)
        .at("make zeros in", &disk.path)?;
    interrupted(range(&shrunk, (0, length), new, volume.start, progress)?)
}

fn resize(disk: &Disk, copy: &Path, volume: &Volume, size: u64, progress: &mut dyn Progress) -> Result<()> {
    let argument = super::disk::argument(copy, volume);
    let name = disk.name(volume);
    // resize2fs wants one that was checked just now.
    let code = run(e2fsprogs("e2fsck").arg("-fp").arg(&argument), progress)?;
    if code > 1 {
        return Err(Error::Inside(format!("{name}: e2fsck could not check it (exit code {code})")));
    }
    let mut command = e2fsprogs("resize2fs");
    let running =
        crate::process::Running::start(command.arg(&argument).arg(format!("{}K", size / 1024)), "e2fsprogs")?;
    running.wait(progress, |_| {})?;
    Ok(())
}
