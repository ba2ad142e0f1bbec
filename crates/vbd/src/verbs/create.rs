//! `vbd create`.

use std::path::PathBuf;

use vbd_image::size::Size;

/// Make an empty, sparse disk file.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file to make
    file: PathBuf,
    /// Its size: bytes, or with K, M, G, T (1024) or KB, MB, GB, TB (1000), as 2G or 1.5T
    #[arg(long, short, value_name = "SIZE", allow_hyphen_values = true)]
    size: Size,
    /// Allocate all of it now, so that the host cannot run out of room for it later
    #[arg(long)]
    preallocate: bool,
    /// Replace an existing file, unless it is in use
    #[arg(long)]
    force: bool,
    /// The format of the file
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    format: Format,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    /// The disk's bytes as they are
    Raw,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.format {
        Format::Raw => vbd_image::create::create(&args.file, args.size, args.preallocate, args.force)?,
    }
    Ok(())
}
