//! From a file and what was told of it to a disk.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vbd_core::file::{Cache, Faults};
use vbd_core::{Disk, Error, ErrorKind, Result};
use vbd_foreign::{Foreign, ForeignOptions};
use vbd_image::raw::{Raw, RawOptions};
use vbd_luks::{Luks, LuksOptions, Secret};
use vbd_qcow2::{Qcow2, Qcow2Options};
use vbd_vhd::{Parent, Vhd, VhdOptions};

use crate::chain::{Details, Link, chain, read};
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
    /// What unlocks it, where it is encrypted.
    pub secret: Option<Secret>,
    /// Errors to inject below the channels, for tests.
    pub faults: Option<Arc<dyn Faults>>,
    /// Who keeps the bitmaps of a qcow2 image that is written to: without it they become void.
    pub bitmaps: Option<vbd_qcow2::bitmaps::Kept>,
    /// Note changes of a format's tables beside the image, so that guests go on over a kill of this process.
    pub notes: bool,
}

impl ImageSpec {
    /// The defaults for this file: read and write, O_DIRECT, named as the file.
    pub fn new(path: impl Into<PathBuf>, format: Format) -> Self {
        let RawOptions { path, name, read_only, share, cache, keep_space, lease_wait, faults } =
            RawOptions::new(path);
        let (gate, secret) = (Gate::default(), None);
        ImageSpec {
            path,
            format,
            name,
            read_only,
            share,
            cache,
            keep_space,
            lease_wait,
            gate,
            secret,
            faults,
            bitmaps: None,
            notes: true,
        }
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
    let links = chain(&spec.path, spec.format, &spec.gate)?;
    on_chain(spec, &links)
}

/// The first of these, with those that it stands on under it.
pub(crate) fn on_chain(spec: &ImageSpec, links: &[Link]) -> Result<Arc<dyn Disk>> {
    let mut disk = None;
    let mut under: Option<&Link> = None;
    for link in links.iter().skip(1).rev() {
        let below = ImageSpec {
            path: link.path.clone(),
            format: link.format,
            name: link.path.display().to_string(),
            read_only: true,
            faults: None,
            bitmaps: None,
            ..spec.clone()
        };
        disk = Some(one(&below, link, disk, under)?);
        under = Some(link);
    }
    let top = links.first().ok_or_else(|| Error::new(ErrorKind::Corrupt, "an image has no file"))?;
    one(spec, top, disk, under)
}

/// Makes a disk of one image alone, to stand on a disk that is given whatever it names, or on nothing.
///
/// # Errors
/// As [`open`].
pub fn open_on(spec: &ImageSpec, backing: Option<Arc<dyn Disk>>) -> Result<Arc<dyn Disk>> {
    one(spec, &read(&spec.path, &spec.path, spec.format, &spec.gate)?, backing, None)
}

/// A disk of one file; `under` is what `backing` was made of.
fn one(
    spec: &ImageSpec,
    link: &Link,
    backing: Option<Arc<dyn Disk>>,
    under: Option<&Link>,
) -> Result<Arc<dyn Disk>> {
    if !spec.read_only && !spec.format.is_writable() {
        let message = format!("{} images can be read only: say --read-only, or convert it", spec.format);
        return Err(Error::new(ErrorKind::Unsupported, message).of(spec.path.display().to_string()));
    }
    match &link.details {
        Details::Raw => Ok(Raw::new(spec.raw())),
        Details::Luks(_) => {
            let secret = spec.secret.clone().ok_or_else(|| {
                let message = "is encrypted with LUKS: say --key-file FILE or --key-fd N (`key-file` in a configuration)";
                Error::new(ErrorKind::Unsupported, message).of(spec.path.display().to_string())
            })?;
            Ok(Luks::new(LuksOptions { inner: Raw::new(spec.raw()), path: spec.path.clone(), secret }))
        }
        Details::Qcow2(_) => {
            let data_file = link.data_file.as_ref().map(|path| {
                let disk: Arc<dyn Disk> = Raw::new(RawOptions {
                    path: path.clone(),
                    name: path.display().to_string(),
                    ..spec.raw()
                });
                disk
            });
            Ok(Qcow2::new(Qcow2Options {
                name: spec.name.clone(),
                read_only: spec.read_only,
                share: spec.share,
                cache: spec.cache,
                keep_space: spec.keep_space,
                lease_wait: spec.lease_wait,
                faults: spec.faults.clone(),
                backing,
                data_file,
                secret: spec.secret.clone(),
                bitmaps: spec.bitmaps.clone(),
                notes: spec.notes,
                ..Qcow2Options::new(&spec.path)
            }))
        }
        Details::Foreign(_) => {
            let format = spec.format.foreign().ok_or_else(|| {
                let message = "was read as another format than it is to be opened as";
                Error::new(ErrorKind::Corrupt, message).of(spec.path.display().to_string())
            })?;
            Ok(Foreign::new(ForeignOptions {
                name: spec.name.clone(),
                share: spec.share,
                cache: spec.cache,
                lease_wait: spec.lease_wait,
                faults: spec.faults.clone(),
                ..ForeignOptions::new(&spec.path, format)
            }))
        }
        Details::Vhd(_) => {
            let unique_id = match under.map(|link| &link.details) {
                Some(Details::Vhd(head)) => Some(head.footer.unique_id),
                _ => None,
            };
            Ok(Vhd::new(VhdOptions {
                name: spec.name.clone(),
                read_only: spec.read_only,
                share: spec.share,
                cache: spec.cache,
                keep_space: spec.keep_space,
                lease_wait: spec.lease_wait,
                faults: spec.faults.clone(),
                parent: backing.map(|disk| Parent { disk, unique_id }),
                ..VhdOptions::new(&spec.path)
            }))
        }
    }
}
