//! Descriptor chains, with every number in them hostile until checked.

use std::collections::VecDeque;
use std::sync::Arc;

use vbd_core::IoVec;

use crate::memory::{Memory, load16};
use crate::ring::{Descriptor, Ring};

/// What a guest may not do. Its queue is broken from then on, until the device is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    #[error("the available index is {0} entries ahead, more than the queue holds")]
    AvailableIndex(u16),
    #[error("descriptor {0} is not in the table")]
    NoSuchDescriptor(u16),
    #[error("descriptor {0} was made available again while its request is in flight")]
    InFlight(u16),
    #[error("a chain is longer than the queue, or has a loop")]
    TooLong,
    #[error("{1} bytes at guest address {0:#x} are not in memory")]
    NotInMemory(u64, u64),
    #[error("an indirect table within an indirect table")]
    NestedIndirect,
    #[error("an indirect table that was not negotiated, is chained, or is {0} bytes long")]
    Indirect(u32),
    #[error("memory to read follows memory to write")]
    Order,
    #[error("a request without a header")]
    NoHeader,
    #[error("a request without a place for its status")]
    NoStatus,
}

/// A request as its chain describes it. Its memory is in the pieces given to [`Intake::take`]: first what the device
/// reads, without the header, then what it writes, without the status byte.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) head: u16,
    /// Type and, in its upper half, a reserved word; then the sector.
    pub(crate) header: [u64; 2],
    /// Pieces to read; the others are to be written.
    pub(crate) split: usize,
    /// Bytes to read.
    pub(crate) readable: u64,
    /// Bytes to write.
    pub(crate) writable: u64,
    pub(crate) status: *mut u8,
}

/// Takes chains from an available ring.
pub(crate) struct Intake {
    ring: Ring,
    memory: Arc<Memory>,
    /// Running index of the next entry.
    next: u16,
    /// Entries before this running index are known to be available.
    known: u16,
    /// Heads in flight, a bit each.
    busy: Vec<u64>,
    /// Heads to take again before anything else, from before a restart.
    again: VecDeque<u16>,
    indirect: bool,
    /// Descriptors in a chain.
    most: usize,
}

/// Chains may be as long as the queue, and as the number of segments that small queues are told of.
const LONGEST: u16 = crate::config::SEGMENTS + 2;

impl Intake {
    pub(crate) fn new(ring: Ring, memory: Arc<Memory>, next: u16, indirect: bool) -> Self {
        Intake {
            ring,
            memory,
            next,
            known: next,
            busy: vec![0; usize::from(ring.size()).div_ceil(64)],
            again: VecDeque::new(),
            indirect,
            most: usize::from(ring.size().max(LONGEST)),
        }
    }

    pub(crate) fn ring(&self) -> &Ring {
        &self.ring
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Running index of the next entry.
    pub(crate) fn next(&self) -> u16 {
        self.next
    }

    /// Uses other memory, in which the ring lies at other pointers.
    pub(crate) fn move_to(&mut self, ring: Ring, memory: Arc<Memory>) {
        (self.ring, self.memory) = (ring, memory);
    }

    /// Takes these heads, which are in flight since before a restart, first.
    pub(crate) fn resubmit(&mut self, heads: Vec<u16>) {
        self.again = heads.into();
    }

    /// Whether heads from before a restart are still to be taken.
    pub(crate) fn has_again(&self) -> bool {
        !self.again.is_empty()
    }

    /// Whether there is something to take.
    #[inline]
    pub(crate) fn has_more(&mut self) -> bool {
        if self.next == self.known {
            self.known = self.ring.available();
        }
        self.next != self.known || !self.again.is_empty()
    }

    /// Takes the next chain. The flag says that it is one from before a restart.
    ///
    /// # Errors
    /// The guest has broken a rule; what it was about was not taken.
    #[inline]
    pub(crate) fn take(&mut self, pieces: &mut Vec<IoVec>) -> Result<Option<(Chain, bool)>, Violation> {
        if let Some(head) = self.again.pop_front() {
            return self.start(head, pieces).map(|chain| Some((chain, true)));
        }
        if !self.has_more() {
            return Ok(None);
        }
        let ahead = self.known.wrapping_sub(self.next);
        if ahead > self.ring.size() {
            return Err(Violation::AvailableIndex(ahead));
        }
        let chain = self.start(self.ring.head(self.next), pieces)?;
        self.next = self.next.wrapping_add(1);
        Ok(Some((chain, false)))
    }

    /// The request with this head is done: the guest may use it again.
    #[inline]
    pub(crate) fn give_back(&mut self, head: u16) {
        self.busy[usize::from(head / 64)] &= !(1 << (head % 64));
    }

    fn start(&mut self, head: u16, pieces: &mut Vec<IoVec>) -> Result<Chain, Violation> {
        if head >= self.ring.size() {
            return Err(Violation::NoSuchDescriptor(head));
        }
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        if self.busy[word] & bit != 0 {
            return Err(Violation::InFlight(head));
        }
        let mut walk = Walk {
            memory: &self.memory,
            pieces,
            header: [0; 16],
            filled: 0,
            split: None,
            readable: 0,
            writable: 0,
            left: self.most,
        };
        walk.follow(&self.ring, head, self.indirect)?;
        let chain = walk.finish(head)?;
        self.busy[word] |= bit;
        Ok(chain)
    }
}

struct Walk<'a> {
    memory: &'a Memory,
    pieces: &'a mut Vec<IoVec>,
    header: [u8; 16],
    filled: usize,
    split: Option<usize>,
    readable: u64,
    writable: u64,
    /// Descriptors that may still come.
    left: usize,
}

impl Walk<'_> {
    #[inline]
    fn follow(&mut self, ring: &Ring, head: u16, indirect: bool) -> Result<(), Violation> {
        let mut index = head;
        loop {
            let descriptor = ring.descriptor(index).ok_or(Violation::NoSuchDescriptor(index))?;
            if descriptor.is_indirect() {
                if !indirect || descriptor.has_next() {
                    return Err(Violation::Indirect(descriptor.len));
                }
                return self.follow_table(descriptor);
            }
            self.add(descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    fn follow_table(&mut self, table: Descriptor) -> Result<(), Violation> {
        let len = u64::from(table.len);
        let entries = table.len / 16;
        if entries == 0 || !table.len.is_multiple_of(16) {
            return Err(Violation::Indirect(table.len));
        }
        let base = self.memory.guest(table.address, len).ok_or(Violation::NotInMemory(table.address, len))?;
        let mut index = 0;
        loop {
            if u32::from(index) >= entries {
                return Err(Violation::NoSuchDescriptor(index));
            }
            // SAFETY: `index` is inside the table, which is in memory as a whole.
            let descriptor = unsafe { Descriptor::load(base.add(16 * usize::from(index))) };
            if descriptor.is_indirect() {
                return Err(Violation::NestedIndirect);
            }
            self.add(descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    #[inline]
    fn add(&mut self, descriptor: Descriptor) -> Result<(), Violation> {
        self.left = self.left.checked_sub(1).ok_or(Violation::TooLong)?;
        let (mut address, mut len) = (descriptor.address, u64::from(descriptor.len));
        if descriptor.is_writable() {
            self.split.get_or_insert(self.pieces.len());
            self.writable += len;
        } else {
            if self.split.is_some() {
                return Err(Violation::Order);
            }
            if self.filled < 16 {
                let took = self.fill_header(address, len)?;
                len -= took;
                address = address.wrapping_add(took);
            }
            self.readable += len;
        }
        if !self.memory.pieces(address, len, self.pieces) {
            return Err(Violation::NotInMemory(address, len));
        }
        // A descriptor may lie across regions; many of them would make the list grow out of proportion.
        if self.pieces.len() > 2 * crate::ring::MOST_ENTRIES as usize {
            return Err(Violation::TooLong);
        }
        Ok(())
    }

    /// Takes what is missing of the header from here; says how many bytes that was.
    #[inline]
    fn fill_header(&mut self, address: u64, len: u64) -> Result<u64, Violation> {
        if self.filled == 0
            && len >= 16
            && let Some(from) = self.memory.guest(address, 16)
        {
            // SAFETY: in memory for 16 bytes.
            let words = unsafe { load16(from) };
            self.header[..8].copy_from_slice(&words[0].to_le_bytes());
            self.header[8..].copy_from_slice(&words[1].to_le_bytes());
            self.filled = 16;
            return Ok(16);
        }
        let mut took = 0;
        while took < len && self.filled < 16 {
            let at = address.wrapping_add(took);
            let from = self.memory.guest(at, 1).ok_or(Violation::NotInMemory(at, 1))?;
            // SAFETY: in memory for one byte.
            self.header[self.filled] = unsafe { from.read_volatile() };
            self.filled += 1;
            took += 1;
        }
        Ok(took)
    }

    #[inline]
    fn finish(self, head: u16) -> Result<Chain, Violation> {
        if self.filled < 16 {
            return Err(Violation::NoHeader);
        }
        let split = self.split.ok_or(Violation::NoStatus)?;
        let last = self.pieces[split..].last_mut().ok_or(Violation::NoStatus)?;
        last.iov_len -= 1;
        let status = last.iov_base.cast::<u8>().wrapping_add(last.iov_len);
        if last.iov_len == 0 {
            self.pieces.pop();
        }
        let (low, high) = self.header.split_at(8);
        let word = |half: &[u8]| half.try_into().map_or(0, u64::from_le_bytes);
        Ok(Chain {
            head,
            header: [word(low), word(high)],
            split,
            readable: self.readable,
            writable: self.writable - 1,
            status,
        })
    }
}
