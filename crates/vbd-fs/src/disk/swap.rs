//! Swap space: the header of the Linux kernel's version 1 (`union swap_header`), as mkswap(8) writes it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vbd_image::partition::Guid;

/// Bytes in a page, which the header ends with its signature.
const PAGE: usize = 4096;
/// The smallest swap space, in bytes: ten pages, as mkswap has it.
pub(crate) const SMALLEST: u64 = 10 * PAGE as u64;

/// The most that a header can say, in bytes.
pub(crate) const LARGEST: u64 = PAGE as u64 * u32::MAX as u64;

/// Writes the header of a swap space of `size` bytes that begins at `start`.
///
/// # Errors
///
/// Those of writing.
pub(crate) fn write(file: &File, start: u64, size: u64, uuid: Guid, label: Option<&str>) -> io::Result<()> {
    file.write_all_at(&header(size, uuid, label), start)
}

/// The first page of a swap space of `size` bytes. A kernel with larger pages does not take it: x86-64 and most systems on
/// ARM have 4 KiB.
pub(crate) fn header(size: u64, uuid: Guid, label: Option<&str>) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    let pages = size / PAGE as u64;
    let last = u32::try_from(pages.saturating_sub(1)).unwrap_or(u32::MAX);
    page[1024..1028].copy_from_slice(&1u32.to_le_bytes());
    page[1028..1032].copy_from_slice(&last.to_le_bytes());
    page[1036..1052].copy_from_slice(&uuid.0.to_be_bytes());
    let label = label.unwrap_or_default().as_bytes();
    let length = label.len().min(16);
    page[1052..1052 + length].copy_from_slice(&label[..length]);
    page[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
    page
}
