//! Memory of requests: pages of the domain that are mapped, and pages of this process to copy to and from.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::sys::{GrantTable, Mapping, PAGE};

/// What a queue has mapped, kept by every request that uses any of it. Dropping it unmaps all.
pub(crate) struct Memory {
    pub(crate) grants: Box<dyn GrantTable>,
    mapped: Mutex<Vec<Mapping>>,
    pub(crate) arena: Arena,
    counters: Arc<Pages>,
    /// Pages that could not be unmapped: they go with `grants`.
    stuck: AtomicU64,
}

/// Pages of the domain that are mapped, read from other threads.
#[derive(Default)]
pub(crate) struct Pages {
    pub(crate) mapped: AtomicU64,
    pub(crate) persistent: AtomicU64,
}

impl Memory {
    pub(crate) fn new(grants: Box<dyn GrantTable>, arena: Arena, counters: Arc<Pages>) -> Arc<Memory> {
        Arc::new(Memory { grants, mapped: Mutex::default(), arena, counters, stuck: AtomicU64::new(0) })
    }

    /// Maps pages until [`unmap`](Self::unmap), or the end.
    pub(crate) fn map(&self, references: &[u32], writable: bool) -> io::Result<Mapping> {
        let mapping = self.grants.map(references, writable)?;
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner).push(mapping);
        self.counters.mapped.fetch_add(mapping.pages as u64, Ordering::Relaxed);
        Ok(mapping)
    }

    /// Takes a mapping back.
    ///
    /// # Safety
    /// Nobody uses it any more.
    pub(crate) unsafe fn unmap(&self, mapping: Mapping) {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = mapped.iter().position(|other| *other == mapping) else { return };
        mapped.swap_remove(place);
        drop(mapped);
        // SAFETY: it is from this table and was not yet taken back; the caller vouches for the rest.
        unsafe { self.give_back(mapping) };
    }

    /// # Safety
    /// It is from this table, was not yet taken back, and nobody uses it any more.
    unsafe fn give_back(&self, mapping: Mapping) {
        let pages = mapping.pages as u64;
        // SAFETY: the caller vouches for it.
        match unsafe { self.grants.unmap(mapping) } {
            Ok(()) => drop(self.counters.mapped.fetch_sub(pages, Ordering::Relaxed)),
            Err(error) => {
                self.stuck.fetch_add(pages, Ordering::Relaxed);
                tracing::error!(
                    "{pages} pages of a domain cannot be unmapped; they stay so until its device closes: {error}"
                );
            }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for mapping in std::mem::take(self.mapped.get_mut().unwrap_or_else(PoisonError::into_inner)) {
            // SAFETY: requests hold this value; there are none left.
            unsafe { self.give_back(mapping) };
        }
        // Now they go.
        self.counters.mapped.fetch_sub(*self.stuck.get_mut(), Ordering::Relaxed);
    }
}

/// Pages that are mapped for one request. Dropping it unmaps them.
pub(crate) struct Mapped {
    pub(crate) memory: Arc<Memory>,
    pub(crate) mapping: Mapping,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the request that used them held this value.
        unsafe { self.memory.unmap(self.mapping) };
    }
}

/// Pages of this process, given out in pieces of 1, 2, 4, ... pages; memory is used when it is first touched.
pub(crate) struct Arena {
    start: *mut u8,
    pages: usize,
}

// SAFETY: it only owns the mapping.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    pub(crate) fn new(pages: usize) -> io::Result<Arena> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping, anywhere.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), pages * PAGE, access, flags)? };
        Ok(Arena { start: start.cast(), pages })
    }

    pub(crate) fn at(&self, chunk: Chunk) -> *mut u8 {
        assert!((chunk.page as usize) < self.pages);
        self.start.wrapping_add(chunk.page as usize * PAGE)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; whoever used it is gone.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.pages * PAGE) };
    }
}

/// A piece of an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    page: u32,
    order: u8,
}

/// Which pages of an arena are free. A buddy allocator without merging: when all has come back it starts anew.
pub(crate) struct Chunks {
    pages: u32,
    next: u32,
    out: usize,
    free: [Vec<u32>; 13],
}

impl Chunks {
    pub(crate) fn new(pages: usize) -> Chunks {
        Chunks {
            pages: u32::try_from(pages).unwrap_or(0),
            next: 0,
            out: 0,
            free: std::array::from_fn(|_| Vec::new()),
        }
    }

    /// So many pages, one after the other; none if there are not enough.
    #[inline]
    pub(crate) fn take(&mut self, pages: usize) -> Option<Chunk> {
        let order = pages.next_power_of_two().trailing_zeros() as usize;
        let len = 1u32 << order;
        if order >= self.free.len() {
            return None;
        }
        if self.out == 0 {
            self.start_anew(order);
        }
        let page = match self.free[order].pop() {
            Some(page) => page,
            None if self.pages - self.next >= len => {
                self.next += len;
                self.next - len
            }
            // The rest of a longer one stays unused until all has come back.
            None => self.free[order..].iter_mut().find_map(Vec::pop)?,
        };
        self.out += 1;
        Some(Chunk { page, order: u8::try_from(order).unwrap_or(0) })
    }

    /// Where there is nothing out, and too little that is in one piece, what was cut up is forgotten.
    fn start_anew(&mut self, order: usize) {
        if self.free[order].is_empty() && self.pages - self.next < 1 << order {
            self.free.iter_mut().for_each(Vec::clear);
            self.next = 0;
        }
    }

    #[inline]
    pub(crate) fn give_back(&mut self, chunk: Chunk) {
        self.out -= 1;
        self.free[usize::from(chunk.order)].push(chunk.page);
    }
}

/// Grants that stay mapped between requests: the front-end uses the same pages again and again.
///
/// Pages that were first seen in one request are mapped together, as one region, and go together: the region that was
/// used longest ago, of those not in use.
pub(crate) struct Persistent {
    most: usize,
    pages: HashMap<u32, Page, Spread>,
    regions: Vec<Option<Region>>,
    free: Vec<u32>,
    clock: u64,
    counters: Arc<Pages>,
}

#[derive(Clone, Copy)]
struct Page {
    at: *mut u8,
    region: u32,
}

struct Region {
    mapping: Mapping,
    references: Box<[u32]>,
    uses: u32,
    used_at: u64,
}

/// Why a request does not get mapped pages.
pub(crate) enum NotMapped {
    /// All that may stay mapped is in use.
    Full,
    /// The domain does not grant them.
    Refused(io::Error),
}

impl Persistent {
    pub(crate) fn new(most: usize, seed: u64, counters: Arc<Pages>) -> Persistent {
        Persistent {
            most,
            pages: HashMap::with_hasher(Spread(seed | 1)),
            regions: Vec::new(),
            free: Vec::new(),
            clock: 0,
            counters,
        }
    }

    /// Where these pages are; each stays until [`release`](Self::release) of the region appended to `regions`. `idle`
    /// says that no request that this queue does not know of uses any, so that some may be unmapped.
    pub(crate) fn hold(
        &mut self,
        memory: &Memory,
        references: impl Iterator<Item = u32> + Clone,
        idle: bool,
        regions: &mut Vec<u32>,
        mut at: impl FnMut(usize, *mut u8),
    ) -> Result<(), NotMapped> {
        self.clock += 1;
        let before = regions.len();
        let mut missing = false;
        for (index, reference) in references.clone().enumerate() {
            match self.pages.get(&reference) {
                Some(page) => at(index, self.use_page(*page, regions)),
                None => missing = true,
            }
        }
        if !missing {
            return Ok(());
        }
        let result = self.map_missing(memory, references.clone(), idle);
        if let Err(error) = result {
            regions.drain(before..).for_each(|region| self.release(region));
            return Err(error);
        }
        // Those that were held stay so; the new ones are all in the last region made.
        regions.drain(before..).for_each(|region| self.release(region));
        for (index, reference) in references.enumerate() {
            if let Some(page) = self.pages.get(&reference) {
                at(index, self.use_page(*page, regions));
            }
        }
        Ok(())
    }

    #[inline]
    fn use_page(&mut self, page: Page, regions: &mut Vec<u32>) -> *mut u8 {
        if let Some(Some(region)) = self.regions.get_mut(page.region as usize) {
            region.uses += 1;
            region.used_at = self.clock;
            regions.push(page.region);
        }
        page.at
    }

    #[cold]
    fn map_missing(
        &mut self,
        memory: &Memory,
        references: impl Iterator<Item = u32>,
        idle: bool,
    ) -> Result<(), NotMapped> {
        let mut missing: Vec<u32> =
            references.filter(|reference| !self.pages.contains_key(reference)).collect();
        missing.sort_unstable();
        missing.dedup();
        while self.pages.len() + missing.len() > self.most {
            if !idle || !self.evict(memory) {
                return Err(NotMapped::Full);
            }
        }
        // Pages of this queue's own requests go both ways, so they are mapped for both.
        let mapping = memory.map(&missing, true).map_err(NotMapped::Refused)?;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.regions.push(None);
            u32::try_from(self.regions.len() - 1).unwrap_or(u32::MAX)
        });
        for (index, reference) in missing.iter().enumerate() {
            let at = mapping.start.wrapping_add(index * PAGE);
            self.pages.insert(*reference, Page { at, region: slot });
        }
        self.counters.persistent.fetch_add(missing.len() as u64, Ordering::Relaxed);
        self.regions[slot as usize] =
            Some(Region { mapping, references: missing.into(), uses: 0, used_at: self.clock });
        Ok(())
    }

    /// A use of a region has ended.
    #[inline]
    pub(crate) fn release(&mut self, region: u32) {
        if let Some(Some(region)) = self.regions.get_mut(region as usize) {
            region.uses -= 1;
        }
    }

    /// Unmaps the region that was used longest ago; false if all are in use.
    fn evict(&mut self, memory: &Memory) -> bool {
        let idle = self.regions.iter().enumerate().filter_map(|(slot, region)| {
            region.as_ref().filter(|region| region.uses == 0).map(|region| (region.used_at, slot))
        });
        let Some((_, slot)) = idle.min() else { return false };
        let Some(region) = self.regions[slot].take() else { return false };
        for reference in &region.references {
            self.pages.remove(reference);
        }
        self.counters.persistent.fetch_sub(region.references.len() as u64, Ordering::Relaxed);
        self.free.push(u32::try_from(slot).unwrap_or(u32::MAX));
        // SAFETY: no request uses the region, and none was lost.
        unsafe { memory.unmap(region.mapping) };
        true
    }
}

impl Drop for Persistent {
    fn drop(&mut self) {
        self.counters.persistent.fetch_sub(self.pages.len() as u64, Ordering::Relaxed);
    }
}

/// Spreads grant references by a multiplication that the domain cannot know.
#[derive(Clone)]
pub(crate) struct Spread(u64);

pub(crate) struct Spreading {
    factor: u64,
    value: u64,
}

impl BuildHasher for Spread {
    type Hasher = Spreading;

    fn build_hasher(&self) -> Spreading {
        Spreading { factor: self.0, value: 0 }
    }
}

impl Hasher for Spreading {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u32(u32::from(*byte)));
    }

    #[inline]
    fn write_u32(&mut self, value: u32) {
        let wide =
            u128::from(self.factor) * u128::from(self.value ^ u64::from(value) ^ 0x9e37_79b9_7f4a_7c15);
        #[allow(clippy::cast_possible_truncation, reason = "both halves are used")]
        let folded = (wide >> 64) as u64 ^ wide as u64;
        self.value = folded;
    }

    #[inline]
    fn finish(&self) -> u64 {
        self.value
    }
}
