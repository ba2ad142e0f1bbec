//! `vbd check`.

use std::path::PathBuf;

use serde::Serialize;
use vbd_formats::{Format, Repair};
use vbd_fs::upkeep::{self, Checked, Disk};
use vbd_image::lease::Mode;

use super::image::ImageArgs;
use crate::output::{print, print_json};
use crate::progress::{Bar, stop_on_signals};
use crate::{Exit, UsageError};

/// Check an image: of a raw one the partition table, and everything in its ext2, ext3 and ext4 filesystems; of others
/// (--format) their own structure.
///
/// Exit code 0: nothing is wrong; 1: it is damaged; 2: it could not be checked as asked; 3: only room is lost.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file or block device
    image: PathBuf,
    /// Repair and check again: filesystems with e2fsck; of a format's structure `leaks` (give lost room back) or `all`, the
    /// default
    #[arg(long, value_name = "WHAT", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    repair: Option<What>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    of: ImageArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Lost room
    Leaks,
    /// Everything
    All,
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
    // What cannot be told is not damaged, either.
    let format = args.of.format(&args.image).map_err(|error| UsageError(error.to_string()))?;
    if format != Format::Raw {
        return structure(&args);
    }
    if args.repair == Some(What::Leaks) {
        let message = "--repair=leaks is for formats: a raw image has no room to lose";
        return Err(UsageError(message.to_owned()).into());
    }
    let mode = if args.repair.is_some() { Mode::Write } else { Mode::Read };
    // What cannot be looked at is not damaged: the exit code says which it is.
    let unusable = |error: vbd_fs::Error| UsageError(error.to_string());
    let mut bar = Bar::new(stop_on_signals());
    let mut disk = Disk::open(&args.image, mode).map_err(unusable)?;
    let mut checked = upkeep::check(&disk, &mut bar).map_err(unusable)?;
    let unclean = checked.volumes.iter().any(|(_, report)| !report.is_clean() || !report.notes.is_empty());
    if args.repair.is_some() && unclean {
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

/// Checks the structure of a format.
fn structure(args: &Args) -> anyhow::Result<()> {
    let spec = args.of.spec(&args.image)?;
    let repair = args.repair.map(|what| match what {
        What::Leaks => Repair::Leaks,
        What::All => Repair::All,
    });
    let checked = vbd_formats::check(&spec, repair).map_err(|error| UsageError(error.to_string()))?;
    if args.json {
        print_json(&checked)?;
    } else {
        let name = args.image.display();
        let mut text = String::new();
        let shown = |line: &str| line.replace(char::is_control, "?");
        for line in checked.findings.iter().chain(&checked.notes) {
            text += &format!("{name}: {}\n", shown(line));
        }
        for line in &checked.repaired {
            text += &format!("{name}: repaired: {}\n", shown(line));
        }
        let what = match (checked.errors, checked.leaks, checked.incomplete) {
            (0, 0, false) => "clean".to_owned(),
            (errors, leaks, false) => format!("{errors} errors, {leaks} leaks"),
            (errors, leaks, true) => format!("{errors} errors, {leaks} leaks, and not looked at any further"),
        };
        text += &format!("{name}: {what}\n");
        print(&text)?;
    }
    match (checked.is_clean(), checked.errors, checked.incomplete) {
        (true, ..) => Ok(()),
        (false, 0, false) => Err(Exit(3).into()),
        _ => Err(Exit(1).into()),
    }
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
