//! How large images are, would be, and are to be.

use std::os::fd::AsFd;
use std::path::PathBuf;

use vbd_core::{ExtentKind, SECTOR};
use vbd_formats::{Format, ImageSpec, Kind, NewImage};
use vbd_image::lease::{self, Lease, Mode};

use crate::{Error, Image, Result};

/// What an image would take, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// With what it is to hold.
    pub required: u64,
    /// When all of it was written.
    pub full: u64,
}

/// Tells what a new image would take: with the content of `source`, or else empty.
///
/// # Errors
/// The source cannot be read, or there can be no such image.
pub fn measure(source: Option<&ImageSpec>, mut image: NewImage) -> Result<Measured> {
    let source = source.map(|spec| Image::open(&spec.clone().read_only())).transpose()?;
    if let Some(source) = &source {
        image.size = source.size();
    }
    let mut ranges = Vec::new();
    if let Some(source) = &source {
        source.parts(0, source.size(), |offset, len, kind| {
            if kind == ExtentKind::Data {
                ranges.push((offset, len));
            }
            Ok::<_, Error>(())
        })?;
    }
    match &image.kind {
        Kind::Raw { preallocate } => {
            let data = if *preallocate { image.size } else { ranges.iter().map(|(_, len)| len).sum() };
            Ok(Measured { required: data, full: image.size })
        }
        Kind::Luks => {
            // Zeroes are encrypted too, so all of it is written.
            let full = image.size + vbd_luks::header_len(&vbd_luks::FormatOptions::default());
            Ok(Measured { required: full, full })
        }
        Kind::Vhd(kind) => {
            // Header, footer at both ends, and an entry of the table a block; a block has a bitmap of a bit a sector.
            let block = u64::from(kind.block_size.unwrap_or(2 << 20));
            let blocks = image.size.div_ceil(block);
            let bitmap = (block / SECTOR / 8).next_multiple_of(SECTOR);
            let tables = 2 * SECTOR + 1024 + (blocks * 4).next_multiple_of(SECTOR);
            let full = if kind.fixed { image.size + SECTOR } else { tables + blocks * (bitmap + block) };
            let mut touched: Vec<u64> = ranges
                .iter()
                .flat_map(|(offset, len)| offset / block..(offset + len).div_ceil(block))
                .collect();
            touched.dedup();
            let required = if kind.fixed { full } else { tables + touched.len() as u64 * (bitmap + block) };
            Ok(Measured { required, full })
        }
        Kind::Qcow2(options) => {
            let options =
                vbd_qcow2::CreateOptions { size: image.size, ..vbd_qcow2::CreateOptions::clone(options) };
            let refused = |error: vbd_qcow2::CreateError| Error::Refused(error.to_string());
            let mut measure = vbd_qcow2::Measure::new(&options).map_err(refused)?;
            ranges.iter().for_each(|(offset, len)| measure.add(*offset, *len));
            let measured = measure.finish();
            Ok(Measured { required: measured.required, full: measured.full })
        }
    }
}

/// Gives the disk in an image another size: `size` makes the new one of the old. Gives both.
///
/// # Errors
/// The image is in use, there is no room, or it would become smaller and that was not said, or cannot be done.
pub fn resize(spec: &ImageSpec, size: impl FnOnce(u64) -> Option<u64>, shrink: bool) -> Result<(u64, u64)> {
    let name = spec.path.display();
    let (before, after) = {
        let image = Image::open(spec)?;
        let before = image.size();
        let after = size(before).and_then(|after| after.checked_next_multiple_of(SECTOR));
        let after = after.ok_or_else(|| Error::Refused(format!("{name}: no disk can be that large")))?;
        if after >= before && spec.format != Format::Vhd {
            image.session().grow(after)?;
            image.flush()?;
            return Ok((before, after));
        }
        (before, after)
    };
    if after >= before {
        grow_vhd(spec, after)?;
        return Ok((before, after));
    }
    if !shrink {
        let message = "what is beyond the new size would be lost: say --shrink, if that is meant";
        return Err(Error::Refused(format!("{name}: has {before} bytes; {message}")));
    }
    let (image, lease) = alone(spec)?;
    let refused = |error: &dyn std::fmt::Display| Error::Refused(format!("{name}: {error}"));
    match spec.format {
        Format::Raw => {
            if image.kind == vbd_image::open::Kind::Block {
                let message = "is a block device: its size is not ours to change";
                return Err(refused(&message));
            }
            image.file.set_len(after).map_err(Error::io(&spec.path, "cut it off"))?;
            image.file.sync_all().map_err(Error::io(&spec.path, "make it durable"))?;
        }
        Format::Qcow2 => {
            let data_file = data_file(spec)?;
            vbd_qcow2::shrink(&image.file, after).map_err(|error| refused(&error))?;
            // The image first: a data file may be longer than the disk.
            if let Some((path, data, _lease)) = data_file {
                data.set_len(after).map_err(Error::io(&path, "cut it off"))?;
                data.sync_all().map_err(Error::io(&path, "make it durable"))?;
            }
        }
        Format::Vhd => vbd_vhd::shrink(&image.file, after).map_err(|error| refused(&error))?,
        format => {
            let message = format!("{format} images do not become smaller: convert it to a smaller one");
            return Err(refused(&message));
        }
    }
    drop(lease);
    Ok((before, after))
}

/// The external data file of an image, where it is a file, with its lease.
fn data_file(spec: &ImageSpec) -> Result<Option<(PathBuf, std::fs::File, Lease)>> {
    let links = vbd_formats::chain(&spec.path, spec.format, &spec.gate)?;
    let Some(path) = links.first().and_then(|link| link.data_file.clone()) else { return Ok(None) };
    let (image, lease) = alone(&ImageSpec { path: path.clone(), ..spec.clone() })?;
    let is_file = image.kind == vbd_image::open::Kind::File;
    Ok(is_file.then_some((path, image.file, lease)))
}

/// A VHD's tables move when it grows, so nobody may have it open.
fn grow_vhd(spec: &ImageSpec, size: u64) -> Result<()> {
    let (image, _lease) = alone(spec)?;
    vbd_vhd::grow(&image.file, size)
        .map_err(|error| Error::Refused(format!("{}: {error}", spec.path.display())))?;
    Ok(())
}

/// The file of an image that nobody else uses.
fn alone(spec: &ImageSpec) -> Result<(vbd_image::open::Image, Lease)> {
    let image =
        vbd_image::open::open_to_write(&spec.path).map_err(|error| Error::Refused(error.to_string()))?;
    let options = lease::Options { wait: spec.lease_wait, ..lease::Options::default() };
    let lease = Lease::acquire(image.file.as_fd(), &spec.path, Mode::Write, options)
        .map_err(|error| Error::Refused(error.to_string()))?;
    Ok((image, lease))
}
