//! Answers to block status: what the disk tells as descriptors of base:allocation, and what bitmaps tell.

use vbd_core::bitmap::Bitmap;
use vbd_core::{Extent, ExtentKind};

use crate::protocol::{BASE_ALLOCATION_ID, DIRTY, state};

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

/// What the disk has told. See [`encode`].
pub(crate) fn allocation(extents: &[Extent], asked: Asked, out: &mut [u8]) -> (Fixed, usize) {
    encode(BASE_ALLOCATION_ID, extents.iter().map(|extent| (extent.len, flags(extent.kind))), asked, out)
}

/// What is dirty from `offset` on; everything where there is no such bitmap any more. See [`encode`].
pub(crate) fn dirty(
    id: u32,
    bitmap: Option<&Bitmap>,
    offset: u64,
    asked: Asked,
    out: &mut [u8],
) -> (Fixed, usize) {
    let Some(bitmap) = bitmap else { return encode(id, [(asked.len, DIRTY)], asked, out) };
    let end = offset.saturating_add(asked.len);
    let mut at = offset;
    let mut next = bitmap.next_run(at..end);
    let runs = std::iter::from_fn(|| {
        if at >= end {
            return None;
        }
        let (to, flags) = match &next {
            Some(run) if run.start <= at => (run.end, DIRTY),
            Some(run) => (run.start, 0),
            None => (end, 0),
        };
        let len = to - at;
        at = to;
        if flags == DIRTY {
            next = bitmap.next_run(at..end);
        }
        Some((len, flags))
    });
    encode(id, runs, asked, out)
}

/// Writes as many descriptors as `out` has room for, at least one; gives what stands before them, and their length.
/// Neighbours of one kind become one, and nothing goes beyond the range.
fn encode(
    id: u32,
    extents: impl IntoIterator<Item = (u64, u32)>,
    asked: Asked,
    out: &mut [u8],
) -> (Fixed, usize) {
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
    for (len, flags) in extents {
        let before = len.min(skip);
        skip -= before;
        let len = (len - before).min(left);
        if len == 0 {
            continue;
        }
        left -= len;
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
    fixed.bytes[..4].copy_from_slice(&id.to_be_bytes());
    fixed.bytes[4..].copy_from_slice(&count.to_be_bytes());
    (fixed, count as usize * size)
}
