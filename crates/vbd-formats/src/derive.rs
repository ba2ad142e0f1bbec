//! Images made of others, in files that have no names yet: opened by their descriptors, so that nobody sees them half made.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vbd_core::{Disk, Error, ErrorKind, Result};
use vbd_qcow2::format::Encryption;
use vbd_qcow2::{Backing, CreateOptions};

use crate::gate::{directory_of, shown};
use crate::open::on_chain;
use crate::{Details, Format, ImageSpec, Link, chain, open, open_on};

/// Makes an empty file a qcow2 image that stands on `base` and has the size of its disk. The file will be called `at`, from
/// where the image names its base: by a relative name where that is in or below the same directory. The disk is opened
/// while the file is open.
///
/// # Errors
/// The base cannot be opened, is no regular file, or is encrypted: what is written to the image would not be. Writing fails.
pub fn overlay(file: &File, at: &Path, base: &ImageSpec) -> Result<Arc<dyn Disk>> {
    let refused =
        |why: &str| Error::new(ErrorKind::Unsupported, why.to_owned()).of(shown(base.path.as_os_str()));
    let name = name_from(at, &base.path)?;
    if !base.path.is_file() {
        return Err(refused("is no regular file, and an image names no other as what it stands on"));
    }
    let links = chain(&base.path, base.format, &base.gate)?;
    if links.iter().any(is_encrypted) {
        return Err(refused("is encrypted, and what is written to an overlay of it would not be"));
    }
    let size = links.first().map(|link| link.size.next_multiple_of(512)).unwrap_or_default();
    let backing =
        Backing { name: name.as_os_str().as_bytes().to_vec(), format: base.format.in_images().to_owned() };
    let options = CreateOptions { size, backing: Some(backing), ..CreateOptions::default() };
    vbd_qcow2::create_in(file, &options)
        .map_err(|error| Error::new(ErrorKind::Io, error.to_string()).of(shown(at.as_os_str())))?;
    let below = open(&base.clone().read_only())?;
    let top = ImageSpec { cache: base.cache, ..ImageSpec::new(own_path(file), Format::Qcow2) };
    open_on(&top, Some(below))
}

/// Opens a file that holds the same bytes as the image `original`, to become another one beside it that is called `at`.
///
/// # Errors
/// As [`open()`]; the original keeps its data in another file, or stands on one that would not be found from `at`.
pub fn open_copy(file: &File, at: &Path, original: &ImageSpec) -> Result<Arc<dyn Disk>> {
    let refused =
        |why: &str| Error::new(ErrorKind::Unsupported, why.to_owned()).of(shown(original.path.as_os_str()));
    let links = chain(&original.path, original.format, &original.gate)?;
    if links.iter().any(|link| link.data_file.is_some()) {
        return Err(refused("has its data in another file, which a copy of it alone would share"));
    }
    if links.len() > 1 && real(directory_of(at))? != real(directory_of(&real(&original.path)?))? {
        return Err(refused("stands on another file, which a copy in another directory would not find"));
    }
    on_chain(&ImageSpec { path: own_path(file), bitmaps: None, ..original.clone() }, &links)
}

fn is_encrypted(link: &Link) -> bool {
    match &link.details {
        Details::Luks(_) => true,
        Details::Qcow2(header) => header.encryption != Encryption::None,
        Details::Raw | Details::Vhd(_) | Details::Foreign(_) => false,
    }
}

/// The name of a file that is open, if it has one or not.
fn own_path(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

fn real(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|error| Error::io("cannot find it", error).of(shown(path.as_os_str())))
}

/// What an image at `at` calls a file.
fn name_from(at: &Path, file: &Path) -> Result<PathBuf> {
    let (directory, file) = (real(directory_of(at))?, real(file)?);
    let Ok(below) = file.strip_prefix(&directory) else { return Ok(file) };
    // A name with a colon in its first part would be a protocol's.
    let protocol = below.iter().next().is_some_and(|first| first.as_bytes().contains(&b':'));
    Ok(if protocol { Path::new(".").join(below) } else { below.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_from_where_the_image_is() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("vms/bases")).unwrap();
        for name in ["base", "vms/a:b", "vms/bases/c"] {
            std::fs::write(root.join(name), "").unwrap();
        }
        let named = |file: &str| name_from(&root.join("vms/new"), &root.join(file)).unwrap();
        assert_eq!(named("base"), root.join("base"));
        assert_eq!(named("vms/a:b"), Path::new("./a:b"));
        assert_eq!(named("vms/bases/../bases/c"), Path::new("bases/c"));
        assert!(name_from(&root.join("none/new"), &root.join("base")).is_err());
    }
}
