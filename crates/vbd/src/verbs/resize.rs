//! `vbd resize`.

use std::path::PathBuf;

use vbd_image::size::Human;

use super::image::{ImageArgs, NewSize};
use crate::output::print;

/// Make the disk in an image larger, or with --shrink smaller; what is in it stays as it is: `vbd grow` and `vbd shrink` change
/// a filesystem with it.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The image; nobody may be using it
    file: PathBuf,
    /// The new size, as 20G, or how much more, as +5G
    #[arg(value_name = "SIZE", allow_hyphen_values = true)]
    size: NewSize,
    /// Cut off what is beyond a smaller size: it is lost, but to snapshots. Raw, qcow2 and vhd images
    #[arg(long)]
    shrink: bool,
    #[command(flatten)]
    image: ImageArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let spec = args.image.spec(&args.file)?;
    let size = |before: u64| match args.size {
        NewSize::To(size) => Some(size.bytes()),
        NewSize::By(size) => before.checked_add(size.bytes()),
    };
    let (before, after) = vbd_jobs::resize(&spec, size, args.shrink)?;
    Ok(print(&format!("{}: {} -> {}\n", spec.path.display(), Human(before), Human(after)))?)
}
