//! A ring in memory that its domain grants: requests out of it, responses into it.

use std::fmt;

use crate::abi::{Abi, Entry, HEADER, Status};
use crate::indices::Indices;

/// What a front-end did that no front-end does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Violation {
    /// It says to have produced more requests than the ring holds.
    Overrun { produced: u32, answered: u32 },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation::Overrun { produced, answered } = self;
        write!(
            f,
            "the domain has produced requests up to {produced}, with {answered} answered: more than its ring holds"
        )
    }
}

/// A ring. Whoever makes one keeps its memory mapped.
pub(crate) struct Ring {
    start: *mut u8,
    abi: Abi,
    /// A power of two.
    entries: u32,
    /// Requests taken.
    consumed: u32,
    /// Requests there are, as last seen.
    seen: u32,
    /// Responses put in.
    produced: u32,
    /// Responses shown.
    published: u32,
}

impl Ring {
    /// A ring at `start`, of which requests up to `consumed` were taken, or as many as were answered.
    ///
    /// # Safety
    /// So many pages are mapped there, for as long as the ring is used.
    pub(crate) unsafe fn new(start: *mut u8, pages: usize, abi: Abi, consumed: Option<u32>) -> Ring {
        let mut ring =
            Ring { start, abi, entries: abi.entries(pages), consumed: 0, seen: 0, produced: 0, published: 0 };
        let answered = ring.indices().responses();
        (ring.produced, ring.published) = (answered, answered);
        ring.consumed = consumed.unwrap_or(answered);
        ring.seen = ring.consumed;
        ring
    }

    fn indices(&self) -> &Indices {
        // SAFETY: the ring's first bytes, which stay mapped; all access to them is atomic.
        unsafe { &*self.start.cast::<Indices>() }
    }

    #[allow(
        clippy::cast_ptr_alignment,
        reason = "a page, a header of 64 bytes and entries of a multiple of 4"
    )]
    fn entry(&self, index: u32) -> *mut u32 {
        let slot = (index & (self.entries - 1)) as usize;
        self.start.wrapping_add(HEADER + slot * self.abi.entry()).cast()
    }

    pub(crate) fn abi(&self) -> Abi {
        self.abi
    }

    pub(crate) fn entries(&self) -> u32 {
        self.entries
    }

    /// Requests taken so far; wraps.
    pub(crate) fn consumed(&self) -> u32 {
        self.consumed
    }

    /// Responses put in so far; wraps.
    pub(crate) fn produced(&self) -> u32 {
        self.produced
    }

    /// Responses shown so far; wraps.
    pub(crate) fn published(&self) -> u32 {
        self.published
    }

    /// Whether requests have been produced that nobody has taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.indices().requests() == self.consumed
    }

    /// Copies the next request out, if there is one: how many words of it are set.
    ///
    /// # Errors
    /// The front-end's index makes no sense; the ring cannot be used any more.
    #[inline]
    pub(crate) fn take(&mut self, entry: &mut Entry) -> Result<Option<usize>, Violation> {
        if self.seen == self.consumed {
            let produced = self.indices().requests();
            // Both: an index that has gone back is ahead of the answers, too.
            if produced.wrapping_sub(self.produced) > self.entries
                || produced.wrapping_sub(self.consumed) > self.entries
            {
                return Err(Violation::Overrun { produced, answered: self.produced });
            }
            self.seen = produced;
            if produced == self.consumed {
                return Ok(None);
            }
        }
        // SAFETY: an entry of the ring.
        let words = unsafe { entry.read(self.entry(self.consumed), self.abi) };
        self.consumed = self.consumed.wrapping_add(1);
        Ok(Some(words))
    }

    /// Puts a response in; [`publish`](Self::publish) shows it.
    #[inline]
    pub(crate) fn put(&mut self, id: u64, operation: u8, status: Status) {
        let entry = self.entry(self.produced);
        #[allow(clippy::cast_possible_truncation, reason = "halves")]
        let words = [
            id as u32,
            (id >> 32) as u32,
            u32::from(operation) | u32::from((status as i16).cast_unsigned()) << 16,
        ];
        for (index, word) in words.into_iter().enumerate() {
            // SAFETY: in an entry of the ring.
            unsafe { entry.add(index).write_volatile(word.to_le()) };
        }
        self.produced = self.produced.wrapping_add(1);
    }

    /// Shows what was put in; true if the front-end wants to be notified.
    #[inline]
    pub(crate) fn publish(&mut self) -> bool {
        let old = std::mem::replace(&mut self.published, self.produced);
        self.indices().publish(old, self.produced)
    }

    /// Asks to be notified of the next request; true if it is there already.
    pub(crate) fn arm(&mut self) -> bool {
        self.seen != self.consumed || self.indices().arm(self.consumed)
    }
}
