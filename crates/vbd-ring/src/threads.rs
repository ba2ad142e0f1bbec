//! The thread-pool engine: the same face where io_uring is forbidden. Sockets and eventfds wait in one poll(2).

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crate::op::Waits;
use crate::reactor::Shared;
use crate::{FileHandle, Op, OpId, execute, pool};

pub(crate) struct Threads {
    shared: Arc<Shared>,
    /// Operations that wait until their descriptor is ready.
    waiting: Vec<(OpId, FileHandle, Op)>,
    finished: Vec<(OpId, i32)>,
}

/// An operation on its way to a pool thread.
struct Job(Op);

// SAFETY: the pointers in the operation stay valid until its result was reaped, and nothing else uses what they point
// to in a way that the kernel's own asynchronous I/O would not.
unsafe impl Send for Job {}

impl Threads {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Threads { shared, waiting: Vec::new(), finished: Vec::new() }
    }

    /// # Safety
    /// The pointers in `op` stay valid until the result was reaped.
    pub(crate) unsafe fn start(&mut self, id: OpId, file: &FileHandle, op: &Op) {
        if op.waits() == Waits::Peer {
            self.waiting.push((id, file.clone(), *op));
            return;
        }
        let (fd, shared, job) = (file.descriptor(), self.shared.clone(), Job(*op));
        pool::run(Box::new(move || {
            let job = job;
            // SAFETY: by the contract of `start`.
            let result = unsafe { execute(fd.as_fd(), &job.0) };
            shared.finished(id, result);
        }));
    }

    pub(crate) fn cancel(&mut self, id: OpId) {
        if let Some(index) = self.waiting.iter().position(|(waiting, ..)| *waiting == id) {
            self.waiting.swap_remove(index);
            self.finished.push((id, -libc::ECANCELED));
        }
    }

    pub(crate) fn reap(&mut self, done: &mut Vec<(OpId, i32)>, timeout: Option<Duration>) {
        done.append(&mut self.finished);
        if self.waiting.is_empty() {
            return;
        }
        let mut set: Vec<libc::pollfd> = self
            .waiting
            .iter()
            .map(|(_, file, op)| libc::pollfd { fd: file.raw(), events: events(op), revents: 0 })
            .collect();
        let timeout = if done.is_empty() { timeout } else { Some(Duration::ZERO) };
        let time = timeout.map(|time| libc::timespec {
            tv_sec: time.as_secs().cast_signed(),
            tv_nsec: i64::from(time.subsec_nanos()),
        });
        let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the set and the time live across the call; the descriptors are held open by their handles.
        let ready =
            unsafe { libc::ppoll(set.as_mut_ptr(), set.len() as libc::nfds_t, time, std::ptr::null()) };
        if ready <= 0 {
            return;
        }
        for index in (0..set.len()).rev().filter(|index| set[*index].revents != 0).collect::<Vec<_>>() {
            let (id, file, op) = &self.waiting[index];
            let result = match op {
                Op::Poll { .. } => i32::from(set[index].revents),
                // SAFETY: by the contract of `start`.
                op => unsafe { execute(file.as_fd(), op) },
            };
            if result != -libc::EAGAIN {
                done.push((*id, result));
                self.waiting.swap_remove(index);
            }
        }
    }
}

fn events(op: &Op) -> i16 {
    match op {
        Op::Poll { events } => *events,
        Op::Send { .. } => libc::POLLOUT,
        _ => libc::POLLIN,
    }
}
