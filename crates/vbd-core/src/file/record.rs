//! Shows what is done to a file to whoever records it.

use vbd_ring::{IoVec, Op};

use super::Backend;

/// What an operation does to a file. Offsets and lengths are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes are written.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Vec<u8>,
        /// They are durable when the operation ends.
        durable: bool,
    },
    /// fallocate(2).
    Space {
        /// FALLOC_FL_ flags.
        mode: i32,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// The file gets this length.
    Length(u64),
    /// What has ended before this began is durable when it ends.
    Sync,
}

/// Sees every change of a file when it is given to the kernel, and when the kernel's answer is seen. Reads are not
/// shown. What was asked of [`Faults::before`](super::Faults::before) and failed there is shown with that result.
pub trait Recorder: Send + Sync {
    /// A change begins: its number, which [`ended`](Self::ended) gets.
    fn begun(&self, change: Change) -> u64;

    /// A change has ended as the system call does: with the bytes written, 0, or `-errno`. Called before anybody learns
    /// of it. One whose reactor has ended meanwhile never ends.
    fn ended(&self, number: u64, result: i32);
}

/// A change that somebody sees.
pub(super) type Seen = Option<u64>;

impl Backend {
    /// A change begins.
    pub(super) fn begun(&self, change: impl FnOnce() -> Change) -> Seen {
        Some(self.faults.as_ref()?.recorder()?.begun(change()))
    }

    /// The same for an operation on the file's data. Reads are no changes.
    ///
    /// # Safety
    /// The pointers in `op` are valid.
    pub(super) unsafe fn begun_op(&self, op: &Op) -> Seen {
        self.faults.as_ref()?.recorder()?;
        let change = match *op {
            Op::Write { iov, count, offset, dsync } => {
                // SAFETY: by this function's own contract.
                let data = unsafe { gather(std::slice::from_raw_parts(iov, count as usize)) };
                Change::Write { offset, data, durable: dsync }
            }
            Op::Fallocate { mode, offset, len } => Change::Space { mode, offset, len },
            Op::Sync => Change::Sync,
            _ => return None,
        };
        self.begun(|| change)
    }

    /// A change has ended.
    pub(super) fn ended(&self, seen: Seen, result: i32) {
        let Some(number) = seen else { return };
        if let Some(recorder) = self.faults.as_ref().and_then(|faults| faults.recorder()) {
            recorder.ended(number, result);
        }
    }
}

/// # Safety
/// Every piece is valid for its length.
unsafe fn gather(pieces: &[IoVec]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in pieces {
        // SAFETY: by this function's own contract. A guest that writes meanwhile gets bytes of its own making.
        bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(piece.iov_base.cast(), piece.iov_len) });
    }
    bytes
}
