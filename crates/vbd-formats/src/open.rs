//! From a file and what was told of it to a disk.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vbd_core::file::{Cache, Faults};
use vbd_core::{Disk, Error, ErrorKind, Result};
use vbd_image::raw::{Raw, RawOptions};

use crate::{Format, Gate};

/// An image and how it is to be opened.
#[derive(Clone)]
pub struct ImageSpec {
    /// The file.
    pub path: PathBuf,
    /// Its format, as it was told.
    pub format: Format,
    /// The disk's name.
    pub name: String,
    /// Refuse writes, and share the file with other readers.
    pub read_only: bool,
    /// Go on although others use the file (`w!`). Of raw images only: a format's metadata has one writer.
    pub share: bool,
    /// Use of the host's page cache.
    pub cache: Cache,
    /// Give no space back when the guest discards.
    pub keep_space: bool,
    /// How long to wait for a lease that somebody else holds.
    pub lease_wait: Duration,
    /// Which other files it may name.
    pub gate: Gate,
    /// Errors to inject below the channels, for tests.
    pub faults: Option<Arc<dyn Faults>>,
}

impl ImageSpec {
    /// The defaults for this file: read and write, O_DIRECT, named as the file.
    pub fn new(path: impl Into<PathBuf>, format: Format) -> Self {
        let RawOptions { path, name, read_only, share, cache, keep_space, lease_wait, faults } =
            RawOptions::new(path);
        let gate = Gate::default();
        ImageSpec { path, format, name, read_only, share, cache, keep_space, lease_wait, gate, faults }
    }

    /// The same, to be read only.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    fn raw(&self) -> RawOptions {
        RawOptions {
            path: self.path.clone(),
            name: self.name.clone(),
            read_only: self.read_only,
            share: self.share,
            cache: self.cache,
            keep_space: self.keep_space,
            lease_wait: self.lease_wait,
            faults: self.faults.clone(),
        }
    }
}

/// Makes a disk of an image and all that it names. Files are looked at, and none is locked yet: that is done by
/// [`Disk::open`].
///
/// # Errors
/// The image or one that it names is missing, malformed, or kept back by the gate; or the format cannot do what is asked.
pub fn open(spec: &ImageSpec) -> Result<Arc<dyn Disk>> {
    if !spec.read_only && !spec.format.is_writable() {
        let message = format!("{} images can be read only: say --read-only, or convert it", spec.format);
        return Err(Error::new(ErrorKind::Unsupported, message).of(spec.path.display().to_string()));
    }
    match spec.format {
        Format::Raw => Ok(Raw::new(spec.raw())),
        Format::Qcow2 => Err(Error::new(ErrorKind::Unsupported, "qcow2 images are not opened yet")),
    }
}
