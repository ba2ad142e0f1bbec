//! Making images of any format.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use vbd_core::{Error, ErrorKind, Result};
use vbd_image::size::Size;
use vbd_luks::Secret;
use vbd_vhd::create::ParentLink;

use crate::gate::directory_of;
use crate::{Format, Gate, chain};

/// What a new image is to be.
#[derive(Clone, Debug)]
pub enum Kind {
    /// The bytes of the disk.
    Raw {
        /// Allocate all of them.
        preallocate: bool,
    },
    /// A qcow2 image; its size and what becomes of a file that is there are those of [`NewImage`].
    Qcow2(Box<vbd_qcow2::CreateOptions>),
    /// A VHD.
    Vhd(VhdKind),
    /// A disk encrypted with a new key.
    Luks,
}

/// How a new VHD is to be.
#[derive(Clone, Debug, Default)]
pub struct VhdKind {
    /// All of it in order, instead of blocks that come when they are written.
    pub fixed: bool,
    /// Allocate a fixed disk's room at once.
    pub preallocate: bool,
    /// Bytes of a block; 2 MiB unless said.
    pub block_size: Option<u32>,
    /// Its parent, as it is to be named in the image, and that file's format.
    pub parent: Option<(PathBuf, Format)>,
}

/// A new image.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// What it is to be.
    pub kind: Kind,
    /// The virtual disk's size in bytes; a multiple of 512, except for raw images.
    pub size: u64,
    /// Replace a file that is there, unless it is in use.
    pub replace: bool,
    /// Encrypt it with a new key, which this unlocks. For LUKS and qcow2.
    pub secret: Option<Secret>,
}

impl NewImage {
    /// An image of a format with what is usual there.
    ///
    /// # Errors
    /// Images of this format are only read.
    pub fn new(format: Format, size: u64) -> Result<Self> {
        let kind = match format {
            Format::Raw => Kind::Raw { preallocate: false },
            Format::Qcow2 => Kind::Qcow2(Box::default()),
            Format::Vhd => Kind::Vhd(VhdKind::default()),
            Format::Luks => Kind::Luks,
            Format::Vmdk | Format::Vdi | Format::Vhdx => {
                let message = format!("{format} images are read, not made: make a raw, qcow2 or vhd image");
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
        };
        Ok(NewImage { kind, size, replace: false, secret: None })
    }

    /// Its format.
    pub fn format(&self) -> Format {
        match self.kind {
            Kind::Raw { .. } => Format::Raw,
            Kind::Qcow2(_) => Format::Qcow2,
            Kind::Vhd(_) => Format::Vhd,
            Kind::Luks => Format::Luks,
        }
    }

    /// The file that it will stand on, and that file's format, once it is at `path`: as it will be read when the image is
    /// opened.
    ///
    /// # Errors
    /// The name is no file's, or there is none.
    pub fn backing(&self, path: &Path) -> Result<Option<(PathBuf, Format)>> {
        let shown = || path.display().to_string();
        let (name, format) = match &self.kind {
            Kind::Raw { .. } | Kind::Luks => return Ok(None),
            Kind::Qcow2(options) => {
                let Some(backing) = &options.backing else { return Ok(None) };
                let format = backing.format.parse::<Format>();
                let format = format.map_err(|error| Error::new(ErrorKind::Unsupported, error.to_string()))?;
                (OsStr::from_bytes(&backing.name), format)
            }
            Kind::Vhd(options) => {
                let Some((name, format)) = &options.parent else { return Ok(None) };
                (name.as_os_str(), *format)
            }
        };
        let file = directory_of(path).join(name).canonicalize().map_err(|error| {
            let message = format!("cannot find its backing file {} (relative to the image)", name.display());
            Error::io(message, error).of(shown())
        })?;
        Ok(Some((file, format)))
    }

    /// A gate that lets through what this image is told to name at `path`, since whoever makes it says so.
    ///
    /// # Errors
    /// As [`backing`](Self::backing).
    pub fn gate(&self, path: &Path, gate: &Gate) -> Result<Gate> {
        let mut directories: Vec<_> = gate.allowed().to_vec();
        if let Some((file, _)) = self.backing(path)? {
            directories.push(directory_of(&file).to_owned());
        }
        if let Kind::Qcow2(options) = &self.kind
            && let Some(data) = &options.data_file
        {
            directories.push(directory_of(&directory_of(path).join(&data.path)).to_owned());
        }
        Ok(Gate::new(directories))
    }
}

/// The size of the disk that an image stands on, in bytes: what a new one has unless told otherwise.
///
/// # Errors
/// It cannot be told.
pub fn backing_size(path: &Path, image: &NewImage, gate: &Gate) -> Result<Option<u64>> {
    let Some((file, format)) = image.backing(path)? else { return Ok(None) };
    let links = chain(&file, format, gate)?;
    Ok(links.first().map(|link| link.size.next_multiple_of(512)))
}

/// What a new VHD says of its parent.
fn parent(path: &Path, image: &NewImage, kind: &VhdKind) -> Result<Option<ParentLink>> {
    let (Some((name, _)), Some((file, format))) = (&kind.parent, image.backing(path)?) else {
        return Ok(None);
    };
    let shown = || file.display().to_string();
    let failed = |error| Error::io("cannot look at it", error).of(shown());
    let opened =
        vbd_image::open::open(&file).map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
    let unique_id = match format {
        Format::Raw => None,
        Format::Vhd => {
            let head = vbd_vhd::format::Head::read(&opened.file, opened.size);
            let head = head.map_err(|error| Error::new(ErrorKind::Corrupt, error.to_string()).of(shown()))?;
            Some(head.footer.unique_id)
        }
        other => {
            let message = format!("a VHD stands on a VHD or a raw disk, not on a {other} image");
            return Err(Error::new(ErrorKind::Unsupported, message).of(path.display().to_string()));
        }
    };
    let changed = opened.file.metadata().and_then(|metadata| metadata.modified()).map_err(failed)?;
    Ok(Some(ParentLink { path: name.clone(), unique_id, changed }))
}

/// Makes an empty image, whole or not at all.
///
/// # Errors
/// The file cannot be made, or the format cannot be so.
pub fn create(path: &Path, image: &NewImage) -> Result<()> {
    let refused = |message: String| Error::new(ErrorKind::Unsupported, message);
    if image.secret.is_some() && !matches!(image.kind, Kind::Luks | Kind::Qcow2(_)) {
        let message = format!("a {} image cannot be encrypted: make a luks or qcow2 image", image.format());
        return Err(refused(message));
    }
    match &image.kind {
        Kind::Raw { preallocate } => {
            let size = Size::from_bytes(image.size).map_err(|error| refused(error.to_string()))?;
            vbd_image::create::create(path, size, *preallocate, image.replace)
                .map_err(|error| Error::new(ErrorKind::Io, error.to_string()))
        }
        Kind::Qcow2(options) => {
            let options = vbd_qcow2::CreateOptions {
                size: image.size,
                replace: image.replace,
                luks_header: image.secret.as_ref().map(|secret| luks_header(path, secret)).transpose()?,
                ..vbd_qcow2::CreateOptions::clone(options)
            };
            vbd_qcow2::create(path, &options).map_err(|error| {
                let kind = match &error {
                    vbd_qcow2::CreateError::Refused(_) => ErrorKind::Unsupported,
                    vbd_qcow2::CreateError::NoRoom { .. } => ErrorKind::NoSpace,
                    _ => ErrorKind::Io,
                };
                Error::new(kind, error.to_string())
            })
        }
        Kind::Luks => encrypted(path, image),
        Kind::Vhd(kind) => {
            let mut options = vbd_vhd::create::CreateOptions::new(image.size);
            (options.fixed, options.preallocate, options.replace) =
                (kind.fixed, kind.preallocate, image.replace);
            options.block_size = kind.block_size.unwrap_or(options.block_size);
            options.parent = parent(path, image, kind)?;
            vbd_vhd::create(path, &options).map_err(|error| Error::new(ErrorKind::Io, error.to_string()))
        }
    }
}

/// A header with a new key. This takes as long as unlocking it will.
fn luks_header(path: &Path, secret: &Secret) -> Result<Vec<u8>> {
    vbd_luks::format(secret, &vbd_luks::FormatOptions::default())
        .map_err(|error| Error::new(ErrorKind::Io, error.to_string()).of(path.display().to_string()))
}

/// Makes an encrypted disk: a LUKS header, and behind it as many bytes as the disk is to have.
fn encrypted(path: &Path, image: &NewImage) -> Result<()> {
    let shown = || path.display().to_string();
    let failed = |error| Error::io("cannot write it", error).of(shown());
    let secret = image.secret.as_ref().ok_or_else(|| {
        let message = "an encrypted disk needs a key: say --key-file FILE or --key-fd N";
        Error::new(ErrorKind::Unsupported, message).of(shown())
    })?;
    if image.size == 0 || !image.size.is_multiple_of(512) {
        let message = format!("{} bytes: an encrypted disk has a multiple of 512", image.size);
        return Err(Error::new(ErrorKind::Unsupported, message).of(shown()));
    }
    let draft = vbd_image::create::Draft::new(path, image.replace)
        .map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
    let header = luks_header(path, secret)?;
    let file = draft.file();
    std::os::unix::fs::FileExt::write_all_at(file, &header, 0).map_err(failed)?;
    let len = image.size.checked_add(header.len() as u64);
    let len =
        len.ok_or_else(|| Error::new(ErrorKind::Unsupported, "is larger than a file can be").of(shown()))?;
    file.set_len(len).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    draft.publish().map_err(|error| Error::new(ErrorKind::Io, error.to_string()))
}
