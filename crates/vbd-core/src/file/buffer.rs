//! Memory that O_DIRECT takes, and pieces of requests.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use vbd_ring::IoVec;

/// Zeroed memory, aligned to a page.
pub(crate) struct Buffer {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory with one owner; nothing about it belongs to a thread.
unsafe impl Send for Buffer {}
// SAFETY: shared references give out addresses only.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub(crate) fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), 4096).expect("buffers are small");
        // SAFETY: the layout has a size.
        let start =
            NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        Buffer { start, layout }
    }

    /// `len` bytes from `from` on as a piece of memory.
    pub(crate) fn piece(&self, from: usize, len: usize) -> IoVec {
        assert!(from.checked_add(len).is_some_and(|end| end <= self.layout.size()), "a piece of the buffer");
        // SAFETY: inside the allocation.
        IoVec { iov_base: unsafe { self.start.add(from) }.as_ptr().cast(), iov_len: len }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: made with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// At most `most` pieces that cover up to `len` bytes of `memory` after the first `skip`, and what they cover.
pub(super) fn slice(memory: &[IoVec], mut skip: usize, len: usize, most: usize) -> (Vec<IoVec>, usize) {
    let (mut pieces, mut left) = (Vec::new(), len);
    for piece in memory {
        if skip >= piece.iov_len {
            skip -= piece.iov_len;
            continue;
        }
        if left == 0 || pieces.len() == most {
            break;
        }
        let take = (piece.iov_len - skip).min(left);
        pieces.push(IoVec { iov_base: piece.iov_base.wrapping_byte_add(skip), iov_len: take });
        left -= take;
        skip = 0;
    }
    (pieces, len - left)
}

/// Copies between a buffer's piece and as many bytes of `memory` after the first `skip`.
///
/// # Safety
/// Every piece of `memory` is valid for its length, and `flat` too.
pub(super) unsafe fn copy(flat: IoVec, memory: &[IoVec], skip: usize, into_memory: bool) {
    let (pieces, covered) = slice(memory, skip, flat.iov_len, usize::MAX);
    debug_assert_eq!(covered, flat.iov_len);
    let mut at: *mut u8 = flat.iov_base.cast();
    for piece in pieces {
        let other: *mut u8 = piece.iov_base.cast();
        let (from, to) = if into_memory { (at.cast_const(), other) } else { (other.cast_const(), at) };
        // SAFETY: both sides are valid for the piece's length. A guest may write to its memory meanwhile; the bytes it
        // then gets are its own doing.
        unsafe {
            std::ptr::copy(from, to, piece.iov_len);
            at = at.add(piece.iov_len);
        }
    }
}
