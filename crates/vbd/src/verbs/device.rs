//! An image of any format as a disk that is looked into, or changed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vbd_core::ErrorKind;
use vbd_core::file::Cache;
use vbd_formats::{Format, ImageSpec};
use vbd_fs::upkeep::{Disk, Opened};
use vbd_image::lease::{self, LeaseError, Mode};
use vbd_image::sidecar;
use vbd_jobs::Image;

use super::image::ImageArgs;

/// How an image is opened.
#[derive(Clone, Copy)]
pub(super) struct Opening {
    /// What for.
    pub(super) mode: Mode,
    /// Look although somebody writes.
    pub(super) share: bool,
    /// How long to wait for others.
    pub(super) wait: Duration,
}

impl Opening {
    /// For one of these, with others waited for as they end.
    pub(super) fn patient(mode: Mode) -> Opening {
        Opening { mode, share: false, wait: Duration::from_secs(2) }
    }
}

/// Opens an image as it was told to be, its lease taken. One that is written to keeps its dirty bitmaps.
pub(super) fn open(args: &ImageArgs, path: &Path, opening: Opening) -> anyhow::Result<Disk> {
    open_spec(args.spec(path)?, opening)
}

/// The same of one that was told before: a key can come from a descriptor, and then comes once.
pub(super) fn open_spec(told: ImageSpec, opening: Opening) -> anyhow::Result<Disk> {
    let Opening { mode, share, wait } = opening;
    // Through the page cache: it is small pieces that are read, and read again by the next verb.
    let spec =
        ImageSpec { read_only: mode == Mode::Read, share, cache: Cache::Writeback, lease_wait: wait, ..told };
    let path = &spec.path;
    // The bytes of a raw image are the disk's, unless somebody has to take note of what is written to it.
    if spec.format == Format::Raw && (spec.read_only || !sidecar::path_of(path).exists()) {
        return Ok(Disk::open_with(path, mode, lease::Options { override_: share, wait })?);
    }
    Ok(Disk::of(Arc::new(Opened::new(Image::open(&spec)?, path)), path)?)
}

/// Whether an error says that somebody else uses the disk.
pub(super) fn is_in_use(error: &anyhow::Error) -> bool {
    let lease = error.downcast_ref::<vbd_fs::Error>();
    let disk = error.downcast_ref::<vbd_jobs::Error>();
    matches!(lease, Some(vbd_fs::Error::Lease(LeaseError::InUse { .. })))
        || matches!(disk, Some(vbd_jobs::Error::Disk(error)) if error.kind() == ErrorKind::Busy)
}
