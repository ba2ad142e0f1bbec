//! Requests that were taken from a ring: what is known of each until it is answered.

use vbd_core::{Guard, IoVec, Operation};

use crate::abi::{Segment, Status};
use crate::memory::Chunk;

/// One request. Vectors keep their room for the next.
#[derive(Default)]
pub(crate) struct Slot {
    /// The front-end's name for it.
    pub(crate) id: u64,
    /// Its operation, as the answer repeats it.
    pub(crate) operation: u8,
    /// What is still to be done, from the last to the next.
    pub(crate) steps: Steps,
    /// Its data goes to the domain.
    pub(crate) reads: bool,
    /// Its data, in bytes.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Where its data is in the domain's pages.
    pub(crate) segments: Vec<Segment>,
    /// Where it is in this process.
    pub(crate) pieces: Vec<IoVec>,
    /// Own pages that the data is in.
    pub(crate) chunk: Option<Chunk>,
    /// Regions of persistent pages in use.
    pub(crate) regions: Vec<u32>,
    /// Keeps `pieces` valid; none where that is the queue's memory as a whole.
    pub(crate) mapped: Option<Guard>,
}

/// What a request consists of, done one after the other; it ends with the first that fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Steps {
    /// Nothing more.
    #[default]
    None,
    /// A read.
    Read,
    /// A write; durable where it follows a flush.
    Write { durable: bool },
    /// A flush, and then perhaps the write that came with it.
    Flush { then_write: bool },
    /// A discard of what is left of the range.
    Discard,
}

/// One operation for the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) operation: Operation,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) durable: bool,
}

impl Slot {
    /// The next operation; none if all is done. A discard is cut to pieces of `most` bytes.
    pub(crate) fn next_part(&mut self, most: u64) -> Option<Part> {
        let (offset, len) = (self.offset, self.len);
        let whole = |operation, durable| Some(Part { operation, offset, len, durable });
        match std::mem::take(&mut self.steps) {
            Steps::None => None,
            Steps::Read => whole(Operation::Read, false),
            Steps::Write { durable } => whole(Operation::Write, durable),
            Steps::Flush { then_write } => {
                if then_write {
                    self.steps = Steps::Write { durable: true };
                }
                Some(Part { operation: Operation::Flush, offset: 0, len: 0, durable: false })
            }
            Steps::Discard => {
                let len = len.min(most);
                self.offset += len;
                self.len -= len;
                if self.len > 0 {
                    self.steps = Steps::Discard;
                }
                Some(Part { operation: Operation::Discard, offset, len, durable: false })
            }
        }
    }
}

/// An answer that waits for its data to be copied to the domain, or for nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    pub(crate) slot: u16,
    pub(crate) status: Status,
}
