//! `vbd compact`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;
use vbd_formats::{Format, ImageSpec};
use vbd_fs::upkeep;
use vbd_image::lease::Mode;
use vbd_image::size::Human;
use vbd_jobs::{Compacted, Image, Pace};

use super::device::{self, Opening};
use super::job::{self, PaceArgs};
use super::target::{self, Target};
use crate::output::{print, print_json};
use crate::progress::{Bar, stop_on_signals};

/// Give storage back: blocks that the filesystems in an image hold free become holes of the file, or in a qcow2 image
/// (--format) clusters that are free. Then what is at the end of a qcow2 image's file is moved to where it is free before,
/// and the file is cut off.
///
/// The latter alone is done to a disk that is served, while its guests go on: they discard what they do not need.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: target::Args,
    /// Leave filesystems as they are: compact a qcow2 image alone
    #[arg(long)]
    file_only: bool,
    #[command(flatten)]
    pace: PaceArgs,
    /// Print JSON, sizes in bytes
    #[arg(long)]
    json: bool,
}

/// What came of it, for programs.
#[derive(Serialize)]
struct Object {
    punched: u64,
    allocated_before: u64,
    allocated: u64,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let bar = Bar::new(stop_on_signals());
    let done: anyhow::Result<Compacted> = match args.target.find()? {
        Target::Served(found) => {
            let job = found.client.compact(&found.disk.name, args.pace.served())?;
            job::wait(&found.client, job, &bar)
        }
        Target::File(file) => {
            args.pace.file()?;
            if !args.file_only {
                return filesystems(&args, &file, bar);
            }
            image(&args.target.spec(&file)?, &bar)
        }
    };
    bar.clear();
    let done = done?;
    if args.json {
        return print_json(&done);
    }
    let (before, after) = (Human(done.before), Human(done.after));
    Ok(print(&format!("{}: the file's length {before} -> {after}\n", args.target.name()))?)
}

/// Cuts off what an image does not need at its file's end.
fn image(spec: &ImageSpec, bar: &Bar) -> anyhow::Result<Compacted> {
    let image = Image::open(spec)?;
    Ok(vbd_jobs::compact(image.session(), Pace::Full, bar)?)
}

/// Gives back what filesystems hold free.
fn filesystems(args: &Args, file: &Path, mut bar: Bar) -> anyhow::Result<()> {
    let of = args.target.image();
    let disk = device::open(of, file, Opening::patient(Mode::Write))?;
    let result = upkeep::compact(&disk, &mut bar);
    // Some formats give space back when they are closed.
    drop(disk);
    let spec = of.spec(file)?;
    let more = match &result {
        Ok(_) if spec.format == Format::Qcow2 => image(&spec, &bar).map(drop),
        _ => Ok(()),
    };
    bar.clear();
    let mut done = result?;
    more?;
    done.after = file.metadata()?.blocks() * 512;
    done.punched = done.before.saturating_sub(done.after);
    if args.json {
        return print_json(&Object {
            punched: done.punched,
            allocated_before: done.before,
            allocated: done.after,
        });
    }
    let (before, after, punched) = (Human(done.before), Human(done.after), Human(done.punched));
    Ok(print(&format!("{}: allocated {before} -> {after}, holes made of {punched}\n", file.display()))?)
}
