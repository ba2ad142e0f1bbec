//! What the page cache holds and the storage does not yet have.

use std::os::fd::{AsFd, AsRawFd};

/// Has the kernel begin to write a range (bytes) of a file that is in its page cache, so that little is left to do for the
/// flush that makes it durable. Does not wait for it, unless there is too much under way. Advice: what fails is told by that
/// flush.
pub fn begin(file: impl AsFd, start: u64, len: u64) {
    let (Ok(start), Ok(len)) = (start.try_into(), len.try_into()) else { return };
    // SAFETY: it takes numbers alone, and the descriptor is open while it is borrowed.
    unsafe { libc::sync_file_range(file.as_fd().as_raw_fd(), start, len, libc::SYNC_FILE_RANGE_WRITE) };
}
