//! Control commands of drivers that take them by io_uring (ublk, NVMe): one at a time, on a ring of their own.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, cqueue, opcode, squeue, types::Fd};

/// Sends one command of 80 bytes (IORING_OP_URING_CMD with IORING_SETUP_SQE128) and waits for its result, for as long
/// as the driver takes; what is negative is an error's number. Needs Linux 5.19.
///
/// # Errors
/// No such ring can be had.
///
/// # Safety
/// What the command's bytes point to is as the driver expects it until this returns.
pub unsafe fn run(file: BorrowedFd<'_>, op: u32, data: [u8; 80]) -> io::Result<i32> {
    let mut ring = IoUring::<squeue::Entry128, cqueue::Entry>::builder().build(1)?;
    let entry = opcode::UringCmd80::new(Fd(file.as_raw_fd()), op).cmd(data).build();
    // SAFETY: the caller vouches for what the command points to, until the result is here.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
    loop {
        match ring.submit_and_wait(1) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => {
                other?;
            }
        }
        if let Some(result) = ring.completion().next() {
            return Ok(result.result());
        }
    }
}
