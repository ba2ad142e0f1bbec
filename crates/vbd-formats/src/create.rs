//! Making images of any format.

use std::path::Path;

use vbd_core::{Error, ErrorKind, Result};
use vbd_image::size::Size;

use crate::Format;

/// A new image.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Its format.
    pub format: Format,
    /// The virtual disk's size in bytes; a multiple of 512, except for raw images.
    pub size: u64,
    /// Replace a file that is there, unless it is in use.
    pub replace: bool,
}

/// Makes an empty image, whole or not at all.
///
/// # Errors
/// The file cannot be made, or the format cannot be so.
pub fn create(path: &Path, image: &NewImage) -> Result<()> {
    let refused = |message: String| Error::new(ErrorKind::Unsupported, message);
    match image.format {
        Format::Raw => {
            let size = Size::from_bytes(image.size).map_err(|error| refused(error.to_string()))?;
            vbd_image::create::create(path, size, false, image.replace)
                .map_err(|error| Error::new(ErrorKind::Io, error.to_string()))
        }
        Format::Qcow2 => Err(refused("qcow2 images are not made yet".to_owned())),
    }
}
