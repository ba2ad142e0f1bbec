//! An image and all that it names, found without opening any of it as a disk.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use vbd_core::{Error, ErrorKind, Result};
use vbd_qcow2::format::{self as qcow2, Header};
use vbd_vhd::format::{Head, Kind, SizeRule};

use crate::gate::shown;
use crate::{Format, Gate};

/// The most images of a chain: longer ones are no use, and a mistake as a rule.
const MOST: usize = 64;

/// An image of a chain.
#[derive(Clone, Debug)]
pub struct Link {
    /// The file: as it was named for the first, its real path for others.
    pub path: PathBuf,
    /// Its format, as it was told: to us, or by the image that names it.
    pub format: Format,
    /// The virtual disk's size in bytes.
    pub size: u64,
    /// The external data file.
    pub data_file: Option<PathBuf>,
    /// The name of its backing file, as it stands in the image.
    pub backing: Option<String>,
    /// What the format's own header says.
    pub details: Details,
}

/// What only one format has.
#[derive(Clone, Debug)]
pub enum Details {
    /// Raw images have nothing but their bytes.
    Raw,
    /// A qcow2 image's header.
    Qcow2(Box<Header>),
    /// What a VHD has at its ends.
    Vhd(Box<vbd_vhd::format::Head>),
    /// What an encrypted disk's header says, for people.
    Luks(String),
    /// What kind an image of another program is.
    Foreign(&'static str),
}

/// The images that make up a disk: the one that was asked for first, the one that all stand on last.
///
/// # Errors
/// One of them is missing, malformed or kept back by the gate; they go round in a circle; or there are too many.
pub fn chain(path: &Path, format: Format, gate: &Gate) -> Result<Vec<Link>> {
    match broken_chain(path, format, gate) {
        (links, None) => Ok(links),
        (_, Some(error)) => Err(error),
    }
}

/// The same as far as it can be found, and why not further.
pub fn broken_chain(path: &Path, format: Format, gate: &Gate) -> (Vec<Link>, Option<Error>) {
    let mut links: Vec<Link> = Vec::new();
    let mut seen: Vec<(u64, u64)> = Vec::new();
    let mut next = Some((path.to_owned(), format));
    while let Some((file, format)) = next.take() {
        if links.len() == MOST {
            let message = format!("its chain has more than {MOST} images: `vbd flatten` makes one of some");
            let error = Error::new(ErrorKind::Unsupported, message).of(shown(path.as_os_str()));
            return (links, Some(error));
        }
        let link = read(path, &file, format, gate).and_then(|link| {
            once(path, &link, &mut seen)?;
            Ok(link)
        });
        match link.and_then(|link| {
            let named = below(path, &link, gate);
            links.push(link);
            named
        }) {
            Ok(named) => next = named,
            Err(error) => return (links, Some(error)),
        }
    }
    (links, None)
}

/// Refuses a file that the chain has already; files are told apart by device and inode.
fn once(top: &Path, link: &Link, seen: &mut Vec<(u64, u64)>) -> Result<()> {
    for file in std::iter::once(&link.path).chain(&link.data_file) {
        let error = |error| Error::io("cannot look at it", error).of(shown(file.as_os_str()));
        let metadata = file.metadata().map_err(error)?;
        let identity = (metadata.dev(), metadata.ino());
        if seen.contains(&identity) {
            let message = format!(
                "its chain comes back to {}: name another backing file with `vbd rebase --unsafe`",
                shown(file.as_os_str())
            );
            return Err(Error::new(ErrorKind::Corrupt, message).of(shown(top.as_os_str())));
        }
        seen.push(identity);
    }
    Ok(())
}

/// What one file says of itself.
pub(crate) fn read(top: &Path, path: &Path, format: Format, gate: &Gate) -> Result<Link> {
    let name = || shown(path.as_os_str());
    let image = vbd_image::open::open(path).map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
    let plain = Link {
        path: path.to_owned(),
        format,
        size: image.size,
        data_file: None,
        backing: None,
        details: Details::Raw,
    };
    match format {
        Format::Raw => Ok(plain),
        Format::Qcow2 => {
            let header = Header::read(&image.file).map_err(|error| foreign(&image, error).of(name()))?;
            header.refuse_unknown().map_err(|error| malformed(error).of(name()))?;
            let data_file = match header.data_file() {
                // The image keeps its own name for it; without one it could be anything.
                None if header.incompatible & qcow2::incompatible::DATA_FILE != 0 => {
                    let message = "its data is in another file, and it does not say which";
                    return Err(Error::new(ErrorKind::Unsupported, message).of(name()));
                }
                None => None,
                Some(data) => Some(gate.pass(top, path, OsStr::from_bytes(data), "data file")?),
            };
            Ok(Link {
                // As guests see it: whole sectors.
                size: header.size.next_multiple_of(512),
                data_file,
                backing: header.backing.as_deref().map(|name| shown(OsStr::from_bytes(name))),
                details: Details::Qcow2(Box::new(header)),
                ..plain
            })
        }
        Format::Vhd => {
            let head =
                Head::read(&image.file, image.size).map_err(|error| not_a_vhd(&image, &error).of(name()))?;
            let size = head.size(SizeRule::Maker).map_err(|error| bad_vhd(&error).of(name()))?;
            let names = head.parent_names(&image.file).unwrap_or_default();
            Ok(Link {
                size,
                backing: names.first().map(|name| shown(OsStr::new(&name.path))),
                details: Details::Vhd(Box::new(head)),
                ..plain
            })
        }
        Format::Vmdk => foreign_image(&image, vbd_foreign::Format::Vmdk, plain),
        Format::Vdi => foreign_image(&image, vbd_foreign::Format::Vdi, plain),
        Format::Vhdx => foreign_image(&image, vbd_foreign::Format::Vhdx, plain),
        Format::Luks => {
            let header = vbd_luks::Header::read(&image.file)
                .map_err(|error| Error::new(ErrorKind::Corrupt, error.to_string()).of(name()))?;
            Ok(Link { size: header.data_len(image.size), details: Details::Luks(header.describe()), ..plain })
        }
    }
}

/// What an image names as its backing file.
fn below(top: &Path, link: &Link, gate: &Gate) -> Result<Option<(PathBuf, Format)>> {
    let header = match &link.details {
        Details::Raw | Details::Foreign(_) | Details::Luks(_) => return Ok(None),
        Details::Qcow2(header) => header,
        Details::Vhd(head) => return parent(top, link, head, gate),
    };
    let Some(name) = &header.backing else { return Ok(None) };
    let image = || shown(link.path.as_os_str());
    let Some(told) = header.backing_format() else {
        let message = "does not say which format its backing file has, and that is never guessed: record it with \
                       `vbd rebase --unsafe --backing FILE --backing-format raw` (or qcow2)";
        return Err(Error::new(ErrorKind::Unsupported, message).of(image()));
    };
    let format = std::str::from_utf8(told).ok().and_then(|name| name.parse().ok());
    let format = format.ok_or_else(|| {
        let told = shown(OsStr::from_bytes(told));
        Error::new(
            ErrorKind::Unsupported,
            format!("its backing file has the format `{told}`, which is not read"),
        )
        .of(image())
    })?;
    Ok(Some((gate.pass(top, &link.path, OsStr::from_bytes(name), "backing file")?, format)))
}

/// What a differencing VHD names as its parent: the first of its names that leads to a file. A parent with an identity is
/// a VHD; one without is a raw disk.
fn parent(
    top: &Path,
    link: &Link,
    head: &vbd_vhd::format::Head,
    gate: &Gate,
) -> Result<Option<(PathBuf, Format)>> {
    let Some(header) = head.header.as_ref().filter(|_| head.footer.kind == Kind::Differencing) else {
        return Ok(None);
    };
    let image = || shown(link.path.as_os_str());
    let file =
        vbd_image::open::open(&link.path).map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?.file;
    let names = head.parent_names(&file).map_err(|error| bad_vhd(&error).of(image()))?;
    let format = if header.parent_unique_id == [0; 16] { Format::Raw } else { Format::Vhd };
    let mut first = None;
    for name in names {
        match gate.pass(top, &link.path, OsStr::new(&name.path), "parent") {
            Ok(path) => return Ok(Some((path, format))),
            Err(error) => {
                // A file that the gate keeps back is of more interest than one that is not there.
                let better = error.kind() != ErrorKind::Corrupt;
                if better || first.is_none() {
                    first = Some(error);
                }
            }
        }
    }
    Err(first.unwrap_or_else(|| {
        Error::new(ErrorKind::Corrupt, "does not say which file its parent is").of(image())
    }))
}

fn bad_vhd(error: &vbd_vhd::format::FormatError) -> Error {
    Error::new(ErrorKind::Corrupt, error.to_string())
}

pub(crate) fn malformed(error: qcow2::Error) -> Error {
    Error::new(ErrorKind::Corrupt, error.to_string())
}

/// An image of another program, which names no other.
fn foreign_image(image: &vbd_image::open::Image, format: vbd_foreign::Format, plain: Link) -> Result<Link> {
    let layout = vbd_foreign::read(format, &image.file, image.size).map_err(|error| {
        let message = match crate::identify(&image.file, image.size) {
            Ok(Some(other)) if other != format.to_string() => {
                format!("is no {format} image: it begins like a {other} image; say its format")
            }
            _ => error.to_string(),
        };
        Error::new(ErrorKind::Corrupt, message).of(shown(plain.path.as_os_str()))
    })?;
    Ok(Link { size: layout.size(), details: Details::Foreign(layout.kind()), ..plain })
}

fn not_a_vhd(image: &vbd_image::open::Image, error: &vbd_vhd::format::FormatError) -> Error {
    match crate::identify(&image.file, image.size) {
        Ok(Some(other)) if other != Format::Vhd.name() => Error::new(
            ErrorKind::Corrupt,
            format!("is no VHD: it begins like a {other} image; say its format"),
        ),
        _ => bad_vhd(error),
    }
}

/// Names what a file is instead, where it is something else that is known.
fn foreign(image: &vbd_image::open::Image, error: qcow2::Error) -> Error {
    match crate::identify(&image.file, image.size) {
        Ok(Some(other)) if other != Format::Qcow2.name() => Error::new(
            ErrorKind::Corrupt,
            format!("is no qcow2 image: it begins like a {other} image; say its format"),
        ),
        _ => malformed(error),
    }
}
