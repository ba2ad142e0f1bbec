//! Operations, and the one place that carries an operation out by a plain system call.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::rc::Rc;

/// A piece of memory: `iovec` of readv(2).
pub type IoVec = libc::iovec;

/// What the kernel is asked to do. Lengths and offsets are in bytes.
///
/// The pointers must stay valid until the completion was delivered; see [`Local::submit`](crate::Local::submit).
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// preadv(2). At most `IOV_MAX` (1024) pieces.
    Read {
        /// The first piece.
        iov: *const IoVec,
        /// Number of pieces.
        count: u32,
        /// Where in the file.
        offset: u64,
    },
    /// pwritev2(2).
    Write {
        /// The first piece.
        iov: *const IoVec,
        /// Number of pieces.
        count: u32,
        /// Where in the file.
        offset: u64,
        /// Durable when it completes (RWF_DSYNC).
        dsync: bool,
    },
    /// fdatasync(2).
    Sync,
    /// fallocate(2).
    Fallocate {
        /// FALLOC_FL_ flags.
        mode: i32,
        /// Where in the file.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Wait once until one of the poll(2) events holds; the result is the set that does.
    Poll {
        /// POLLIN, POLLOUT, ...
        events: i16,
    },
    /// recv(2) into one buffer; 0 means the peer has closed.
    Recv {
        /// Its start.
        buffer: *mut u8,
        /// Its length.
        len: usize,
    },
    /// sendmsg(2); may send less than asked.
    Send {
        /// The message with its pieces.
        message: *const libc::msghdr,
    },
    /// accept4(2) with SOCK_CLOEXEC; the result is a new descriptor that the sink owns.
    Accept,
    /// A command of the descriptor's own driver (IORING_OP_URING_CMD), which there is only with io_uring. Its result
    /// may be long in coming, and it cannot be cancelled: it ends with the device, or with this thread.
    Command {
        /// The driver's number for it.
        op: u32,
        /// The driver's own.
        data: [u8; 16],
    },
}

/// What an operation in flight waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waits {
    /// Storage, which answers.
    Storage,
    /// Somebody else, perhaps for ever.
    Peer,
    /// A driver, which gives it back when this thread ends.
    Driver,
}

impl Op {
    /// What this waits for.
    pub(crate) fn waits(&self) -> Waits {
        match self {
            Op::Poll { .. } | Op::Recv { .. } | Op::Send { .. } | Op::Accept => Waits::Peer,
            Op::Command { .. } => Waits::Driver,
            _ => Waits::Storage,
        }
    }
}

/// Names an operation in flight, for [`Local::cancel`](crate::Local::cancel). Stale names are harmless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpId(pub(crate) u64);

impl OpId {
    /// Set in the names of what waits for storage, so that an engine knows it by its result.
    const STORAGE: u64 = 1 << 63;

    /// A name of a slot and a generation, which has 31 bits.
    pub(crate) fn new(generation: u32, slot: u32, waits: Waits) -> Self {
        let storage = if waits == Waits::Storage { Self::STORAGE } else { 0 };
        OpId(storage | u64::from(generation) << 32 | u64::from(slot))
    }

    pub(crate) fn slot(self) -> u64 {
        self.0 & 0xffff_ffff
    }

    pub(crate) fn generation(self) -> u64 {
        (self.0 & !Self::STORAGE) >> 32
    }

    pub(crate) fn is_storage(self) -> bool {
        self.0 & Self::STORAGE != 0
    }
}

/// Receives results. One sink may have many operations in flight, told apart by the token it chose.
pub trait Completion {
    /// `result` is what the system call returned, or `-errno`. Called on the reactor's thread, never from within
    /// `submit`, once for each operation.
    fn complete(self: Rc<Self>, token: u64, result: i32);
}

/// Carries out a file operation on the calling thread and returns its result or `-errno`. EINTR is retried.
/// For files that live in memory, where a ring costs more than the work, and for the thread pool.
///
/// # Safety
/// The pointers in `op` must be valid for the length they state.
pub unsafe fn execute(fd: BorrowedFd<'_>, op: &Op) -> i32 {
    let fd = fd.as_raw_fd();
    loop {
        // SAFETY: the caller vouches for the pointers; the descriptor is borrowed and so open.
        let result = unsafe { system_call(fd, op) };
        if result >= 0 {
            return i32::try_from(result).unwrap_or(i32::MAX);
        }
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        if errno != libc::EINTR {
            return -errno;
        }
    }
}

/// # Safety
/// `fd` is open and the pointers in `op` are valid.
unsafe fn system_call(fd: i32, op: &Op) -> isize {
    // SAFETY: by this function's own contract.
    unsafe {
        match *op {
            // One piece needs no list of them, which the kernel would have to copy and check.
            Op::Read { iov, count: 1, offset } => {
                libc::pread(fd, (*iov).iov_base, (*iov).iov_len, offset.cast_signed())
            }
            Op::Write { iov, count: 1, offset, dsync: false } => {
                libc::pwrite(fd, (*iov).iov_base, (*iov).iov_len, offset.cast_signed())
            }
            Op::Read { iov, count, offset } => libc::preadv(fd, iov, int(count), offset.cast_signed()),
            Op::Write { iov, count, offset, dsync } => {
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                libc::pwritev2(fd, iov, int(count), offset.cast_signed(), flags)
            }
            Op::Sync => libc::fdatasync(fd) as isize,
            Op::Fallocate { mode, offset, len } => {
                libc::fallocate(fd, mode, offset.cast_signed(), len.cast_signed()) as isize
            }
            Op::Poll { events } => {
                let mut set = libc::pollfd { fd, events, revents: 0 };
                let ready = libc::poll(&raw mut set, 1, 0) as isize;
                if ready > 0 { set.revents.cast_unsigned() as isize } else { would_block(ready) }
            }
            Op::Recv { buffer, len } => libc::recv(fd, buffer.cast(), len, libc::MSG_DONTWAIT),
            Op::Send { message } => libc::sendmsg(fd, message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL),
            Op::Accept => {
                let mut set = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
                let ready = libc::poll(&raw mut set, 1, 0) as isize;
                if ready <= 0 {
                    return would_block(ready);
                }
                libc::accept4(fd, std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC) as isize
            }
            // There is no such call.
            Op::Command { .. } => fail(libc::EOPNOTSUPP),
        }
    }
}

/// poll(2) said that nothing is ready: the answer of a descriptor that does not block.
fn would_block(ready: isize) -> isize {
    if ready == 0 { fail(libc::EAGAIN) } else { -1 }
}

/// What a system call returns that fails with this error.
fn fail(errno: i32) -> isize {
    // SAFETY: errno is this thread's own.
    unsafe { *libc::__errno_location() = errno };
    -1
}

fn int(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}
