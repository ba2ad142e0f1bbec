//! `vbd check`.

use std::path::PathBuf;

use serde::Serialize;
use vbd_formats::{Checked as Structure, Format, ImageSpec, Repair};
use vbd_fs::upkeep::{self, Checked, Disk};
use vbd_image::lease::Mode;

use super::device::{self, Opening};
use super::image::ImageArgs;
use crate::output::{print, print_json};
use crate::progress::{Bar, stop_on_signals};
use crate::{Exit, UsageError};

/// Check an image: the structure of its format, the partition table, and everything in its ext2, ext3 and ext4
/// filesystems.
///
/// Exit code 0: nothing is wrong; 1: it is damaged; 2: it could not be checked as asked; 3: only room is lost.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file or block device
    image: PathBuf,
    /// Repair and check again: filesystems in a raw image with e2fsck; of a format's structure `leaks` (give lost room
    /// back) or `all`, the default
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
    #[serde(flatten)]
    structure: Option<StructureObject>,
}

/// What was found in the structure of a format.
#[derive(Serialize)]
struct StructureObject {
    errors: u64,
    leaks: u64,
    findings: Vec<String>,
    repaired: Vec<String>,
    incomplete: bool,
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
    let mut bar = Bar::new(stop_on_signals());
    let (structure, inside) = match format {
        Format::Raw => (None, raw(&args, &mut bar)?),
        format if vbd_formats::has_structure(format) => with_structure(&args, &mut bar)?,
        format => {
            if args.repair.is_some() {
                return Err(UsageError(format!("{format} images are not repaired here")).into());
            }
            let spec = args.of.spec(&args.image)?;
            (None, look(spec, &mut bar).map_err(|error| UsageError(error.to_string()))?)
        }
    };
    bar.clear();
    let name = args.image.display().to_string();
    if args.json {
        print_json(&object(structure.as_ref(), &inside))?;
    } else {
        let structure = structure.as_ref().map(|found| structure_text(&name, found)).unwrap_or_default();
        print(&(structure + &text(&name, &inside)))?;
    }
    let damaged = structure.as_ref().is_some_and(|found| found.errors > 0 || found.incomplete);
    if damaged || !inside.is_clean() {
        return Err(Exit(1).into());
    }
    if structure.is_none_or(|found| found.is_clean()) { Ok(()) } else { Err(Exit(3).into()) }
}

/// Checks what is in a disk whose bytes are the file's, and repairs it if that is asked for.
fn raw(args: &Args, bar: &mut Bar) -> anyhow::Result<Checked> {
    if args.repair == Some(What::Leaks) {
        let message = "--repair=leaks is for formats: a raw image has no room to lose";
        return Err(UsageError(message.to_owned()).into());
    }
    let mode = if args.repair.is_some() { Mode::Write } else { Mode::Read };
    // What cannot be looked at is not damaged: the exit code says which it is.
    let unusable = |error: vbd_fs::Error| UsageError(error.to_string());
    let mut disk = Disk::open(&args.image, mode).map_err(unusable)?;
    let mut checked = upkeep::check(&disk, bar).map_err(unusable)?;
    let unclean = checked.volumes.iter().any(|(_, report)| !report.is_clean() || !report.notes.is_empty());
    if args.repair.is_some() && unclean {
        upkeep::repair(&disk, bar)?;
        drop(disk);
        disk = Disk::open(&args.image, Mode::Read)?;
        checked = upkeep::check(&disk, bar)?;
    }
    Ok(checked)
}

/// Checks what is in a disk of another format.
fn look(spec: ImageSpec, bar: &mut Bar) -> anyhow::Result<Checked> {
    let disk = device::open_spec(spec, Opening::patient(Mode::Read))?;
    Ok(upkeep::check(&disk, bar)?)
}

/// Checks the structure of an image, and then what is in it, as far as that can be found.
fn with_structure(args: &Args, bar: &mut Bar) -> anyhow::Result<(Option<Structure>, Checked)> {
    let spec = args.of.spec(&args.image)?;
    let repair = args.repair.map(|what| match what {
        What::Leaks => Repair::Leaks,
        What::All => Repair::All,
    });
    let structure = vbd_formats::check(&spec, repair).map_err(|error| UsageError(error.to_string()))?;
    let mut inside = Checked::default();
    if structure.errors == 0 && !structure.incomplete {
        match look(spec, bar) {
            Ok(checked) => inside = checked,
            Err(error) => inside.notes.push(format!("what is in it was not looked at: {error}")),
        }
        if args.repair.is_some() && !inside.is_clean() {
            let what = "filesystems are repaired in raw images alone: `vbd convert` makes one of it";
            inside.notes.push(what.to_owned());
        }
    }
    Ok((Some(structure), inside))
}

/// What was found in the structure, in words.
fn structure_text(name: &str, found: &Structure) -> String {
    let mut text = String::new();
    let shown = |line: &str| line.replace(char::is_control, "?");
    for line in found.findings.iter().chain(&found.notes) {
        text += &format!("{name}: {}\n", shown(line));
    }
    for line in &found.repaired {
        text += &format!("{name}: repaired: {}\n", shown(line));
    }
    let what = match (found.errors, found.leaks, found.incomplete) {
        (0, 0, false) => "clean".to_owned(),
        (errors, leaks, false) => format!("{errors} errors, {leaks} leaks"),
        (errors, leaks, true) => format!("{errors} errors, {leaks} leaks, and not looked at any further"),
    };
    text + &format!("{name}: {what}\n")
}

fn object(structure: Option<&Structure>, checked: &Checked) -> Object {
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
    let notes = structure.map(|found| &found.notes).into_iter().flatten().chain(&checked.notes);
    Object {
        clean: checked.is_clean() && structure.is_none_or(Structure::is_clean),
        problems: checked.problems.clone(),
        notes: notes.cloned().collect(),
        filesystems: filesystems.collect(),
        structure: structure.map(|found| StructureObject {
            errors: found.errors,
            leaks: found.leaks,
            findings: found.findings.clone(),
            repaired: found.repaired.clone(),
            incomplete: found.incomplete,
        }),
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
