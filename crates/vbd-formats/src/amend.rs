//! Changes of an image that is there: options of its format, and the keys of an encrypted one.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use vbd_core::{Error, ErrorKind, Result};
use vbd_image::ReadAt;
use vbd_image::lease::{self, Lease, Mode};
use vbd_image::open::Image;
use vbd_luks::{LuksError, Secret, SlotChange, Which};
use vbd_qcow2::Amend;
use vbd_qcow2::format::Header;

use crate::chain::malformed;
use crate::{Format, ImageSpec};

/// A change of an encrypted image's keys.
#[derive(Clone, Debug)]
pub enum KeyChange {
    /// A further key opens it.
    Add(Secret),
    /// This key opens it no more.
    Remove(Secret),
    /// The key slot of this number, from 0 on, opens it no more.
    RemoveSlot(usize),
}

/// Changes options of a qcow2 image that nobody uses, and says what was done. After a power cut it has each change or not.
///
/// # Errors
/// The format has no options, what is asked for cannot be, the image is in use or not in order, or it cannot be written.
pub fn amend(spec: &ImageSpec, wanted: &Amend) -> Result<Vec<String>> {
    if spec.format != Format::Qcow2 {
        let message = format!("a {} image has no options that could be changed", spec.format);
        return Err(Error::new(ErrorKind::Unsupported, message).of(label(spec)));
    }
    let (image, _lease) = alone(spec)?;
    sound(spec, &image, wanted)
}

fn sound(spec: &ImageSpec, image: &Image, wanted: &Amend) -> Result<Vec<String>> {
    vbd_qcow2::amend(&image.file, wanted)
        .map_err(|error| Error::new(ErrorKind::Unsupported, error.to_string()).of(label(spec)))
}

/// Changes the keys of an encrypted image that nobody uses, and tells which key slots have changed. After a power cut each key
/// opens it that does so before and after.
///
/// # Errors
/// The image is not encrypted, is in use or not in order; the key is wrong; it is the last one; or it cannot be written.
pub fn change_key(spec: &ImageSpec, change: &KeyChange) -> Result<Vec<usize>> {
    let refused = |message: &str| Error::new(ErrorKind::Unsupported, message).of(label(spec));
    let (image, _lease) = alone(spec)?;
    // Where the header with its key slots is, and how many bytes it has.
    let (start, room) = match spec.format {
        Format::Luks => {
            let header = vbd_luks::Header::read(&image.file).map_err(|error| error.of(&label(spec)))?;
            (0, header.payload_offset().min(image.size))
        }
        Format::Qcow2 => {
            // Where tables lie over each other, keys would be written over something else.
            sound(spec, &image, &Amend::default())?;
            let header = Header::read(&image.file).map_err(|error| malformed(error).of(label(spec)))?;
            let place = header.crypto().ok_or_else(|| refused("is not encrypted"))?;
            (place.offset, place.length)
        }
        other => return Err(refused(&format!("a {other} image is not encrypted"))),
    };
    let slots = Slots { image: &image, start };
    let change = plan(&slots, room, spec.secret.as_ref(), change).map_err(|error| error.of(&label(spec)))?;
    for step in &change.steps {
        let written = image.file.write_all_at(&step.bytes, start + step.offset);
        written
            .and_then(|()| image.file.sync_data())
            .map_err(|error| Error::io("cannot write its key slots", error).of(label(spec)))?;
    }
    Ok(change.slots)
}

fn plan(
    slots: &Slots<'_>,
    room: u64,
    secret: Option<&Secret>,
    change: &KeyChange,
) -> std::result::Result<SlotChange, LuksError> {
    let header = vbd_luks::Header::read(slots)?;
    let missing = || {
        let message = "say a key that opens it, too: --key-file FILE or --key-fd N";
        LuksError::Unsupported(message.to_owned())
    };
    match change {
        KeyChange::Add(new) => header.add_key(slots, room, secret.ok_or_else(missing)?, new, None),
        KeyChange::Remove(key) => header.remove_key(slots, room, Which::Opened(key)),
        KeyChange::RemoveSlot(number) => {
            // Whoever goes by a number has to have a key that stays.
            let opened = header.opened(slots, secret.ok_or_else(missing)?)?;
            if opened.is_empty() {
                return Err(LuksError::WrongKey);
            }
            if opened == [*number] {
                let message = format!("key slot {number} is the one that the key opens, and no other");
                return Err(LuksError::Unsupported(message));
            }
            header.remove_key(slots, room, Which::Number(*number))
        }
    }
}

/// The file from the start of its key slots on.
struct Slots<'a> {
    image: &'a Image,
    start: u64,
}

impl ReadAt for Slots<'_> {
    fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.image.file.fill_at(self.start.saturating_add(offset), buffer)
    }
}

fn label(spec: &ImageSpec) -> String {
    spec.path.display().to_string()
}

fn alone(spec: &ImageSpec) -> Result<(Image, Lease)> {
    let image = vbd_image::open::open_to_write(&spec.path)
        .map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
    let options = lease::Options { wait: spec.lease_wait, ..lease::Options::default() };
    let lease = Lease::acquire(image.file.as_fd(), &spec.path, Mode::Write, options)
        .map_err(|error| Error::new(ErrorKind::Busy, error.to_string()))?;
    Ok((image, lease))
}
