//! What verbs work on that do so live and offline: a disk that is served, or a file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::bail;
use vbd_core::{Disk, Session};
use vbd_formats::ImageSpec;

use super::control::{self, Found, unknown};
use super::image::ImageArgs;

/// Which disk.
#[derive(clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// The name of a disk that is served, or a file
    disk: String,
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    control: control::Args,
}

/// A disk that is served, or a file that is not.
pub(super) enum Target {
    Served(Box<Found>),
    File(PathBuf),
}

impl Args {
    /// Finds out which it is.
    pub(super) fn find(&self) -> anyhow::Result<Target> {
        find(&self.disk, &self.control)
    }

    /// How a file is to be opened, as it was said.
    pub(super) fn image(&self) -> &ImageArgs {
        &self.image
    }

    /// What it was called.
    pub(super) fn name(&self) -> &str {
        &self.disk
    }

    /// How a file is to be opened.
    pub(super) fn spec(&self, file: &Path) -> anyhow::Result<ImageSpec> {
        self.image.spec(file)
    }

    /// Opens a file as a disk with bitmaps.
    pub(super) fn open(&self, file: &Path, read_only: bool) -> anyhow::Result<Open> {
        let spec = ImageSpec { read_only, ..self.image.spec(file)? };
        let disk = vbd_formats::open_tracked(&spec)?;
        let session = disk.open()?;
        Ok(Open { session, _disk: disk })
    }
}

/// Finds out whether a disk is one that is served, by its name or by its file, or a file that is not.
pub(super) fn find(disk: &str, control: &control::Args) -> anyhow::Result<Target> {
    let file = Path::new(disk);
    // A name has no slash in it; what has none is a name first.
    let served = if disk.contains('/') { None } else { control.find(disk)? };
    let served = match served {
        None if file.exists() => control.find_file(file)?,
        other => other,
    };
    match served {
        Some(found) => Ok(Target::Served(Box::new(found))),
        None if file.exists() => Ok(Target::File(file.to_owned())),
        None if disk.contains('/') => bail!("{}: there is no such file", file.display()),
        None => Err(unknown(disk).context(format!("{}: there is no such file", file.display()))),
    }
}

/// An open file. Its bitmaps have been put away when it is dropped.
pub(super) struct Open {
    pub(super) session: Arc<dyn Session>,
    // After the session.
    _disk: Arc<dyn Disk>,
}
