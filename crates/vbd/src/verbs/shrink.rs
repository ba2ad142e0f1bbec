//! `vbd shrink`.

use std::path::PathBuf;

use vbd_fs::Time;
use vbd_fs::upkeep::{self, Disk};
use vbd_image::lease::Mode;
use vbd_image::size::{Human, Size};

use crate::output::print;
use crate::progress::{Bar, stop_on_signals};

/// Make an image smaller: its last partition and the filesystem in it, too.
///
/// In place, safe against a cut at any moment. What that cannot do is told, and done by resize2fs on a copy, which takes the
/// image's place when all is done: the file is another one then, and there has to be room for the copy where blocks cannot
/// be shared.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file
    image: PathBuf,
    /// The new size
    #[arg(long, value_name = "SIZE")]
    to: Size,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let disk = Disk::open(&args.image, Mode::Write)?;
    let mut bar = Bar::new(stop_on_signals());
    let smaller = upkeep::shrink(disk, args.to.bytes(), Time::now(), &mut bar);
    bar.clear();
    let smaller = smaller?;
    Ok(print(&format!("{}: {} -> {}\n", args.image.display(), Human(smaller.before), Human(smaller.size)))?)
}
