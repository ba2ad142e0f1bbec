//! `vbd check`: image file, partition table and filesystems together.

use std::process::Command;

use vbd_ext4::check::Report;
use vbd_ext4::read::Error as ReadError;

use super::{Disk, Volume};
use crate::error::Context;
use crate::process::{Running, e2fsprogs};
use crate::{Error, Progress, Result, Step};

/// What was found in an image.
#[derive(Debug, Default)]
pub struct Checked {
    /// What is wrong with the file and the table: whole sentences without their end.
    pub problems: Vec<String>,
    /// The filesystems of the ext family.
    pub volumes: Vec<(Volume, Report)>,
    /// What was not looked at, and why.
    pub notes: Vec<String>,
}

impl Checked {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.problems.is_empty() && self.volumes.iter().all(|(_, report)| report.is_clean())
    }
}

/// Looks at everything in an image; nothing is written.
///
/// # Errors
///
/// The image cannot be read; what is wrong with it is no error.
pub fn check(disk: &Disk, progress: &mut dyn Progress) -> Result<Checked> {
    let mut checked = Checked::default();
    if let Some(table) = &disk.table {
        table_problems(disk, table, &mut checked);
    } else if disk.volumes.is_empty() {
        let contents = disk.contents();
        let found =
            contents.ok().and_then(|contents| contents.filesystem).map(|found| found.kind.to_string());
        match found {
            Some(kind) => checked.notes.push(format!("it has {kind}, which is not looked at")),
            None => {
                let nothing = "it has no partition table, and no filesystem that is known";
                // A file that is no disk at all would look like that; an image of a format is one.
                let plain = disk.device.plain().is_some();
                let list = if plain { &mut checked.problems } else { &mut checked.notes };
                list.push(nothing.to_owned());
            }
        }
    }
    for volume in &disk.volumes {
        progress.step(Step::Read, None);
        let report = vbd_ext4::check::check(disk.part(volume), &mut |_, _| progress.advance(0));
        let report = match report {
            Ok(report) => report,
            Err(ReadError::Unsupported { feature, .. }) if disk.device.plain().is_none() => {
                let what = "which only e2fsck knows, and that reads raw images alone: not looked at";
                checked.notes.push(format!("{} uses {feature}, {what}", disk.name(volume)));
                continue;
            }
            Err(ReadError::Unsupported { feature, .. }) => {
                checked.notes.push(format!("{} uses {feature}: e2fsck looked at it", disk.name(volume)));
                by_e2fsck(disk, volume, progress)?
            }
            Err(error) => return Err(Error::Inside(format!("{}: {error}", disk.name(volume)))),
        };
        checked.volumes.push((*volume, report));
    }
    Ok(checked)
}

fn table_problems(disk: &Disk, table: &vbd_image::partition::Table, checked: &mut Checked) {
    checked.problems.extend(table.problems.iter().map(|problem| format!("the partition table {problem}")));
    for partition in &table.partitions {
        if !partition.fits(disk.size) {
            let (number, end, size) = (partition.number, partition.end(), disk.size);
            checked.problems.push(format!("partition {number} ends at byte {end}, and the disk at {size}"));
        }
    }
    let mut sorted: Vec<_> = table.partitions.iter().filter(|p| !p.kind.is_extended()).collect();
    sorted.sort_by_key(|partition| partition.start);
    for pair in sorted.windows(2) {
        if pair[1].start < pair[0].end() {
            let (first, second) = (pair[0].number, pair[1].number);
            checked.problems.push(format!("partitions {first} and {second} overlap"));
        }
    }
    for partition in &table.partitions {
        let looked_at = disk.volumes.iter().any(|volume| volume.partition == Some(partition.number));
        if !looked_at && !partition.kind.is_extended() {
            let (number, kind) = (partition.number, partition.kind);
            checked
                .notes
                .push(format!("partition {number} ({kind}) has no ext2, ext3 or ext4: not looked at"));
        }
    }
}

/// What e2fsck finds, where this crate's checker knows a feature not.
fn by_e2fsck(disk: &Disk, volume: &Volume, progress: &mut dyn Progress) -> Result<Report> {
    let mut report = Report::default();
    match run(e2fsprogs("e2fsck").arg("-fn").arg(disk.argument(volume)?), progress)? {
        0 => {}
        _ => {
            report.count = 1;
            report.problems.push(vbd_ext4::check::Problem {
                place: "the filesystem".to_owned(),
                reason: "e2fsck finds problems; run it to see them".to_owned(),
            });
        }
    }
    Ok(report)
}

/// Repairs each filesystem with e2fsck, which answers its own questions with yes. It is not crash-safe: what it is cut in
/// the middle of, it takes up again.
///
/// # Errors
///
/// The disk is no raw image; e2fsck is missing or cannot repair it. The partition table is not repaired.
pub fn repair(disk: &Disk, progress: &mut dyn Progress) -> Result<()> {
    for volume in &disk.volumes {
        progress.step(Step::Write, None);
        let code = run(e2fsprogs("e2fsck").arg("-fy").arg(disk.argument(volume)?), progress)?;
        // 1: repaired; 2: repaired, and a mounted one would want a new start.
        if code > 3 {
            return Err(Error::Inside(format!(
                "{}: e2fsck could not repair it (exit code {code})",
                disk.name(volume)
            )));
        }
    }
    disk.plain()?.sync_all().at("flush", &disk.path)
}

/// Runs a program to its end; its exit code.
pub(super) fn run(command: &mut Command, progress: &mut dyn Progress) -> Result<i32> {
    Running::start(command, "e2fsprogs")?.code(progress)
}
