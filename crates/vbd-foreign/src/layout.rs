//! Where the blocks of a disk are in its file.

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the file, from this byte on.
    File(u64),
    /// Nowhere: it reads as zeroes.
    Hole,
    /// Nowhere, and said to be zeroes.
    Zero,
    /// In the file, compressed, from this byte on.
    Packed(u64),
}

/// The blocks of a disk.
pub trait Layout: Send + Sync {
    /// Bytes of the disk: a multiple of 512.
    fn size(&self) -> u64;

    /// Bytes of a block. The last of the disk may be cut short.
    fn block_size(&self) -> u64;

    /// Where a block is, which the disk has.
    fn place(&self, block: u64) -> Place;

    /// What kind of image it is, for people.
    fn kind(&self) -> &'static str;
}

/// Where a range begins, and how many bytes of it lie on from there: at least one, unless there are none. Of a packed
/// block the place is that of the whole block.
pub fn find(layout: &dyn Layout, offset: u64, len: u64) -> (Place, u64) {
    let block_size = layout.block_size();
    let (mut block, within) = (offset / block_size, offset % block_size);
    let first = layout.place(block);
    let mut run = (block_size - within).min(len);
    while run < len {
        block += 1;
        let next = layout.place(block);
        let goes_on = match (first, next) {
            (Place::File(from), Place::File(to)) => from.checked_add(within + run) == Some(to),
            (Place::Hole, Place::Hole) | (Place::Zero, Place::Zero) => true,
            _ => false,
        };
        if !goes_on {
            break;
        }
        run = len.min(run + block_size);
    }
    match first {
        // What a damaged table says may be anywhere.
        Place::File(from) => (Place::File(from.saturating_add(within)), run),
        other => (other, run),
    }
}
