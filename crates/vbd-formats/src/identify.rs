//! What a file looks like: for people, and to refuse to take another format for raw unasked. Never to decide how a file
//! is opened.

use std::path::Path;

use vbd_core::{Error, ErrorKind, Result};
use vbd_image::ReadAt;

/// The bytes that are looked at from the start.
const HEAD: usize = 512;
/// Where a VHD's footer is, counted from the end.
const FOOTER: u64 = 512;

/// The name of the disk format whose header is at the start (or, of VHD, at the end) of these `size` bytes; none where
/// it is that of no format that is known here, as it is for raw images.
///
/// # Errors
/// Those of reading.
pub fn identify<S: ReadAt + ?Sized>(source: &S, size: u64) -> std::io::Result<Option<&'static str>> {
    let mut head = [0; HEAD];
    let len = source.fill_at(0, &mut head)?;
    let head = &head[..len];
    let has = |at: usize, magic: &[u8]| head.get(at..at + magic.len()) == Some(magic);
    let found = if has(0, b"QFI\xfb") {
        // The format's first version and its later ones share the magic (QEMU's docs/interop/qcow2, "Header").
        Some(if has(4, &[0, 0, 0, 1]) { "qcow" } else { "qcow2" })
    } else if has(0, b"QED\0") {
        Some("qed")
    } else if has(0, b"conectix") {
        Some("vhd")
    } else if has(0, b"vhdxfile") {
        Some("vhdx")
    } else if has(0, b"KDMV") || has(0, b"COWD") || has(0, b"# Disk DescriptorFile") {
        Some("vmdk")
    } else if has(64, &[0x7f, 0x10, 0xda, 0xbe]) {
        Some("vdi")
    } else {
        None
    };
    if found.is_some() || size < FOOTER {
        return Ok(found);
    }
    // A fixed VHD has nothing but its footer (Virtual Hard Disk Image Format Specification, "Fixed Hard Disk Image").
    let mut cookie = [0; 8];
    let len = source.fill_at(size - FOOTER, &mut cookie)?;
    Ok((len == 8 && cookie == *b"conectix").then_some("vhd"))
}

/// Refuses to take the file for raw, where nobody said what it is and it looks like something else. `option` is how the
/// format is told.
///
/// # Errors
/// It cannot be read, or shows another format's header.
pub fn assumed_raw(path: &Path, option: &str) -> Result<()> {
    let name = || path.display().to_string();
    let image = vbd_image::open::open(path).map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
    let found =
        identify(&image.file, image.size).map_err(|error| Error::io("cannot read", error).of(name()))?;
    match found {
        None => Ok(()),
        Some(format) => {
            let say = match format.parse::<crate::Format>() {
                Ok(format) => format!("say {option} {format}"),
                Err(error) => error.to_string(),
            };
            let message = format!(
                "is a {format} image, it seems: {say}; or {option} raw, if it is a guest that wrote that"
            );
            Err(Error::new(ErrorKind::Unsupported, message).of(name()))
        }
    }
}
