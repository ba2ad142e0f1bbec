//! virtio-blk requests (virtio 1.2, section 5.2.6): what a chain asks for, and what it is told.

use vbd_core::{ErrorKind, IoVec, Operation, SECTOR};

use crate::chain::Chain;

/// Request types.
pub(crate) mod kind {
    pub(crate) const IN: u32 = 0;
    pub(crate) const OUT: u32 = 1;
    pub(crate) const FLUSH: u32 = 4;
    pub(crate) const GET_ID: u32 = 8;
    pub(crate) const DISCARD: u32 = 11;
    pub(crate) const WRITE_ZEROES: u32 = 13;
}

/// The status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    Error = 1,
    Unsupported = 2,
}

impl From<ErrorKind> for Status {
    /// What a guest is told: the one table of this front-end.
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Unsupported => Status::Unsupported,
            ErrorKind::Io
            | ErrorKind::NoSpace
            | ErrorKind::OutOfRange
            | ErrorKind::ReadOnly
            | ErrorKind::FlushLost
            | ErrorKind::Cancelled
            | ErrorKind::Busy
            | ErrorKind::Corrupt => Status::Error,
        }
    }
}

/// Length of the serial number that GET_ID gives.
pub(crate) const SERIAL: usize = 20;
/// Most segments in a discard or write-zeroes request.
pub(crate) const MOST_SEGMENTS: usize = 16;

/// What does not change while a queue runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Longest discard and longest write-zeroes, in bytes.
    pub(crate) discard: u64,
    pub(crate) zeroes: u64,
    pub(crate) serial: [u8; SERIAL],
}

/// An operation on a range, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) operation: Operation,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) may_unmap: bool,
}

/// What to do about a chain.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// One operation, on the pieces that are left.
    One(Part),
    /// The operations appended to `parts`, none of which has memory.
    Several,
    /// Answer with a status, having written so many bytes of data.
    Answer(Status, u32),
}

/// Decides what a chain asks for. Leaves in `pieces` the memory of the operation.
#[inline]
pub(crate) fn decide(
    chain: &Chain,
    pieces: &mut Vec<IoVec>,
    limits: &Limits,
    parts: &mut Vec<Part>,
) -> Action {
    #[allow(clippy::cast_possible_truncation, reason = "the type is the lower half")]
    let (request, sector) = (chain.header[0] as u32, chain.header[1]);
    match request {
        kind::IN => {
            if chain.split > 0 {
                pieces.drain(..chain.split);
            }
            transfer(Operation::Read, sector, chain.writable)
        }
        kind::OUT => {
            pieces.truncate(chain.split);
            transfer(Operation::Write, sector, chain.readable)
        }
        kind::FLUSH => {
            pieces.clear();
            Action::One(Part { operation: Operation::Flush, offset: 0, len: 0, may_unmap: false })
        }
        kind::GET_ID => {
            let written = write_out(&limits.serial, &pieces[chain.split..]);
            Action::Answer(Status::Ok, written)
        }
        kind::DISCARD | kind::WRITE_ZEROES => ranges(request, chain, pieces, limits, parts),
        _ => Action::Answer(Status::Unsupported, 0),
    }
}

const REFUSED: Action = Action::Answer(Status::Error, 0);

#[inline]
fn transfer(operation: Operation, sector: u64, len: u64) -> Action {
    let offset = sector.checked_mul(SECTOR).filter(|offset| offset.checked_add(len).is_some());
    match offset {
        Some(offset) if len > 0 && len.is_multiple_of(SECTOR) => {
            Action::One(Part { operation, offset, len, may_unmap: false })
        }
        _ => REFUSED,
    }
}

/// Discard and write-zeroes: 16 bytes a segment, of sector, number of sectors and flags.
fn ranges(
    request: u32,
    chain: &Chain,
    pieces: &mut Vec<IoVec>,
    limits: &Limits,
    parts: &mut Vec<Part>,
) -> Action {
    let mut bytes = [0u8; 16 * MOST_SEGMENTS];
    let Some(bytes) = usize::try_from(chain.readable).ok().and_then(|len| bytes.get_mut(..len)) else {
        return REFUSED;
    };
    read_in(&pieces[..chain.split], bytes);
    pieces.clear();
    if bytes.is_empty() || !bytes.len().is_multiple_of(16) {
        return REFUSED;
    }
    let (operation, most, allowed) = match request {
        kind::DISCARD => (Operation::Discard, limits.discard, 0),
        _ => (Operation::WriteZeroes, limits.zeroes, 1),
    };
    for segment in bytes.chunks_exact(16) {
        let half = |at: usize| segment[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
        let sector = u64::from(half(0)) | u64::from(half(4)) << 32;
        let (sectors, flags) = (u64::from(half(8)), half(12));
        if flags & !allowed != 0 {
            parts.clear();
            return Action::Answer(Status::Unsupported, 0);
        }
        let len = sectors * SECTOR;
        let offset = sector.checked_mul(SECTOR).filter(|offset| offset.checked_add(len).is_some());
        match offset {
            Some(offset) if len <= most => {
                if len > 0 {
                    parts.push(Part { operation, offset, len, may_unmap: flags & 1 != 0 });
                }
            }
            _ => {
                parts.clear();
                return REFUSED;
            }
        }
    }
    match parts.len() {
        0 => Action::Answer(Status::Ok, 0),
        1 => Action::One(parts.remove(0)),
        _ => Action::Several,
    }
}

/// Copies out of guest memory; `into` is not longer than the pieces.
fn read_in(pieces: &[IoVec], into: &mut [u8]) {
    let bytes = pieces.iter().flat_map(|piece| {
        // SAFETY: pieces are in memory, which the caller holds.
        (0..piece.iov_len).map(|at| unsafe { piece.iov_base.cast::<u8>().add(at).read_volatile() })
    });
    into.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
}

/// Copies into guest memory, as much as fits; says how much.
fn write_out(bytes: &[u8], pieces: &[IoVec]) -> u32 {
    let places = pieces
        .iter()
        .flat_map(|piece| (0..piece.iov_len).map(|at| piece.iov_base.cast::<u8>().wrapping_add(at)));
    let mut written = 0;
    for (byte, to) in bytes.iter().zip(places) {
        // SAFETY: pieces are in memory, which the caller holds.
        unsafe { to.write_volatile(*byte) };
        written += 1;
    }
    written
}
