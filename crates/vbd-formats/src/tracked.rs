//! Disks that guests write to: with bitmaps, and a place where these are kept.

use std::sync::Arc;

use vbd_core::track::{Keeper, Tracked};
use vbd_core::{Disk, Result};
use vbd_image::sidecar::Sidecar;
use vbd_qcow2::bitmaps::Kept;

use crate::{Format, ImageSpec, open};

/// As [`open()`], with dirty bitmaps in front. Those of a raw image in a file are kept beside it, those of a qcow2 image in
/// it; those of others go when the disk is closed.
///
/// # Errors
/// As [`open()`].
pub fn open_tracked(spec: &ImageSpec) -> Result<Arc<dyn Disk>> {
    if spec.format == Format::Qcow2 && !spec.read_only {
        let kept = Kept::new();
        let disk = open(&ImageSpec { bitmaps: Some(kept.clone()), ..spec.clone() })?;
        return Ok(Tracked::new(disk, Some(Box::new(kept))));
    }
    let disk = open(spec)?;
    // Where others write to it at the same time, its bitmaps would not know of that.
    let keeps = spec.format == Format::Raw && !spec.share && spec.path.is_file();
    let keeper = keeps.then(|| Sidecar::new(&spec.path) as Box<dyn Keeper>);
    Ok(Tracked::new(disk, keeper))
}
