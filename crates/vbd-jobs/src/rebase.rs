//! `vbd rebase` and `vbd flatten`: what an image stands on becomes another file, or nothing.
//!
//! What the old chain holds and the new one does not is written into the image first, and made durable; then its header
//! names the new file. Until then the image is read as before, and after it too: whenever the job is interrupted, the
//! image is whole.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use vbd_core::Client;
use vbd_core::client::Buffer;
use vbd_formats::{Format, ImageSpec};

use crate::copy::CHUNK;
use crate::input::Input;
use crate::layers::{Below, live, no_snapshots};
use crate::ranges::{Chunks, Turns, each};
use crate::zeroes::{are_zero, runs};
use crate::{Error, Image, Progress, Result};

/// The unit in which contents are compared, in bytes.
const UNIT: u64 = 4096;

/// Copies into an image what it reads from below and would read differently from `new`, or from nothing: the bytes that
/// were written. Its header still names the old file afterwards.
pub(crate) fn copy_up(
    image: &Client,
    name: &str,
    new: Option<&Client>,
    threads: usize,
    progress: &dyn Progress,
) -> Result<u64> {
    let live = live(image, name)?;
    no_snapshots(live, name)?;
    let layers = Below { image, live, other: new };
    let size = image.size();
    progress.step("copying", size);
    let chunks = Chunks::new(&layers, 0, size, UNIT, CHUNK);
    let bytes = usize::try_from(CHUNK).expect("a chunk is small");
    let unit = usize::try_from(UNIT).expect("a unit is small");
    let own = || (Buffer::new(bytes), Buffer::new(if new.is_some() { bytes } else { 0 }));
    let written = AtomicU64::new(0);
    let below = new.map(Input::new);
    each(chunks, threads, &Turns::default(), progress, own, |(old, other), chunk| {
        if !chunk.data {
            return Ok(true);
        }
        let len = usize::try_from(chunk.len).expect("data comes in chunks");
        image.read(chunk.offset, old, len)?;
        let wanted = match &below {
            Some(new) => {
                new.read_padded(chunk.offset, other, len)?;
                runs(len, unit, |piece| old[piece.clone()] != other[piece])
            }
            None => runs(len, unit, |piece| !are_zero(&old[piece])),
        };
        for run in wanted {
            let offset = chunk.offset + run.start as u64;
            if are_zero(&old[run.clone()]) {
                image.zero(offset, run.len() as u64, true)?;
            } else {
                image.write_at(offset, &old[run.clone()])?;
            }
            written.fetch_add(run.len() as u64, Ordering::Relaxed);
        }
        Ok(true)
    })?;
    progress.step("flushing", 0);
    image.flush()?;
    Ok(written.into_inner())
}

/// The file that an image is to stand on.
#[derive(Clone, Debug)]
pub struct NewBacking {
    /// Its name, as it is written into the image: a relative one begins where the image is.
    pub name: std::ffi::OsString,
    /// Its format.
    pub format: Format,
}

/// Puts an image on another file, or on none, with what guests read from it unchanged. Gives the bytes that were copied
/// into it.
///
/// # Errors
/// The image or what it stands on cannot be opened, the new file stands on the image itself, or there is no room. The
/// image reads as before.
pub fn rebase(
    spec: &ImageSpec,
    new: Option<&NewBacking>,
    threads: usize,
    progress: &dyn Progress,
) -> Result<u64> {
    let below = new.map(|new| open_new(spec, new)).transpose()?;
    let image = Image::open(spec)?;
    let name = spec.path.display().to_string();
    let written = copy_up(&image, &name, below.as_deref(), threads, progress)?;
    // Its lease goes with it, and is taken again to change the header.
    drop(image);
    rename(spec, new)?;
    Ok(written)
}

/// Has an image name another file, or none, whatever is in it: for files that were moved, or whose content is known to be
/// the same.
///
/// # Errors
/// The image is in use, has no such name, or cannot be written.
pub fn rebase_unsafe(spec: &ImageSpec, new: Option<&NewBacking>) -> Result<()> {
    rename(spec, new)
}

fn rename(spec: &ImageSpec, new: Option<&NewBacking>) -> Result<()> {
    Ok(vbd_formats::set_backing(spec, new.map(|new| (new.name.as_os_str(), new.format)))?)
}

/// Opens what an image is to stand on.
fn open_new(spec: &ImageSpec, new: &NewBacking) -> Result<Image> {
    let directory = spec.path.parent().unwrap_or(Path::new(""));
    let path = directory.join(&new.name);
    let links = vbd_formats::chain(&path, new.format, &spec.gate)?;
    let same = |link: &vbd_formats::Link| {
        let files = (link.path.canonicalize(), spec.path.canonicalize());
        matches!(files, (Ok(one), Ok(other)) if one == other)
    };
    if links.iter().any(same) {
        let (image, path) = (spec.path.display(), path.display());
        return Err(Error::Refused(format!("{image}: {path} stands on it, so it cannot stand on that")));
    }
    let below = ImageSpec { gate: spec.gate.clone(), ..ImageSpec::new(path, new.format) };
    Image::open(&below.read_only())
}
