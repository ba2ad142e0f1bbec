//! Answers to block status: what the disk tells, as descriptors of base:allocation.

use vbd_core::{Extent, ExtentKind};

use crate::protocol::{BASE_ALLOCATION_ID, state};

/// What the client wants to know.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// Bytes of the first extent that lie before the range asked for.
    pub(crate) start: u64,
    /// Length of the range in bytes; not 0.
    pub(crate) len: u64,
    /// Only the first extent.
    pub(crate) one: bool,
    /// Descriptors of twice 64 bits, not of twice 32.
    pub(crate) wide: bool,
}

/// The start of the chunk's payload.
pub(crate) struct Fixed {
    bytes: [u8; 8],
    len: usize,
}

impl Fixed {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

fn flags(kind: ExtentKind) -> u32 {
    match kind {
        ExtentKind::Data => 0,
        ExtentKind::Zero => state::ZERO,
        ExtentKind::Hole => state::HOLE | state::ZERO,
    }
}

/// Writes as many descriptors as `out` has room for, at least one; gives what stands before them, and their length.
/// Neighbours of one kind become one, and nothing goes beyond the range.
pub(crate) fn encode(extents: &[Extent], asked: Asked, out: &mut [u8]) -> (Fixed, usize) {
    let size = if asked.wide { 16 } else { 8 };
    // A narrow descriptor cannot say more, nor can a narrow request ask for more.
    let most = if asked.wide { u64::MAX } else { u64::from(u32::MAX) };
    let mut left = asked.len.min(most);
    let mut skip = asked.start;
    let mut merged: Option<(u64, u32)> = None;
    let mut places = out.chunks_exact_mut(size);
    let mut count: u32 = 0;
    let mut write = |(len, flags): (u64, u32)| {
        let Some(place) = places.next() else { return false };
        if asked.wide {
            place[..8].copy_from_slice(&len.to_be_bytes());
            place[8..].copy_from_slice(&u64::from(flags).to_be_bytes());
        } else {
            place[..4].copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
            place[4..].copy_from_slice(&flags.to_be_bytes());
        }
        count += 1;
        true
    };
    for extent in extents {
        let before = extent.len.min(skip);
        skip -= before;
        let len = (extent.len - before).min(left);
        if len == 0 {
            continue;
        }
        left -= len;
        let flags = flags(extent.kind);
        match &mut merged {
            Some((sum, kind)) if *kind == flags => *sum += len,
            Some(other) => {
                if asked.one || !write(*other) {
                    break;
                }
                merged = Some((len, flags));
            }
            None => merged = Some((len, flags)),
        }
    }
    // A disk that told nothing of the range has something there as far as anyone knows.
    write(merged.unwrap_or((asked.len.min(most), 0)));
    let mut fixed = Fixed { bytes: [0; 8], len: if asked.wide { 8 } else { 4 } };
    fixed.bytes[..4].copy_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
    fixed.bytes[4..].copy_from_slice(&count.to_be_bytes());
    (fixed, count as usize * size)
}
