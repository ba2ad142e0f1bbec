//! A smaller disk in the same file, while nobody uses it.
//!
//! The size is the switch: the footer's copy at the start, one sector, which counts where the two differ. What is beyond it is
//! given up afterwards, and the blocks at the file's end move to where room came free, each with a copy of it durable before
//! the table leads there. What a power cut left of that is done when the disk is made smaller or larger again.

use crate::format::{DynamicHeader, FOOTER_LEN, FooterPlace, Head, SECTOR, UNUSED};
use crate::grow::{GrowError, resized, sound};
use crate::storage::Storage;

/// Makes a disk smaller: to `size` bytes. What is beyond is lost. The power may go at any time: then the disk has the one
/// size or the other, and all that both have.
///
/// # Errors
/// The size is larger or cannot be, the image is not in order, or it cannot be written.
pub fn shrink(file: &(impl Storage + ?Sized), size: u64) -> Result<(), GrowError> {
    let refuse = |what| Err(GrowError::Size { size, what });
    let (head, now) = sound(file)?;
    if !size.is_multiple_of(SECTOR) || size == 0 {
        return refuse("a multiple of 512 is possible, and not 0");
    }
    if size > now {
        return refuse("that is more than it has");
    }
    match &head.header {
        None if size == now => Ok(()),
        None => shrink_fixed(file, &head, size),
        Some(header) => shrink_dynamic(file, &head, header, size),
    }
}

fn shrink_fixed(file: &(impl Storage + ?Sized), head: &Head, size: u64) -> Result<(), GrowError> {
    // Until the file is cut off, the old one is at the end, and counts.
    file.write_all_at(size, &resized(head, size))?;
    file.sync()?;
    file.set_len(size + FOOTER_LEN as u64)?;
    Ok(file.sync()?)
}

fn shrink_dynamic(
    file: &(impl Storage + ?Sized),
    head: &Head,
    header: &DynamicHeader,
    size: u64,
) -> Result<(), GrowError> {
    if head.has_batmap() {
        return Err(GrowError::Unsupported(
            "tapdisk's table of full blocks would have to change with it: convert it to a new image",
        ));
    }
    let mut table = head.table(file)?;
    let end = head.content_end(&table);
    if head.place != FooterPlace::Good || head.file_len != end + FOOTER_LEN as u64 {
        file.write_all_at(end, &head.footer.encode())?;
        file.sync()?;
    }
    // The copy at the start counts where the two differ.
    let footer = resized(head, size);
    file.write_all_at(0, &footer)?;
    file.sync()?;
    file.write_all_at(end, &footer)?;
    file.set_len(end + FOOTER_LEN as u64)?;
    file.sync()?;
    let free = clear_beyond(file, header, &mut table, size)?;
    move_down(file, header, &mut table, free)?;
    let end = head.content_end(&table);
    if end + (FOOTER_LEN as u64) < file.length()? {
        // The one that is there is at the file's end until it is cut off.
        file.write_all_at(end, &footer)?;
        file.sync()?;
        file.set_len(end + FOOTER_LEN as u64)?;
        file.sync()?;
    }
    Ok(())
}

/// Gives up what a disk of `size` bytes has beyond its end, so that it does not come back when the disk grows: whole blocks,
/// whose places come back, and the rest of the last one.
pub(crate) fn clear_beyond(
    file: &(impl Storage + ?Sized),
    header: &DynamicHeader,
    table: &mut [u32],
    size: u64,
) -> Result<Vec<u32>, GrowError> {
    let blocks = usize::try_from(header.blocks(size)).unwrap_or(usize::MAX).min(table.len());
    let free: Vec<u32> = table[blocks..].iter().copied().filter(|entry| *entry != UNUSED).collect();
    if !free.is_empty() {
        table[blocks..].fill(UNUSED);
        let unused = vec![0xff; (table.len() - blocks) * 4];
        file.write_all_at(header.table_offset + blocks as u64 * 4, &unused)?;
        file.sync()?;
    }
    let block_size = u64::from(header.block_size);
    let inside = size % block_size;
    let last = blocks.checked_sub(1).map(|index| table[index]).filter(|entry| *entry != UNUSED);
    if let Some(entry) = last.filter(|_| inside > 0) {
        let start = u64::from(entry) * SECTOR;
        let mut bits = vec![0; usize::try_from(header.bitmap_len()).unwrap_or(0)];
        file.fill_at(start, &mut bits)?;
        let before = bits.clone();
        // A bit a sector, the highest first.
        for sector in inside / SECTOR..block_size / SECTOR {
            let at = usize::try_from(sector / 8).unwrap_or(usize::MAX);
            if let Some(byte) = bits.get_mut(at) {
                *byte &= !(0x80 >> (sector % 8));
            }
        }
        if bits != before {
            let zeroes = vec![0; usize::try_from(block_size - inside).unwrap_or(0)];
            file.write_all_at(start + header.bitmap_len() + inside, &zeroes)?;
            file.write_all_at(start, &bits)?;
            file.sync()?;
        }
    }
    Ok(free)
}

/// Moves the last blocks of the file to places that came free.
fn move_down(
    file: &(impl Storage + ?Sized),
    header: &DynamicHeader,
    table: &mut [u32],
    mut free: Vec<u32>,
) -> Result<(), GrowError> {
    free.sort_unstable();
    let mut used: Vec<(u32, usize)> =
        table.iter().copied().zip(0..).filter(|(at, _)| *at != UNUSED).collect();
    used.sort_unstable();
    let room = header.bitmap_len() + u64::from(header.block_size);
    let mut content = vec![0; usize::try_from(room).unwrap_or(0)];
    let mut moved = Vec::new();
    for place in free {
        let Some((from, block)) = used.pop().filter(|(from, _)| *from > place) else { break };
        let filled = file.fill_at(u64::from(from) * SECTOR, &mut content)?;
        content[filled..].fill(0);
        file.write_all_at(u64::from(place) * SECTOR, &content)?;
        moved.push((block, place));
    }
    if moved.is_empty() {
        return Ok(());
    }
    file.sync()?;
    for (block, place) in moved {
        file.write_all_at(header.table_offset + block as u64 * 4, &place.to_be_bytes())?;
        table[block] = place;
    }
    Ok(file.sync()?)
}
