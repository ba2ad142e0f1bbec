//! The io_uring engine. Built for Linux 6.1 (single issuer, deferred task work), with a plain ring as second choice.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use io_uring::types::{CancelBuilder, Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::{FileHandle, Op, OpId};

const ENTRIES: u32 = 256;
/// So many entries go to the kernel at once, so that storage works while more is prepared; fewer go with the next sleep
/// or spin, in one call.
const BATCH: usize = 4;
/// As long as storage has no more than this to do, each entry for it goes at once: it loses more by waiting than the calls
/// cost. (A bare relay of 32 requests between two threads loses a tenth to a quarter by batches.)
const FEW: usize = 40;
const COMPLETIONS: u32 = 4096;
/// Slots of the table of registered files; more files than that are used by their plain descriptor.
const FILES: u32 = 4096;
/// `user_data` of the engine's own entries, whose results nobody waits for.
const OWN: u64 = u64::MAX;
/// IORING_ENTER_GETEVENTS.
const GETEVENTS: u32 = 1;

pub(crate) struct Uring {
    ring: IoUring,
    /// Entries that found the submission queue full: back-pressure, never an error.
    backlog: VecDeque<squeue::Entry>,
    free_files: Vec<u32>,
    /// Entries for storage that were started and whose results were not collected.
    for_storage: usize,
}

impl Uring {
    pub(crate) fn new() -> std::io::Result<Self> {
        let deferred = IoUring::builder()
            .setup_cqsize(COMPLETIONS)
            .setup_clamp()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(ENTRIES);
        let ring = match deferred {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().setup_cqsize(COMPLETIONS).setup_clamp().build(ENTRIES)?
            }
            other => other?,
        };
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(std::io::Error::other("the kernel's io_uring is too old (5.11 is needed)"));
        }
        let free_files = match ring.submitter().register_files_sparse(FILES) {
            Ok(()) => (0..FILES).rev().collect(),
            Err(_) => Vec::new(),
        };
        Ok(Uring { ring, backlog: VecDeque::new(), free_files, for_storage: 0 })
    }

    pub(crate) fn register(&mut self, fd: &OwnedFd) -> Option<u32> {
        let slot = self.free_files.pop()?;
        match self.ring.submitter().register_files_update(slot, &[fd.as_raw_fd()]) {
            Ok(_) => Some(slot),
            Err(_) => {
                self.free_files.push(slot);
                None
            }
        }
    }

    pub(crate) fn unregister(&mut self, slot: u32) {
        if self.ring.submitter().register_files_update(slot, &[-1]).is_ok() {
            self.free_files.push(slot);
        }
    }

    /// # Safety
    /// The pointers in `op` stay valid until the result was reaped.
    pub(crate) unsafe fn start(&mut self, id: OpId, file: &FileHandle, op: &Op) {
        let entry = match file.slot() {
            // A registered file is its slot's number and a flag.
            Some(slot) => entry(Fd(slot.cast_signed()), op).flags(squeue::Flags::FIXED_FILE),
            None => entry(Fd(file.raw()), op),
        };
        self.push(entry.user_data(id.0));
        if id.is_storage() {
            self.for_storage += 1;
            if self.for_storage <= FEW {
                self.flush();
            }
        }
    }

    pub(crate) fn cancel(&mut self, id: OpId) {
        self.push(opcode::AsyncCancel2::new(CancelBuilder::user_data(id.0)).build().user_data(OWN));
    }

    fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: what the entry points to is valid by the contract of `start`.
        if !self.backlog.is_empty() || unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
        if self.ring.submission().len() >= BATCH {
            self.flush();
        }
    }

    pub(crate) fn reap(&mut self, done: &mut Vec<(OpId, i32)>) {
        let (queued, task_work) = {
            let queue = self.ring.submission();
            (queue.len(), queue.taskrun() || queue.cq_overflow())
        };
        if task_work || queued >= BATCH || !self.backlog.is_empty() {
            self.flush();
        }
        self.collect(done);
    }

    /// Hands everything that was started to the kernel.
    pub(crate) fn flush(&mut self) {
        while !self.ring.submission().is_empty() || self.refill() > 0 {
            if !self.enter(0, None) {
                return;
            }
        }
        let queue = self.ring.submission();
        if queue.taskrun() || queue.cq_overflow() {
            drop(queue);
            self.enter(0, None);
        }
    }

    pub(crate) fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<(OpId, i32)>) {
        let before = done.len();
        if !self.backlog.is_empty() {
            self.flush();
        }
        self.collect(done);
        if done.len() == before {
            self.enter(1, timeout);
            self.collect(done);
        }
    }

    /// Moves entries from the backlog to the queue; says how many.
    fn refill(&mut self) -> usize {
        let mut queue = self.ring.submission();
        let mut moved = 0;
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `push`.
            if unsafe { queue.push(entry) }.is_err() {
                break;
            }
            self.backlog.pop_front();
            moved += 1;
        }
        moved
    }

    /// One io_uring_enter. Failures (EINTR, EBUSY, EAGAIN, ETIME) leave the entries queued for the next turn.
    /// Says whether it went well.
    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> bool {
        let queued = u32::try_from(self.ring.submission().len()).unwrap_or(u32::MAX);
        let submitter = self.ring.submitter();
        let result = match timeout {
            Some(timeout) => {
                let time = Timespec::new().sec(timeout.as_secs()).nsec(timeout.subsec_nanos());
                submitter.submit_with_args(want, &SubmitArgs::new().timespec(&time))
            }
            // The crate asks for events only with `want`; deferred task work needs that flag every time.
            None => {
                let want = u32::try_from(want).unwrap_or(u32::MAX);
                // SAFETY: no argument is passed; queued entries are valid by the contract of `start`.
                unsafe { submitter.enter::<libc::sigset_t>(queued, want, GETEVENTS, None) }
            }
        };
        if let Err(error) = &result {
            let expected = [libc::EINTR, libc::EBUSY, libc::EAGAIN, libc::ETIME];
            if !expected.contains(&error.raw_os_error().unwrap_or(0)) {
                tracing::error!("io_uring_enter: {error}");
            }
        }
        result.is_ok()
    }

    fn collect(&mut self, done: &mut Vec<(OpId, i32)>) {
        let for_storage = &mut self.for_storage;
        let finished = self.ring.completion().filter(|entry: &cqueue::Entry| entry.user_data() != OWN);
        done.extend(finished.map(|entry| {
            let id = OpId(entry.user_data());
            *for_storage -= usize::from(id.is_storage());
            (id, entry.result())
        }));
    }
}

fn entry(file: Fd, op: &Op) -> squeue::Entry {
    match *op {
        Op::Read { iov, count: 1, offset } => {
            // SAFETY: `iov` points to `count` pieces by the contract of `start`.
            let (base, len) = unsafe { ((*iov).iov_base, (*iov).iov_len) };
            opcode::Read::new(file, base.cast(), clamp(len)).offset(offset).build()
        }
        Op::Read { iov, count, offset } => opcode::Readv::new(file, iov, count).offset(offset).build(),
        Op::Write { iov, count: 1, offset, dsync } => {
            // SAFETY: as above.
            let (base, len) = unsafe { ((*iov).iov_base, (*iov).iov_len) };
            let flags = if dsync { libc::RWF_DSYNC } else { 0 };
            opcode::Write::new(file, base.cast(), clamp(len)).offset(offset).rw_flags(flags).build()
        }
        Op::Write { iov, count, offset, dsync } => {
            let flags = if dsync { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(file, iov, count).offset(offset).rw_flags(flags).build()
        }
        Op::Sync => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        Op::Fallocate { mode, offset, len } => {
            opcode::Fallocate::new(file, len).offset(offset).mode(mode).build()
        }
        Op::Poll { events } => opcode::PollAdd::new(file, u32::from(events.cast_unsigned())).build(),
        Op::Recv { buffer, len } => opcode::Recv::new(file, buffer, clamp(len)).build(),
        Op::Send { message } => {
            opcode::SendMsg::new(file, message).flags(libc::MSG_NOSIGNAL.cast_unsigned()).build()
        }
        Op::Accept => opcode::Accept::new(file, std::ptr::null_mut(), std::ptr::null_mut())
            .flags(libc::SOCK_CLOEXEC)
            .build(),
        Op::Command { op, data } => opcode::UringCmd16::new(file, op).cmd(data).build(),
    }
}

/// A length as the ring takes it; a longer one is a short transfer, which callers handle anyway.
fn clamp(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(0x7fff_f000)
}
