//! Eventfds to and from the front-end. It may do with them what it likes, so nothing here can block.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use rustix::fs::OFlags;
use vbd_core::IoVec;
use vbd_ring::{Completion, FileHandle, Local, Op};

/// Signals on their way; more than that and nobody takes them.
const MOST_PENDING: u32 = 64;

struct Signal(IoVec);

// SAFETY: points to a constant.
unsafe impl Sync for Signal {}

static ONE: u64 = 1;
static SIGNAL: Signal = Signal(IoVec { iov_base: (&raw const ONE).cast_mut().cast(), iov_len: 8 });

/// The filesystem of eventfds, among others.
const ANON_INODE_FS_MAGIC: i64 = 0x0904_1934;

/// Refuses a descriptor from the front-end that is no eventfd: to poll one on FUSE, or an epoll that holds one, can
/// take for ever.
///
/// # Errors
/// It is something else.
pub(crate) fn check(fd: &OwnedFd) -> io::Result<()> {
    let is_eventfd = match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(link) => link.as_os_str() == "anon_inode:[eventfd]",
        // No /proc here: as good as can be said without.
        Err(_) => rustix::fs::fstatfs(fd)?.f_type == ANON_INODE_FS_MAGIC,
    };
    is_eventfd.then_some(()).ok_or_else(|| io::Error::other("this is no eventfd"))
}

/// Makes an eventfd from the front-end safe to write to: a full one must not hold up the thread.
fn no_waiting(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

/// Empties an eventfd. False if it is none.
pub(crate) fn drain(fd: impl AsFd) -> bool {
    let mut count = 0u64;
    let piece = IoVec { iov_base: (&raw mut count).cast(), iov_len: 8 };
    // RWF_NOWAIT, since whether the descriptor blocks is the front-end's choice, at any time.
    // SAFETY: the piece is valid for the call.
    let result = unsafe { libc::preadv2(fd.as_fd().as_raw_fd(), &raw const piece, 1, -1, libc::RWF_NOWAIT) };
    result == 8 || io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock
}

/// Signals an eventfd of the front-end: an interrupt, or that a queue is broken.
pub(crate) struct Call {
    file: FileHandle,
    pending: Rc<Pending>,
}

#[derive(Default)]
struct Pending(Cell<u32>);

impl Completion for Pending {
    fn complete(self: Rc<Self>, _token: u64, _result: i32) {
        self.0.set(self.0.get() - 1);
    }
}

impl Call {
    /// For an eventfd that was [checked](check).
    pub(crate) fn new(local: &Local, fd: Arc<OwnedFd>) -> Self {
        // Without this a write that has to wait goes to a thread of the kernel, which is slow.
        let _ = no_waiting(&fd);
        Call { file: local.file(fd), pending: Rc::default() }
    }

    /// Sends a signal with the reactor's next batch, which costs no system call of its own and cannot block.
    pub(crate) fn send(&self, local: &Local) {
        if !local.is_uring() {
            // The front-end shares the descriptor's flags, and may have changed them.
            let _ = no_waiting(&self.file.descriptor());
            // What can go wrong is a full counter, which is as good as one more.
            let _ = rustix::io::write(&self.file, &1u64.to_ne_bytes());
            return;
        }
        let pending = self.pending.0.get();
        if pending >= MOST_PENDING {
            return;
        }
        self.pending.0.set(pending + 1);
        let op = Op::Write { iov: &raw const SIGNAL.0, count: 1, offset: 0, dsync: false };
        // SAFETY: the operation points to constants.
        unsafe { local.submit(&self.file, &op, self.pending.clone(), 0) };
    }
}
