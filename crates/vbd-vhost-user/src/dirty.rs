//! The log of guest pages that the device has written, which live migration reads (vhost-user, VHOST_F_LOG_ALL).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::memory::Mapping;

/// Bytes that a bit stands for.
const PAGE: u64 = 4096;

/// A bitmap, one bit a page of guest-physical memory.
pub(crate) struct DirtyLog {
    mapping: Arc<Mapping>,
    /// Pages it has bits for.
    pages: u64,
}

impl DirtyLog {
    /// A log of `len` bytes at the start of a mapping of at least that.
    pub(crate) fn new(mapping: Arc<Mapping>, len: u64) -> Self {
        DirtyLog { mapping, pages: len.saturating_mul(8) }
    }

    /// Marks the pages that `len` bytes at a guest address lie in. False if the log has no bit for some of them:
    /// then the migration could not be right.
    pub(crate) fn mark(&self, address: u64, len: u64) -> bool {
        if len == 0 {
            return true;
        }
        let (first, last) = (address / PAGE, address.saturating_add(len - 1) / PAGE);
        if last >= self.pages {
            return false;
        }
        for page in first..=last {
            let Ok(byte) = usize::try_from(page / 8) else { return false };
            // SAFETY: the bit is inside the log, whose mapping `self` holds.
            let byte = unsafe { AtomicU8::from_ptr(self.mapping.start().add(byte)) };
            // The pages are written before: the front-end reads a page after it has taken its bit.
            byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
        true
    }
}
