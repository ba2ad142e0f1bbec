//! Blocks that a file and the image have in common, where their filesystem can do that.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Has a part of `to` share the blocks of a part of `from`. Offsets and length are whole blocks.
pub(super) fn share(from: &File, start: u64, length: u64, to: &File, at: u64) -> io::Result<()> {
    let range = libc::file_clone_range {
        src_fd: from.as_raw_fd().into(),
        src_offset: start,
        src_length: length,
        dest_offset: at,
    };
    // SAFETY: both files are open while the call lasts, and the kernel reads the structure alone.
    let result = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const range) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether files in `directory`, where the image is, can share blocks with `sample`, a file of at least 4 KiB.
pub(super) fn can_share(sample: &File, directory: &Path) -> bool {
    let Ok(scratch) = tempfile::tempfile_in(directory) else { return false };
    share(sample, 0, 4096, &scratch, 0).is_ok()
}
