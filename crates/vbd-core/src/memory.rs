//! Memory that O_DIRECT takes, and pieces of requests.
//!
//! For whoever reads or writes on a request's behalf: through a [`Buffer`] of its own, or through a part of the
//! request's pieces ([`slice()`]).

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use vbd_ring::IoVec;

/// Zeroed memory, aligned to a page.
///
/// Its pieces are addresses: who hands one to a request keeps the buffer alive as the request's guard, and looks into
/// it ([`bytes`](Self::bytes)) when the request has come back.
pub struct Buffer {
    start: NonNull<u8>,
    len: usize,
    layout: Layout,
}

// SAFETY: plain memory with one owner; nothing about it belongs to a thread.
unsafe impl Send for Buffer {}
// SAFETY: shared references give out addresses only.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// So many bytes of zeroes.
    ///
    /// # Panics
    /// There is no such memory.
    pub fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), 4096).expect("buffers are small");
        // SAFETY: the layout has a size.
        let start =
            NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        Buffer { start, len, layout }
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes from `from` on as a piece of memory.
    ///
    /// # Panics
    /// The buffer is shorter.
    pub fn piece(&self, from: usize, len: usize) -> IoVec {
        assert!(from.checked_add(len).is_some_and(|end| end <= self.layout.size()), "a piece of the buffer");
        // SAFETY: inside the allocation.
        IoVec { iov_base: unsafe { self.start.add(from) }.as_ptr().cast(), iov_len: len }
    }

    /// All of it as a piece of memory.
    pub fn whole(&self) -> IoVec {
        self.piece(0, self.len)
    }

    /// What is in it.
    ///
    /// # Safety
    /// No request that was given a piece of it is under way.
    pub unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: the allocation is this long and initialised; nobody writes to it, says the caller.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// What is in it, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; a request that is given a piece holds the buffer as its guard, so that there is no unique
        // reference to it meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: made with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// At most `most` pieces that cover up to `len` bytes of `memory` after the first `skip`, and what they cover.
pub fn slice(memory: &[IoVec], mut skip: usize, len: usize, most: usize) -> (Vec<IoVec>, usize) {
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
pub unsafe fn copy(flat: IoVec, memory: &[IoVec], skip: usize, into_memory: bool) {
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

/// Fills `len` bytes of `memory` after the first `skip` with zeroes.
///
/// # Safety
/// Every piece of `memory` is valid for its length.
pub unsafe fn zero(memory: &[IoVec], skip: usize, len: usize) {
    for piece in slice(memory, skip, len, usize::MAX).0 {
        // SAFETY: valid for the piece's length.
        unsafe { std::ptr::write_bytes(piece.iov_base.cast::<u8>(), 0, piece.iov_len) };
    }
}
