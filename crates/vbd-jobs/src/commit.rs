//! `vbd commit`: what an image holds goes into the one that it stands on.
//!
//! The image keeps all that it holds until the other has it durably, and after that too: whenever the job is
//! interrupted, the image reads as before, and the job can be done again.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use vbd_core::client::Buffer;
use vbd_formats::ImageSpec;

use crate::copy::CHUNK;
use crate::layers::{Own, live, no_snapshots};
use crate::ranges::{Chunks, Turns, each};
use crate::zeroes::{are_zero, runs};
use crate::{Error, Image, Progress, Result};

/// The unit in which zeroes are told from data, in bytes.
const UNIT: u64 = 4096;

/// What a commit has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// The file that was written to.
    pub into: std::path::PathBuf,
    /// The bytes that were written to it.
    pub written: u64,
}

/// How the file that an image stands on is opened to be written to.
pub(crate) fn target(spec: &ImageSpec) -> Result<ImageSpec> {
    let links = vbd_formats::chain(&spec.path, spec.format, &spec.gate)?;
    let Some(below) = links.get(1) else {
        let path = spec.path.display();
        return Err(Error::Refused(format!(
            "{path}: stands on no other image, so there is none to commit to"
        )));
    };
    Ok(ImageSpec {
        path: below.path.clone(),
        format: below.format,
        name: below.path.display().to_string(),
        read_only: false,
        share: false,
        ..spec.clone()
    })
}

/// Writes what an image holds to its backing file, which grows if it is the smaller of the two.
///
/// # Errors
/// The image has no backing file, one of the two is in use, or there is no room. The image reads as before.
pub fn commit(spec: &ImageSpec, threads: usize, progress: &dyn Progress) -> Result<Committed> {
    let target = target(spec)?;
    let into = target.path.clone();
    // One disk for both: the image reads from what is written meanwhile, as it hides all of that itself.
    let disk = vbd_formats::open_tracked(&target)?;
    let target = Image::of(disk.clone())?;
    let image = Image::of(vbd_formats::open_on(&spec.clone().read_only(), Some(disk))?)?;
    if image.size() > target.size() {
        target.session().grow(image.size())?;
    }
    let name = spec.path.display().to_string();
    let live = live(&image, &name)?;
    no_snapshots(live, &name)?;
    let own = Own(live);
    let size = image.size();
    progress.step("committing", size);
    let chunks = Chunks::new(&own, 0, size, 512, CHUNK);
    let bytes = usize::try_from(CHUNK).expect("a chunk is small");
    let unit = usize::try_from(UNIT).expect("a unit is small");
    let written = AtomicU64::new(0);
    each(
        chunks,
        threads,
        &Turns::default(),
        progress,
        || Buffer::new(bytes),
        |buffer, chunk| {
            if !chunk.data {
                return Ok(true);
            }
            let len = usize::try_from(chunk.len).expect("data comes in chunks");
            image.read(chunk.offset, buffer, len)?;
            for zero in [false, true] {
                for run in runs(len, unit, |piece| are_zero(&buffer[piece]) == zero) {
                    let offset = chunk.offset + run.start as u64;
                    if zero {
                        target.zero(offset, run.len() as u64, true)?;
                    } else {
                        target.write_at(offset, &buffer[run.clone()])?;
                    }
                }
            }
            written.fetch_add(chunk.len, Ordering::Relaxed);
            Ok(true)
        },
    )?;
    progress.step("flushing", 0);
    target.flush()?;
    Ok(Committed { into, written: written.into_inner() })
}
