//! `vbd commit`.

use std::path::PathBuf;

use vbd_image::size::Human;

use super::image::ImageArgs;
use crate::output::print;
use crate::progress::{Bar, stop_on_signals};

/// Write what an image holds into the backing file that it stands on. Other images that stand on the same file are
/// destroyed by that.
///
/// The image keeps what it holds, so that it is whole whenever this is interrupted; afterwards nobody needs it.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The image; nobody may be using it, or its backing file
    file: PathBuf,
    #[command(flatten)]
    image: ImageArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let spec = args.image.spec(&args.file)?;
    let bar = Bar::new(stop_on_signals());
    let result = vbd_jobs::commit(&spec, 8, &bar);
    bar.clear();
    let done = result?;
    let (file, into) = (spec.path.display(), done.into.display());
    Ok(print(&format!("{file}: {} written to {into}\n", Human(done.written)))?)
}
