//! `vbd compact`.

use std::path::PathBuf;

use serde::Serialize;
use vbd_fs::upkeep::{self, Disk};
use vbd_image::lease::Mode;
use vbd_image::size::Human;

use crate::output::{print, print_json};
use crate::progress::{Bar, stop_on_signals};

/// Give storage back: blocks that the filesystems in an image hold free become holes of the file.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file
    image: PathBuf,
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
    let disk = Disk::open(&args.image, Mode::Write)?;
    let mut bar = Bar::new(stop_on_signals());
    let result = upkeep::compact(&disk, &mut bar);
    bar.clear();
    let done = result?;
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
