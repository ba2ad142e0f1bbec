//! `vbd compact`.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::Serialize;
use vbd_fs::upkeep;
use vbd_image::lease::Mode;
use vbd_image::size::Human;

use super::device::{self, Opening};
use super::image::ImageArgs;
use crate::output::{print, print_json};
use crate::progress::{Bar, stop_on_signals};

/// Give storage back: blocks that the filesystems in an image hold free become holes of the file, or in a qcow2 image
/// (--format) clusters that are free.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file
    image: PathBuf,
    /// Print JSON, sizes in bytes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    of: ImageArgs,
}

/// What came of it, for programs.
#[derive(Serialize)]
struct Object {
    punched: u64,
    allocated_before: u64,
    allocated: u64,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let disk = device::open(&args.of, &args.image, Opening::patient(Mode::Write))?;
    let mut bar = Bar::new(stop_on_signals());
    let result = upkeep::compact(&disk, &mut bar);
    bar.clear();
    let mut done = result?;
    // Some formats give space back when they are closed.
    drop(disk);
    done.after = args.image.metadata()?.blocks() * 512;
    done.punched = done.before.saturating_sub(done.after);
    if args.json {
        return print_json(&Object {
            punched: done.punched,
            allocated_before: done.before,
            allocated: done.after,
        });
    }
    let (before, after, punched) = (Human(done.before), Human(done.after), Human(done.punched));
    Ok(print(&format!("{}: allocated {before} -> {after}, holes made of {punched}\n", args.image.display()))?)
}
