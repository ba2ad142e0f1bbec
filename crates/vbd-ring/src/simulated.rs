//! The engine of checked builds: operations are carried out on the real file, each when the checker says so.
//!
//! What is in flight takes effect and is told of in any order, and others run in between.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use shuttle::rand::{Rng, thread_rng};

use crate::op::Waits;
use crate::reactor::Shared;
use crate::sync::{Condvar, Mutex, thread};
use crate::{FileHandle, Op, OpId, execute};

/// Where a reactor sleeps.
#[derive(Default)]
pub(crate) struct Bell {
    rung: Mutex<bool>,
    heard: Condvar,
}

impl Bell {
    /// Wakes the reactor, or the next sleep of it.
    pub(crate) fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.heard.notify_one();
    }

    fn sleep(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.heard.wait(rung).unwrap();
        }
        *rung = false;
    }
}

/// An operation that has not happened yet.
struct Waiting {
    id: OpId,
    file: FileHandle,
    op: Op,
    /// Turns of its reactor for which the storage does not get round to it.
    turns: u32,
}

pub(crate) struct Simulated {
    shared: Arc<Shared>,
    /// What has not happened yet.
    waiting: Vec<Waiting>,
    /// What has happened and nobody was told of.
    finished: Vec<(OpId, i32)>,
}

impl Simulated {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Simulated { shared, waiting: Vec::new(), finished: Vec::new() }
    }

    /// # Safety
    /// The pointers in `op` stay valid until the result was reaped.
    pub(crate) unsafe fn start(&mut self, id: OpId, file: &FileHandle, op: &Op) {
        let turns = match thread_rng().gen_range(0..16) {
            0 => thread_rng().gen_range(0..1500),
            1..6 => thread_rng().gen_range(0..5),
            _ => 0,
        };
        self.waiting.push(Waiting { id, file: file.clone(), op: *op, turns });
    }

    pub(crate) fn cancel(&mut self, id: OpId) {
        let Some(index) = self.waiting.iter().position(|waiting| waiting.id == id) else { return };
        // The kernel does not always do as it is told.
        if self.waiting[index].op.waits() == Waits::Peer || thread_rng().r#gen::<bool>() {
            self.waiting.swap_remove(index);
            self.finished.push((id, -libc::ECANCELED));
        }
    }

    /// Some of what can happen.
    pub(crate) fn reap(&mut self, done: &mut Vec<(OpId, i32)>) {
        for index in (0..self.waiting.len()).rev() {
            let Waiting { id, file, op, turns } = &mut self.waiting[index];
            // A descriptor that is ready says so at once.
            if op.waits() == Waits::Storage && *turns > 0 {
                *turns -= 1;
                continue;
            }
            let result = match op {
                // Nobody cuts the power here.
                Op::Sync => 0,
                // SAFETY: by the contract of `start`: the pointers are valid until the result was reaped.
                op => unsafe { execute(file.as_fd(), op) },
            };
            if result != -libc::EAGAIN {
                self.finished.push((*id, result));
                self.waiting.swap_remove(index);
            }
        }
        while !self.finished.is_empty() && thread_rng().r#gen::<bool>() {
            let index = thread_rng().gen_range(0..self.finished.len());
            done.push(self.finished.swap_remove(index));
        }
    }

    pub(crate) fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<(OpId, i32)>) {
        loop {
            self.reap(done);
            if !done.is_empty() || timeout.is_some() {
                // Time passes in any case.
                return thread::yield_now();
            }
            let busy = self.waiting.iter().any(|waiting| waiting.op.waits() == Waits::Storage);
            if busy || !self.finished.is_empty() {
                thread::yield_now();
            } else {
                self.shared.bell.sleep();
            }
        }
    }
}
