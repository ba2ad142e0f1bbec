//! What is in flight, kept in memory that the front-end holds, so that it outlives this process (vhost-user,
//! "Inflight I/O tracking", split virtqueues).
//!
//! A queue has a region: a header of 16 bytes and 16 bytes for each head. An entry says whether its head is in flight
//! and when it was taken. Completions are published in batches; a batch is a list, so that a crash between publishing
//! it and clearing its entries can be told and mended.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use crate::memory::Mapping;
use crate::ring::{MOST_ENTRIES, word};

const HEADER: usize = 16;
const ENTRY: usize = 16;
const ALIGNMENT: usize = 64;
const VERSION: u16 = 1;
/// Behind the queues' regions lies what the device itself must remember: a mark, whether its cache writes back, and whether
/// writes were let through that only a flush makes outlive this process.
/// Other back-ends leave it alone, and the front-end does not look into the file.
const MARK: u64 = 0x5642_4431_0000_5743;
const TRAILER: usize = 64;

/// Bytes of one queue's region.
fn stride(entries: u16) -> usize {
    (HEADER + ENTRY * usize::from(entries)).next_multiple_of(ALIGNMENT)
}

/// Bytes of a file for so many queues of so many entries.
pub(crate) fn file_size(queues: u16, entries: u16) -> u64 {
    (stride(entries) * usize::from(queues) + TRAILER) as u64
}

/// The regions of all queues.
pub(crate) struct Inflight {
    mapping: Arc<Mapping>,
    queues: u16,
    entries: u16,
    trailer: bool,
}

impl Inflight {
    /// Takes a mapping of `len` bytes.
    ///
    /// # Errors
    /// It is too small, or the sizes are not allowed.
    pub(crate) fn new(
        mapping: Arc<Mapping>,
        len: u64,
        queues: u16,
        entries: u16,
    ) -> Result<Self, &'static str> {
        if entries == 0 || entries > MOST_ENTRIES || !mapping.start().addr().is_multiple_of(8) {
            return Err("the in-flight region has a queue size that is not allowed");
        }
        let needed = file_size(queues, entries);
        if len < needed - TRAILER as u64 {
            return Err("the in-flight region is too small for its queues");
        }
        Ok(Inflight { mapping, queues, entries, trailer: len >= needed })
    }

    /// The cache mode that was kept here, if one was.
    pub(crate) fn writeback(&self) -> Option<bool> {
        let (mark, value) = self.trailer()?;
        (mark.load(Ordering::Acquire) == MARK).then(|| value.load(Ordering::Relaxed) != 0)
    }

    /// Keeps the cache mode.
    pub(crate) fn keep_writeback(&self, on: bool) {
        if let Some((mark, value)) = self.trailer() {
            value.store(u64::from(on), Ordering::Relaxed);
            mark.store(MARK, Ordering::Release);
        }
    }

    /// Whether writes that completed were lost with the process that had taken them: it was killed before it could flush.
    pub(crate) fn is_lost(&self) -> bool {
        self.unflushed().is_some_and(|unflushed| unflushed.load(Ordering::Acquire) == 1)
    }

    /// Says that writes are let through which would be lost, or that all of them were flushed.
    pub(crate) fn set_unflushed(&self, on: bool) {
        if let Some(unflushed) = self.unflushed() {
            unflushed.store(u64::from(on), Ordering::Release);
        }
    }

    fn unflushed(&self) -> Option<&std::sync::atomic::AtomicU64> {
        let at = self.mapping.start().wrapping_add(stride(self.entries) * usize::from(self.queues));
        // SAFETY: as in `trailer`.
        self.trailer.then(|| unsafe { word(at.add(16)) })
    }

    fn trailer(&self) -> Option<(&std::sync::atomic::AtomicU64, &std::sync::atomic::AtomicU64)> {
        let at = self.mapping.start().wrapping_add(stride(self.entries) * usize::from(self.queues));
        // SAFETY: behind the regions and inside the mapping, where there is a trailer; aligned as the mapping is.
        self.trailer.then(|| unsafe { (word(at), word(at.add(8))) })
    }
}

/// The region of one queue.
pub(crate) struct Tracker {
    all: Arc<Inflight>,
    base: *mut u8,
    entries: u16,
    counter: u64,
    /// Heads of the batch that is being collected.
    batch: Vec<u16>,
}

impl Tracker {
    /// The region of queue `index`, which has `size` entries; none if the file has no room for it.
    pub(crate) fn new(all: Arc<Inflight>, index: u16, size: u16) -> Option<Self> {
        if index >= all.queues || size > all.entries {
            return None;
        }
        let base = all.mapping.start().wrapping_add(stride(all.entries) * usize::from(index));
        Some(Tracker { all, base, entries: size, counter: 0, batch: Vec::new() })
    }

    /// Mends what a crash left half done and gives the heads in flight, in the order they were taken. `used` is the
    /// used index as the ring has it, `base` what the front-end takes for the next available entry. None if the region
    /// is new.
    ///
    /// # Errors
    /// The region contradicts the ring.
    pub(crate) fn recover(&mut self, used: u16, base: u16) -> Result<Option<Vec<u16>>, &'static str> {
        // Published, and not yet cleared: the last batch is as long as the difference.
        let missing = used.wrapping_sub(self.half(14).load(Ordering::Acquire));
        let fresh = self.half(8).load(Ordering::Acquire) == 0;
        // The guest has begun anew and the front-end has kept the region.
        let stale = missing > self.entries && used == base;
        if fresh || stale {
            (0..self.entries).for_each(|head| self.flag(head).store(0, Ordering::Relaxed));
            self.half(10).store(self.all.entries, Ordering::Relaxed);
            self.half(14).store(used, Ordering::Relaxed);
            self.half(8).store(VERSION, Ordering::Release);
            return Ok(None);
        }
        if missing > self.entries {
            return Err("the in-flight region is not of this ring");
        }
        let mut head = self.half(12).load(Ordering::Relaxed);
        for _ in 0..missing {
            if head >= self.entries {
                return Err("the in-flight region names a head that is not there");
            }
            self.flag(head).store(0, Ordering::Release);
            head = self.next(head).load(Ordering::Relaxed);
        }
        self.half(14).store(used, Ordering::Release);

        let in_flight = (0..self.entries).filter(|head| self.flag(*head).load(Ordering::Acquire) != 0);
        let mut heads: Vec<u16> = in_flight.collect();
        heads.sort_by_key(|head| self.counter_of(*head));
        if let Some(last) = heads.last() {
            self.counter = self.counter_of(*last).wrapping_add(1);
        }
        Ok(Some(heads))
    }

    /// A head was taken.
    #[inline]
    pub(crate) fn taken(&mut self, head: u16) {
        // SAFETY: inside the region; entries are aligned as the mapping is.
        unsafe { word(self.entry(head).add(8)) }.store(self.counter.to_le(), Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        self.flag(head).store(1, Ordering::Release);
    }

    /// A head is in the used ring, not yet published.
    #[inline]
    pub(crate) fn done(&mut self, head: u16) {
        self.next(head).store(self.half(12).load(Ordering::Relaxed), Ordering::Relaxed);
        self.half(12).store(head, Ordering::Release);
        self.batch.push(head);
    }

    /// The batch was published; the used index is now `used`.
    #[inline]
    pub(crate) fn published(&mut self, used: u16) {
        while let Some(head) = self.batch.pop() {
            self.flag(head).store(0, Ordering::Release);
        }
        self.half(14).store(used, Ordering::Release);
    }

    fn entry(&self, head: u16) -> *mut u8 {
        self.base.wrapping_add(HEADER + ENTRY * usize::from(head))
    }

    fn counter_of(&self, head: u16) -> u64 {
        // SAFETY: inside the region; entries are aligned as the mapping is.
        u64::from_le(unsafe { word(self.entry(head).add(8)) }.load(Ordering::Relaxed))
    }

    fn flag(&self, head: u16) -> &AtomicU8 {
        // SAFETY: inside the region, which `self` keeps mapped.
        unsafe { AtomicU8::from_ptr(self.entry(head)) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        // SAFETY: as above, and aligned.
        unsafe { AtomicU16::from_ptr(self.entry(head).add(6).cast()) }
    }

    /// A field of the header: 8 version, 10 entries, 12 head of the last batch, 14 used index.
    fn half(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as above.
        unsafe { AtomicU16::from_ptr(self.base.add(offset).cast()) }
    }
}
