//! Which file an image names as the one that it stands on.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

use vbd_core::{Error, ErrorKind, Result};
use vbd_image::lease::{self, Lease, Mode};
use vbd_qcow2::format::{Header, incompatible};

use crate::chain::malformed;
use crate::{Format, ImageSpec};

/// Has an image name another backing file, as it is to be written there, or none. Neither is looked at: what guests read
/// changes, unless the files hold the same. After a power cut the image names the old or the new one.
///
/// # Errors
/// The format has no backing files, the image is in use or damaged, the name is too long, or writing fails.
pub fn set_backing(spec: &ImageSpec, new: Option<(&OsStr, Format)>) -> Result<()> {
    let of = |error: Error| error.of(spec.path.display().to_string());
    let refused = |message: String| of(Error::new(ErrorKind::Unsupported, message));
    if spec.format != Format::Qcow2 {
        return Err(refused(format!("{} images stand on no others", spec.format)));
    }
    let image = vbd_image::open::open_to_write(&spec.path)
        .map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
    let options = lease::Options { wait: spec.lease_wait, ..lease::Options::default() };
    let _lease = Lease::acquire(image.file.as_fd(), &spec.path, Mode::Write, options)
        .map_err(|error| Error::new(ErrorKind::Busy, error.to_string()))?;
    let old = Header::read(&image.file).map_err(|error| of(malformed(error)))?;
    old.refuse_unknown().map_err(|error| of(malformed(error)))?;
    if old.has(incompatible::CORRUPT) {
        let message = "the image is marked as corrupt: repair it first, with `vbd check --repair`";
        return Err(of(Error::new(ErrorKind::Corrupt, message)));
    }
    if new.is_some() && old.raw_data() {
        return Err(refused("its data file has all of the disk, so there can be no backing file".to_owned()));
    }
    if new.is_some_and(|(name, _)| name.is_empty() || name.as_bytes().contains(&0)) {
        return Err(refused("no file has such a name".to_owned()));
    }
    let header =
        vbd_qcow2::with_backing(&old, new.map(|(name, format)| (name.as_bytes(), format.in_images())));
    vbd_qcow2::replace_header(&image.file, &old, &header)
        .map_err(|error| of(Error::io("cannot change its header", error)))
}
