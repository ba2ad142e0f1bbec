//! What is still to be looked at, and who does it.
//!
//! A thread keeps the directories that it finds for itself, and gives some away when another has nothing to do: most
//! directories are small, and to hand each of them on would cost more than to read it.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::FileType;

/// Work for a thread.
pub(super) enum Task {
    /// Read a directory's names, and look at what they lead to.
    List { number: u32, path: PathBuf },
    /// Look at some of the names of a large one.
    Look(Arc<Open>, Vec<(CString, FileType)>),
}

/// A directory that is being read.
pub(super) struct Open {
    /// Its number among the directories of this scan.
    pub(super) number: u32,
    pub(super) path: PathBuf,
    pub(super) fd: OwnedFd,
}

/// Bytes of small files that are read when they are found: what of a system is small, and little beside what a build takes.
const KEEP: usize = 32 << 20;

/// The number of the root among the directories of a scan.
pub(super) const ROOT: u32 = 0;

struct State {
    todo: Vec<Task>,
    /// Threads that wait for work.
    idle: usize,
    closed: bool,
    failed: bool,
}

/// Where threads that have nothing to do take their work from.
pub(super) struct Queue {
    threads: usize,
    state: Mutex<State>,
    more: Condvar,
    /// More threads wait than there is work for.
    hungry: AtomicBool,
    numbers: AtomicU32,
    /// Bytes of files that were read early.
    kept: AtomicUsize,
}

impl Queue {
    pub(super) fn new(threads: usize, first: Task) -> Queue {
        let state = State { todo: vec![first], idle: 0, closed: false, failed: false };
        Queue {
            threads,
            state: Mutex::new(state),
            more: Condvar::new(),
            hungry: AtomicBool::new(false),
            numbers: AtomicU32::new(ROOT + 1),
            kept: AtomicUsize::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number for one more directory.
    pub(super) fn number(&self) -> u32 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes room for a file that is read early; false where there is none left.
    pub(super) fn keep(&self, bytes: usize) -> bool {
        self.kept.fetch_add(bytes, Ordering::Relaxed) < KEEP
    }

    /// Whether somebody waits for work.
    pub(super) fn is_hungry(&self) -> bool {
        self.hungry.load(Ordering::Relaxed)
    }

    /// Gives work away. What was found on the way to it must have been sent before.
    pub(super) fn give(&self, tasks: impl Iterator<Item = Task>) {
        let mut state = self.lock();
        state.todo.extend(tasks);
        self.note(&state);
        drop(state);
        self.more.notify_all();
    }

    /// Waits for work. None when there is no more: all wait, or somebody has closed the queue.
    pub(super) fn next(&self) -> Option<Task> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(task) = state.todo.pop() {
                self.note(&state);
                return Some(task);
            }
            if state.idle + 1 == self.threads {
                drop(state);
                self.close();
                return None;
            }
            state.idle += 1;
            self.note(&state);
            state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }

    fn note(&self, state: &State) {
        self.hungry.store(state.idle > state.todo.len(), Ordering::Relaxed);
    }

    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.more.notify_all();
    }

    /// Whether a thread ended early.
    pub(super) fn has_failed(&self) -> bool {
        self.lock().failed
    }
}

/// A thread that panics must not be waited for by the others.
pub(super) struct Ending<'a>(pub(super) &'a Queue);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().failed = true;
            self.0.close();
        }
    }
}
