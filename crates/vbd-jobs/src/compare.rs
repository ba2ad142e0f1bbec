//! Whether two disks hold the same.

use std::sync::Mutex;

use vbd_core::client::Buffer;
use vbd_core::{Client, ExtentKind};

use crate::copy::CHUNK;
use crate::input::Input;
use crate::ranges::{Chunk, Chunks, Turns, each, lock};
use crate::zeroes::are_zero;
use crate::{Progress, Result};

/// The unit in which holes are told from data, in bytes.
const UNIT: u64 = 512;

/// The first difference of two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The first byte that differs; bytes beyond a disk's end count as zeroes.
    pub offset: u64,
}

/// What a comparison has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compared {
    /// The sizes of the two in bytes.
    pub sizes: (u64, u64),
    /// Where they differ first; none where they do not.
    pub difference: Option<Difference>,
}

/// Compares two disks; what one has beyond the other's end must be zeroes to be equal.
///
/// # Errors
/// One of them cannot be read, or the job was stopped.
pub fn compare(one: &Client, other: &Client, threads: usize, progress: &dyn Progress) -> Result<Compared> {
    let sizes = (one.size(), other.size());
    let (shorter, longer) = if sizes.0 <= sizes.1 { (one, other) } else { (other, one) };
    let size = longer.size();
    progress.step("comparing", size);
    let first = Mutex::new(None);
    let note = |offset: u64| {
        let mut first = lock(&first);
        *first = Some(first.map_or(offset, |known: u64| known.min(offset)));
    };
    let chunks = Chunks::new(longer, 0, size, UNIT, CHUNK);
    let bytes = usize::try_from(CHUNK).expect("a chunk is small");
    let own = || (Buffer::new(bytes), Buffer::new(bytes));
    let turns = Turns::default();
    let (shorter, longer) = (Input::new(shorter), Input::new(longer));
    each(chunks, threads, &turns, progress, own, |(left, right), chunk| {
        let found = if chunk.data {
            let len = usize::try_from(chunk.len).expect("data comes in chunks");
            longer.read(chunk.offset, left, len)?;
            shorter.read_padded(chunk.offset, right, len)?;
            differs(&left[..len], &right[..len]).map(|at| chunk.offset + at as u64)
        } else {
            first_data(&shorter, chunk, left)?
        };
        // Chunks that others have begun come before those that nobody has.
        found.into_iter().for_each(note);
        Ok(found.is_none())
    })?;
    let difference = lock(&first).map(|offset| Difference { offset });
    Ok(Compared { sizes, difference })
}

fn differs(left: &[u8], right: &[u8]) -> Option<usize> {
    if left == right {
        return None;
    }
    left.iter().zip(right).position(|(left, right)| left != right)
}

/// The first byte of a range of the disk that is not zero. The range may reach beyond its end.
fn first_data(input: &Input<'_>, chunk: Chunk, buffer: &mut Buffer) -> Result<Option<u64>> {
    let disk = input.disk;
    let (mut at, end) = (chunk.offset, chunk.end().min(disk.size()));
    while at < end {
        for extent in disk.extents(at, end - at)? {
            let stop = at + extent.len;
            while extent.kind == ExtentKind::Data && at < stop {
                let len = usize::try_from(stop - at).unwrap_or(usize::MAX).min(buffer.len());
                input.read(at, buffer, len)?;
                if !are_zero(&buffer[..len]) {
                    return Ok(buffer[..len]
                        .iter()
                        .position(|byte| *byte != 0)
                        .map(|found| at + found as u64));
                }
                at += len as u64;
            }
            at = stop;
        }
    }
    Ok(None)
}
