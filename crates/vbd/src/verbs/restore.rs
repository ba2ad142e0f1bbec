//! `vbd restore`.

mod serve;

use std::path::PathBuf;

use anyhow::bail;
use vbd_formats::{Format, NewImage};
use vbd_image::size::Human;
use vbd_jobs::backup::{Chain, Store, Use, restore};

use crate::UsageError;
use crate::output::print;
use crate::progress::{Bar, stop_on_signals};

/// Make an image of a backup. Everything is compared with what was stored on the way.
///
/// With --serve the disk is served at once, in the foreground: what a guest asks for comes first. The file has its name when
/// it is whole; until then it lies beside it, and the same command goes on where it was interrupted.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The store
    store: PathBuf,
    /// The file to make
    file: PathBuf,
    /// The disk (default: the only one in the store)
    #[arg(long)]
    disk: Option<String>,
    /// The backup (default: the disk's last)
    #[arg(long, value_name = "NAME")]
    backup: Option<String>,
    /// The format of the file
    #[arg(long, default_value_t = Format::Raw)]
    format: Format,
    /// Replace an existing file, unless it is in use
    #[arg(long)]
    force: bool,
    /// Threads that read and write
    #[arg(long, value_name = "N", default_value_t = 4)]
    threads: usize,
    #[command(flatten)]
    serve: serve::Args,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if Chain::is_one(&args.store) {
        bail!(
            "{}: holds images, which are used as they are: `vbd convert` makes one file of an image and those before it",
            args.store.display()
        );
    }
    let store = Store::open(&args.store, Use::Shared)?;
    let list = store.list(args.disk.as_deref())?;
    let Some(last) = list.last().map(|one| one.about.clone()) else {
        bail!("{}: has no such backup: `vbd backups list` shows those there are", store.path().display());
    };
    if args.disk.is_none() && list.iter().any(|one| one.about.disk != last.disk) {
        bail!("{}: has backups of several disks: say which with --disk", store.path().display());
    }
    let name = args.backup.as_deref().unwrap_or(&last.name);
    let manifest = store.manifest(&last.disk, name)?;
    if args.serve.is_wanted() {
        if args.format != Format::Raw {
            return Err(
                UsageError("--serve makes a raw image: convert it when it is whole".to_owned()).into()
            );
        }
        return serve::run(args.serve, store, manifest, &args.file, args.force);
    }
    let image = NewImage { replace: args.force, ..NewImage::new(args.format, manifest.size)? };
    let bar = Bar::new(stop_on_signals());
    let written = restore(&store, &manifest, &args.file, &image, args.threads, &bar);
    bar.clear();
    let (file, disk, written) = (args.file.display(), &last.disk, Human(written?));
    Ok(print(&format!("{file}: {disk} as of {name}, {}, {written} written\n", Human(manifest.size)))?)
}
