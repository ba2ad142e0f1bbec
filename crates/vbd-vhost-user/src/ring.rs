//! The split virtqueue in shared memory (virtio 1.2, section 2.7): three tables that two sides write.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use crate::memory::{Memory, load16};

/// Largest queue: what the tables of a started queue may cost is bounded by it.
pub(crate) const MOST_ENTRIES: u16 = 4096;

/// The device asks not to be kicked (VRING_USED_F_NO_NOTIFY).
const USED_NO_NOTIFY: u16 = 1;
/// The driver asks not to be interrupted (VRING_AVAIL_F_NO_INTERRUPT).
const AVAIL_NO_INTERRUPT: u16 = 1;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Where a front-end has put a ring, in its own addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Addresses {
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// A descriptor, copied out of shared memory.
#[derive(Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) next: u16,
    flags: u16,
}

impl Descriptor {
    /// Copies a descriptor.
    ///
    /// # Safety
    /// `from` is valid for 16 bytes.
    #[inline]
    #[allow(clippy::cast_possible_truncation, reason = "the fields of a packed word")]
    pub(crate) unsafe fn load(from: *const u8) -> Self {
        // SAFETY: by the contract of this function.
        let [address, rest] = unsafe { load16(from) };
        Descriptor { address, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    pub(crate) fn has_next(&self) -> bool {
        self.flags & NEXT != 0
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.flags & WRITE != 0
    }

    pub(crate) fn is_indirect(&self) -> bool {
        self.flags & INDIRECT != 0
    }
}

/// Pointers to the three tables, checked once against the memory that they lie in.
#[derive(Clone, Copy)]
pub(crate) struct Ring {
    descriptors: *const u8,
    available: *mut u8,
    used: *mut u8,
    size: u16,
}

impl Ring {
    /// Finds the tables of a ring of `size` entries in `memory`, which must outlive it.
    ///
    /// # Errors
    /// The size is not allowed, or a table is misaligned or not in memory.
    pub(crate) fn new(memory: &Memory, at: Addresses, size: u16) -> Result<Self, &'static str> {
        if !size.is_power_of_two() || size > MOST_ENTRIES {
            return Err("the queue size is not a power of two up to 4096");
        }
        let entries = u64::from(size);
        let table = |address: u64, len: u64, alignment: usize| {
            let pointer = memory.user(address, len).ok_or("a ring lies outside of memory")?;
            match pointer.addr() % alignment {
                0 => Ok(pointer),
                _ => Err("a ring is misaligned"),
            }
        };
        Ok(Ring {
            descriptors: table(at.descriptors, 16 * entries, 16)?,
            available: table(at.available, 6 + 2 * entries, 2)?,
            used: table(at.used, 6 + 8 * entries, 4)?,
            size,
        })
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The descriptor with this index, if there is one.
    #[inline]
    pub(crate) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        // SAFETY: inside the table, which `new` has checked.
        Some(unsafe { Descriptor::load(self.descriptors.add(16 * usize::from(index))) })
    }

    /// What the driver has made available, as a running index. Entries before it are visible.
    #[inline]
    pub(crate) fn available(&self) -> u16 {
        u16::from_le(self.half(self.available, 2).load(Ordering::Acquire))
    }

    /// The head of the chain at a running index.
    #[inline]
    pub(crate) fn head(&self, at: u16) -> u16 {
        u16::from_le(self.half(self.available, 4 + 2 * self.slot(at)).load(Ordering::Relaxed))
    }

    /// The used index as it stands in memory.
    pub(crate) fn used(&self) -> u16 {
        u16::from_le(self.half(self.used, 2).load(Ordering::Acquire))
    }

    /// Fills the used entry at a running index; seen by the driver after [`publish`](Self::publish).
    #[inline]
    pub(crate) fn put_used(&self, at: u16, head: u16, written: u32) {
        let entry = self.used.wrapping_add(4 + 8 * self.slot(at));
        // SAFETY: inside the used table, which `new` has checked, with the alignment of its entries.
        unsafe {
            AtomicU32::from_ptr(entry.cast()).store(u32::from(head).to_le(), Ordering::Relaxed);
            AtomicU32::from_ptr(entry.add(4).cast()).store(written.to_le(), Ordering::Relaxed);
        }
    }

    /// Makes the used entries before a running index visible.
    #[inline]
    pub(crate) fn publish(&self, used: u16) {
        self.half(self.used, 2).store(used.to_le(), Ordering::Release);
    }

    /// Whether the driver wants to hear that the used index went from `old` to `new`.
    #[inline]
    pub(crate) fn wants_call(&self, event_index: bool, old: u16, new: u16) -> bool {
        // Between the used index and the driver's wish, which it writes and reads in the other order.
        fence(Ordering::SeqCst);
        if !event_index {
            return self.half(self.available, 0).load(Ordering::Relaxed).to_le() & AVAIL_NO_INTERRUPT == 0;
        }
        let event = self.half(self.available, 4 + 2 * usize::from(self.size)).load(Ordering::Relaxed);
        let passed = new.wrapping_sub(u16::from_le(event)).wrapping_sub(1);
        passed < new.wrapping_sub(old)
    }

    /// Asks to be kicked for what comes at the running index `next`; true if something is there already.
    pub(crate) fn ask_for_kick(&self, event_index: bool, next: u16) -> bool {
        match event_index {
            true => self.avail_event().store(next.to_le(), Ordering::Relaxed),
            false => self.half(self.used, 0).store(0, Ordering::Relaxed),
        }
        fence(Ordering::SeqCst);
        self.available() != next
    }

    /// Asks not to be kicked. With event indices that is the case once the last one asked for has passed.
    pub(crate) fn no_kicks(&self, event_index: bool) {
        if !event_index {
            self.half(self.used, 0).store(USED_NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }

    fn avail_event(&self) -> &AtomicU16 {
        self.half(self.used, 4 + 8 * usize::from(self.size))
    }

    #[inline]
    fn slot(&self, at: u16) -> usize {
        usize::from(at & (self.size - 1))
    }

    #[inline]
    fn half(&self, table: *mut u8, offset: usize) -> &AtomicU16 {
        // SAFETY: callers stay inside the tables, whose place and alignment `new` has checked; their memory outlives
        // the ring.
        unsafe { AtomicU16::from_ptr(table.add(offset).cast()) }
    }
}

/// A word in shared memory.
///
/// # Safety
/// `at` is valid for 8 bytes, aligned, for as long as the reference is used.
pub(crate) unsafe fn word<'a>(at: *mut u8) -> &'a AtomicU64 {
    // SAFETY: by the contract of this function.
    unsafe { AtomicU64::from_ptr(at.cast()) }
}
