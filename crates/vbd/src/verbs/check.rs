//! `vbd check`.

use std::path::PathBuf;

use serde::Serialize;
use vbd_fs::upkeep::{self, Checked, Disk};
use vbd_image::lease::Mode;

use crate::output::{print, print_json};
use crate::progress::{Bar, stop_on_signals};
use crate::{Exit, UsageError};

/// Check an image: the partition table, and everything in its ext2, ext3 and ext4 filesystems.
///
/// Exit code 0: nothing is wrong; 1: it is damaged; 2: it could not be checked as asked.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file or block device
    image: PathBuf,
    /// Repair the filesystems with e2fsck, and check again
    #[arg(long)]
    repair: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was found, for programs.
#[derive(Serialize)]
struct Object {
    clean: bool,
    problems: Vec<String>,
    notes: Vec<String>,
    filesystems: Vec<FilesystemObject>,
}

#[derive(Serialize)]
struct FilesystemObject {
    partition: Option<u32>,
    clean: bool,
    complete: bool,
    count: u64,
    problems: Vec<ProblemObject>,
    notes: Vec<String>,
    inodes: u64,
    directories: u64,
    blocks: u64,
}

#[derive(Serialize)]
struct ProblemObject {
    place: String,
    reason: String,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mode = if args.repair { Mode::Write } else { Mode::Read };
    // What cannot be looked at is not damaged: the exit code says which it is.
    let unusable = |error: vbd_fs::Error| UsageError(error.to_string());
    let mut bar = Bar::new(stop_on_signals());
    let mut disk = Disk::open(&args.image, mode).map_err(unusable)?;
    let mut checked = upkeep::check(&disk, &mut bar).map_err(unusable)?;
    let unclean = checked.volumes.iter().any(|(_, report)| !report.is_clean() || !report.notes.is_empty());
    if args.repair && unclean {
        upkeep::repair(&disk, &mut bar)?;
        drop(disk);
        disk = Disk::open(&args.image, Mode::Read)?;
        checked = upkeep::check(&disk, &mut bar)?;
    }
    bar.clear();
    drop(disk);
    if args.json {
        print_json(&object(&checked))?;
    } else {
        print(&text(&args.image.display().to_string(), &checked))?;
    }
    if checked.is_clean() { Ok(()) } else { Err(Exit(1).into()) }
}

fn object(checked: &Checked) -> Object {
    let filesystems = checked.volumes.iter().map(|(volume, report)| FilesystemObject {
        partition: volume.partition,
        clean: report.is_clean(),
        complete: !report.incomplete,
        count: report.count,
        problems: report
            .problems
            .iter()
            .map(|problem| ProblemObject { place: problem.place.clone(), reason: problem.reason.clone() })
            .collect(),
        notes: report.notes.clone(),
        inodes: report.inodes,
        directories: report.directories,
        blocks: report.blocks,
    });
    Object {
        clean: checked.is_clean(),
        problems: checked.problems.clone(),
        notes: checked.notes.clone(),
        filesystems: filesystems.collect(),
    }
}

fn text(image: &str, checked: &Checked) -> String {
    let mut text = String::new();
    let mut line = |name: &str, what: &str| {
        text += &format!("{name}: {}\n", what.replace(char::is_control, "?"));
    };
    for problem in checked.problems.iter().chain(&checked.notes) {
        line(image, problem);
    }
    for (volume, report) in &checked.volumes {
        let name = match volume.partition {
            Some(number) => format!("{image}, partition {number}"),
            None => image.to_owned(),
        };
        for problem in &report.problems {
            line(&name, &problem.to_string());
        }
        let more = report.count - report.problems.len() as u64;
        if more > 0 {
            line(&name, &format!("and {more} more"));
        }
        for note in &report.notes {
            line(&name, note);
        }
        let what = match (report.is_clean(), report.incomplete) {
            (true, _) => format!(
                "clean: {} inodes ({} directories), {} blocks in use",
                report.inodes, report.directories, report.blocks
            ),
            (false, true) => "damaged, and not looked at any further".to_owned(),
            (false, false) => format!("damaged: {} problems", report.count),
        };
        line(&name, &what);
    }
    text
}
