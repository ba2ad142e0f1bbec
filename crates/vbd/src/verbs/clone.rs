//! `vbd clone`.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use serde::Serialize;
use vbd_core::file::Cache;
use vbd_formats::{Format, ImageSpec};
use vbd_fs::upkeep::{self, CloneOptions, Disk, How, Opened};
use vbd_fs::{Progress, Time};
use vbd_image::create::Draft;
use vbd_image::lease::{Lease, Mode, Options};
use vbd_jobs::Image;

use super::build::TailorArgs;
use super::image::ImageArgs;
use crate::output::{print, print_json};
use crate::progress::{Bar, stop_on_signals};

/// Make another machine's disk of an image, with UUIDs, name and keys of its own.
///
/// It shares the base's blocks where the host's filesystem can do that (XFS, Btrfs), or else becomes a qcow2 image that
/// stands on the base: either takes milliseconds and no room. Where neither can be, the base is copied. The new disk gets
/// new UUIDs for filesystems and partitions, which fstab and boot entries follow; machine-id, SSH host keys and random
/// seed are removed and made anew when it starts.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The image to make it of; nobody may be writing to it
    base: PathBuf,
    /// The file to make
    new: PathBuf,
    /// How, instead of the first of these that is possible
    #[arg(long, value_name = "HOW")]
    how: Option<Wanted>,
    /// The label of the root filesystem
    #[arg(long, value_name = "NAME")]
    label: Option<String>,
    /// Leave machine-id, SSH host keys and random seed as they are in the base
    #[arg(long, conflicts_with = "reset_identity")]
    keep_identity: bool,
    /// Replace an existing file, unless it is in use
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    tailor: TailorArgs,
}

/// How a clone is to come from its base.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Wanted {
    /// It shares the base's blocks, and has its format
    Reflink,
    /// A qcow2 image that reads from the base what was not written to it: the base must not change any more
    Overlay,
    /// All data is copied, into the base's format; holes stay holes
    Copy,
}

/// What was made, for programs.
#[derive(Serialize)]
struct Object {
    how: String,
    format: Format,
    filesystems: Vec<FilesystemObject>,
}

#[derive(Serialize)]
struct FilesystemObject {
    partition: Option<u32>,
    uuid: String,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut tailor = args.tailor.tailor()?;
    tailor.reset_identity = !args.keep_identity;
    let options = CloneOptions { tailor, label: args.label, force: args.force };
    // Through the page cache: little is read and written, and all of it flushed at the end.
    let spec = ImageSpec { cache: Cache::Writeback, ..args.image.spec(&args.base)? };
    let image = vbd_image::open::open(&args.base)?;
    let wait = Options { wait: spec.lease_wait, ..Options::default() };
    let _lease = Lease::acquire(image.file.as_fd(), &args.base, Mode::Read, wait)?;
    let new = if args.force { args.new.canonicalize().unwrap_or(args.new.clone()) } else { args.new.clone() };
    let base = Base { spec, image, new: &new };
    let mut bar = Bar::new(stop_on_signals());
    let cloned = upkeep::clone_of(&args.new, &options, Time::now(), &mut bar, |draft, progress| {
        base.fill(draft, args.how, progress)
    });
    bar.clear();
    let cloned = cloned?;
    let format = if cloned.how == How::Overlay { Format::Qcow2 } else { base.spec.format };
    if args.json {
        let filesystems = cloned
            .uuids
            .iter()
            .map(|(volume, uuid)| FilesystemObject { partition: volume.partition, uuid: uuid.clone() })
            .collect();
        return print_json(&Object { how: cloned.how.to_string(), format, filesystems });
    }
    let mut text = format!("{}: {} of {}\n", args.new.display(), cloned.how, args.base.display());
    if cloned.how == How::Overlay {
        text += "  its format is qcow2; it reads from the base, which must not change any more\n";
    }
    for (volume, uuid) in &cloned.uuids {
        match volume.partition {
            Some(number) => text += &format!("  partition {number}: UUID {uuid}\n"),
            None => text += &format!("  UUID {uuid}\n"),
        }
    }
    Ok(print(&text)?)
}

/// What a clone is made of, and what it is to be called.
struct Base<'a> {
    spec: ImageSpec,
    image: vbd_image::open::Image,
    new: &'a Path,
}

impl Base<'_> {
    /// Fills a new file, and opens the disk in it.
    fn fill(
        &self,
        draft: &Draft,
        wanted: Option<Wanted>,
        progress: &mut dyn Progress,
    ) -> anyhow::Result<(Disk, How)> {
        match wanted {
            Some(Wanted::Reflink) => self.copy(draft, Some(How::Reflink), progress),
            Some(Wanted::Copy) => self.copy(draft, Some(How::Copy), progress),
            Some(Wanted::Overlay) => self.overlay(draft),
            None => {
                // A format that cannot be copied so may still be stood on, and the other way round.
                if upkeep::share(&self.image.file, draft.file()) {
                    if let Ok(disk) = self.open(draft) {
                        return Ok((disk, How::Reflink));
                    }
                    self.empty(draft)?;
                }
                let refused = match self.overlay(draft) {
                    Err(refused) if self.spec.format.is_writable() => refused,
                    other => return other,
                };
                self.empty(draft)?;
                self.copy(draft, Some(How::Copy), progress).map_err(|error| refused.context(error))
            }
        }
    }

    fn copy(
        &self,
        draft: &Draft,
        how: Option<How>,
        progress: &mut dyn Progress,
    ) -> anyhow::Result<(Disk, How)> {
        let how =
            upkeep::copy(&self.image.file, self.image.size, &self.spec.path, draft.file(), how, progress)?;
        Ok((self.open(draft)?, how))
    }

    fn overlay(&self, draft: &Draft) -> anyhow::Result<(Disk, How)> {
        let disk = Image::of(vbd_formats::overlay(draft.file(), self.new, &self.spec)?)?;
        Ok((Disk::of(Arc::new(Opened::new(disk, &self.spec.path)), self.new)?, How::Overlay))
    }

    /// Opens the disk in a file that holds what the base holds.
    fn open(&self, draft: &Draft) -> anyhow::Result<Disk> {
        if self.spec.format == Format::Raw {
            let file = draft.file().try_clone().context("opening the new file once more")?;
            return Ok(Disk::plain_file(file, self.image.size, None, self.new)?);
        }
        let disk = Image::of(vbd_formats::open_copy(draft.file(), self.new, &self.spec)?)?;
        Ok(Disk::of(Arc::new(Opened::new(disk, &self.spec.path)), self.new)?)
    }

    fn empty(&self, draft: &Draft) -> anyhow::Result<()> {
        draft.file().set_len(0).with_context(|| format!("{}: cannot be emptied", self.new.display()))
    }
}
