//! A larger disk in the same file, while nobody uses it.
//!
//! A table of blocks that is too short is written anew behind the last block, and the header's first sector, which
//! names its place and length, is the switch: one sector, old or new. The room of the old one is not used again.

use crate::check::look;
use crate::format::{
    FOOTER_LEN, FooterPlace, FormatError, HEADER_LEN, Head, MOST_BYTES, MOST_ENTRIES, SECTOR, SizeRule,
    UNUSED, chs,
};
use crate::shrink::clear_beyond;
use crate::storage::Storage;

/// Why a disk was not made larger or smaller.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// The size cannot be.
    #[error("{size} bytes: {what}")]
    Size {
        /// The size that was asked for.
        size: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The image is not in order.
    #[error("{0}: have it checked and repaired first")]
    Problem(String),
    /// It cannot be done here.
    #[error("{0}")]
    Unsupported(&'static str),
    /// It cannot be read, or is no VHD.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// It cannot be written. The disk has its old size or its new one.
    #[error("cannot write it: {0}")]
    Io(#[from] std::io::Error),
}

/// Makes a disk larger: to `size` bytes. What is new reads as zeroes (of a differencing disk: as its parent has it, and
/// zeroes behind that). The power may go at any time: then the disk has the one size or the other, and all of its content.
///
/// # Errors
/// The size is smaller or cannot be, the image is not in order, or it cannot be written.
pub fn grow(file: &(impl Storage + ?Sized), size: u64) -> Result<(), GrowError> {
    let refuse = |what| Err(GrowError::Size { size, what });
    let (head, now) = sound(file)?;
    if !size.is_multiple_of(SECTOR) || size > MOST_BYTES {
        return refuse("a multiple of 512 up to 2040 GiB is possible");
    }
    if size < now {
        return refuse("that is less than it has");
    }
    if size == now {
        return Ok(());
    }
    match &head.header {
        None => grow_fixed(file, &head, now, size),
        Some(_) => grow_dynamic(file, &head, now, size),
    }
}

/// An image that is in order, and its size in bytes.
pub(crate) fn sound(file: &(impl Storage + ?Sized)) -> Result<(Head, u64), GrowError> {
    let len = file.length()?;
    let report = look(file, len)?;
    if let Some(problem) = report.problems.iter().find(|problem| problem.is_error()) {
        return Err(GrowError::Problem(problem.to_string()));
    }
    let head = Head::read(file, len)?;
    let size = head.size(SizeRule::Maker)?;
    Ok((head, size))
}

/// The footer with another size, which counts whoever reads it.
pub(crate) fn resized(head: &Head, size: u64) -> [u8; FOOTER_LEN] {
    let mut footer = head.footer.clone();
    footer.current_size = size;
    footer.geometry = chs(size / SECTOR);
    if footer.size(SizeRule::Maker) != size {
        // Its maker goes by the geometry, which cannot express every size.
        footer.creator = *b"qem2";
    }
    footer.encode()
}

fn grow_fixed(file: &(impl Storage + ?Sized), head: &Head, now: u64, size: u64) -> Result<(), GrowError> {
    let old_footer = head.file_len - FOOTER_LEN as u64;
    if size < old_footer + FOOTER_LEN as u64 {
        return Err(GrowError::Unsupported(
            "its footer lies far behind its content: convert it to a new image instead",
        ));
    }
    // Without the new footer the old one is at the end, and counts.
    file.write_all_at(size, &resized(head, size))?;
    file.sync()?;
    // Until here the disk's new part holds the old footer.
    let zeroes = vec![0; 1 << 16];
    let (mut at, end) = (now, old_footer + FOOTER_LEN as u64);
    while at < end {
        let len = (end - at).min(zeroes.len() as u64);
        file.write_all_at(at, &zeroes[..usize::try_from(len).expect("small")])?;
        at += len;
    }
    Ok(file.sync()?)
}

fn grow_dynamic(file: &(impl Storage + ?Sized), head: &Head, now: u64, size: u64) -> Result<(), GrowError> {
    let Some(header) = &head.header else { return Ok(()) };
    let mut table = head.table(file)?;
    // It may have been larger once, and what is beyond its end must not come back.
    if !head.has_batmap() {
        clear_beyond(file, header, &mut table, now)?;
    }
    let mut end = head.content_end(&table);
    let blocks = header.blocks(size);
    if blocks > u64::from(header.entries) {
        if head.has_batmap() {
            return Err(GrowError::Unsupported(
                "tapdisk's table lies behind the table of blocks, which would have to move: convert it to a new image",
            ));
        }
        let entries = u32::try_from(blocks).ok().filter(|entries| *entries <= MOST_ENTRIES);
        let entries = entries.ok_or(GrowError::Unsupported("its blocks are too small for that size"))?;
        let mut longer = header.clone();
        (longer.entries, longer.table_offset) = (entries, end);
        let mut bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let table_len = usize::try_from(longer.table_len()).expect("64 MiB at most");
        bytes.resize(table_len, UNUSED.to_be_bytes()[0]);
        // The table comes over the footer, for which its copy stands meanwhile.
        file.write_all_at(end, &bytes)?;
        end += table_len as u64;
        file.write_all_at(end, &head.footer.encode())?;
        file.sync()?;
        let switch: [u8; HEADER_LEN] = longer.encode();
        file.write_all_at(head.footer.data_offset, &switch[..FOOTER_LEN])?;
        file.sync()?;
    } else if head.place != FooterPlace::Good || head.file_len != end + FOOTER_LEN as u64 {
        file.write_all_at(end, &head.footer.encode())?;
        file.sync()?;
    }
    // The copy at the start counts where the two differ.
    let footer = resized(head, size);
    file.write_all_at(0, &footer)?;
    file.sync()?;
    file.write_all_at(end, &footer)?;
    file.set_len(end + FOOTER_LEN as u64)?;
    Ok(file.sync()?)
}
