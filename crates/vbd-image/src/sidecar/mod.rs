//! Bitmaps of raw images: a file beside the image, `IMAGE.vbd-bitmaps`.
//!
//! It belongs to one image in one state: its size, its inode, when it was changed last, and where the filesystem has
//! extended attributes a number in the image's own (`user.vbd.bitmaps`). One that does not fit is refused: somebody has
//! changed the image without its bitmaps.
//!
//! While the image is open for writing the file says so, durably, from before the first write until the bitmaps were
//! written again. Where it says so when the image is opened, the host or the process has stopped in between: every
//! bitmap then calls every block dirty.

mod format;
mod keeper;
mod place;
#[cfg(test)]
mod tests;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

pub use format::{Contents, FormatError, fuzz};
pub use keeper::{Sidecar, list, reset};

/// What is added to the image's name.
pub const SUFFIX: &str = ".vbd-bitmaps";
/// Holds a sidecar's number and generation in the image's extended attributes.
const ATTRIBUTE: &str = "user.vbd.bitmaps";

/// Which image bitmaps belong to, and in which state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Chosen by chance when there was a first bitmap.
    pub id: [u8; 16],
    /// How often the bitmaps were written.
    pub generation: u64,
    /// The image's size in bytes.
    pub size: u64,
    /// The image's inode.
    pub inode: u64,
    /// When the image was changed last: seconds since 1970, and nanoseconds.
    pub modified: (i64, u32),
}

/// Why the bitmaps beside an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SidecarError {
    /// It is no sidecar, or a damaged one.
    #[error("{}: {error}; take it away, and make new bitmaps", .path.display())]
    Format {
        /// The sidecar.
        path: PathBuf,
        /// What is wrong.
        error: FormatError,
    },
    /// It is of another image, or of this one as it was.
    #[error(
        "{}: {why}, so its bitmaps do not say what has changed: `vbd bitmap reset` marks everything, and they are of \
         use again",
        .path.display()
    )]
    Stale {
        /// The sidecar.
        path: PathBuf,
        /// What does not fit.
        why: String,
    },
    /// There is none.
    #[error("{}: has no bitmaps", .0.display())]
    None(PathBuf),
    /// Whatever the system says.
    #[error("{}: cannot {doing}: {error}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What failed.
        doing: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
}

impl SidecarError {
    fn io(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> SidecarError {
        let path = path.to_owned();
        move |error| SidecarError::Io { path, doing, error }
    }
}

/// The sidecar of an image.
pub fn path_of(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(SUFFIX);
    name.into()
}

impl Identity {
    /// That of the image as it is now, with a number and generation of a sidecar. `size` is that of the disk in bytes.
    fn of(image: &Path, size: u64, id: [u8; 16], generation: u64) -> Result<Identity, SidecarError> {
        let metadata = fs::metadata(image).map_err(SidecarError::io(image, "look at it"))?;
        let modified = (metadata.mtime(), u32::try_from(metadata.mtime_nsec()).unwrap_or(0));
        Ok(Identity { id, generation, size, inode: metadata.ino(), modified })
    }

    /// Whether this, from a sidecar that nobody was using, is what the image is now.
    fn fits(&self, now: &Identity, told: Option<([u8; 16], u64)>) -> Result<(), String> {
        if let Some((id, generation)) = told {
            if id != self.id {
                return Err("it belongs to another image".into());
            }
            if generation != self.generation {
                let (here, there) = (self.generation, generation);
                return Err(format!("it is of generation {here}, and the image of {there}"));
            }
        } else if now.inode != self.inode {
            return Err("it belongs to another file".into());
        }
        if now.size != self.size {
            let (before, now) = (self.size, now.size);
            return Err(format!("the image had {before} bytes, and has {now}"));
        }
        if now.modified != self.modified {
            return Err("the image was changed by something else".into());
        }
        Ok(())
    }
}

/// The number and generation in the image's extended attributes; none where there are no such.
fn told(image: &Path) -> Option<([u8; 16], u64)> {
    let mut bytes = [0u8; 25];
    let len = rustix::fs::getxattr(image, ATTRIBUTE, &mut bytes).ok()?;
    let (id, generation) = bytes.get(..len)?.split_at_checked(16)?;
    Some((id.try_into().ok()?, u64::from_le_bytes(generation.try_into().ok()?)))
}

/// Writes them there, where the filesystem has such attributes.
fn tell(image: &Path, id: [u8; 16], generation: u64) {
    let mut bytes = id.to_vec();
    bytes.extend(generation.to_le_bytes());
    if let Err(error) = rustix::fs::setxattr(image, ATTRIBUTE, &bytes, rustix::fs::XattrFlags::empty()) {
        tracing::debug!("{}: no extended attributes ({error})", image.display());
    }
}
