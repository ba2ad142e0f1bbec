//! One queue, driven by one thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::Instant;

use anyhow::bail;
use rustix::event::{PollFd, PollFlags, poll};
use virtio_driver::{EventFd, QueueNotifier, VirtioBlkQueue};

use crate::cli::Wait;
use crate::device::Memory;
use crate::histogram::Histogram;
use crate::pattern;
use crate::plan::{Op, Plan};

/// What a request carries through the ring.
pub(crate) struct Context {
    slot: u16,
    op: Op,
    submitted: Instant,
}

/// What a worker has seen.
pub(crate) struct Tally {
    /// Of the requests that completed in the measured window.
    pub(crate) latency: Histogram,
    /// Times that the server had to be woken.
    pub(crate) kicks: u64,
    /// Times that the thread slept.
    pub(crate) sleeps: u64,
    pub(crate) errors: u64,
    /// Blocks whose content was checked.
    pub(crate) verified: u64,
    /// Of the last request that was measured.
    pub(crate) finished: Instant,
}

/// What the workers of a run share with the thread that watches them.
#[derive(Default)]
pub(crate) struct Shared {
    /// Set to make every worker give up at once.
    pub(crate) abort: AtomicBool,
    /// Requests completed, by all.
    pub(crate) completed: AtomicU64,
}

/// When to measure and when to stop.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    pub(crate) from: Instant,
    /// No end: stop after `ops`.
    pub(crate) until: Option<Instant>,
    pub(crate) ops: u64,
}

/// A queue with its part of the disk and of the memory.
pub(crate) struct Worker<'a> {
    pub(crate) queue: VirtioBlkQueue<'static, Context>,
    pub(crate) kick: Box<dyn QueueNotifier>,
    pub(crate) call: Arc<EventFd>,
    pub(crate) memory: &'a Memory,
    /// Where this worker's part of the memory begins.
    pub(crate) memory_offset: usize,
    /// Where this worker's part of the disk begins.
    pub(crate) disk_offset: u64,
    pub(crate) block_size: u32,
    pub(crate) depth: u16,
    pub(crate) wait: Wait,
    pub(crate) plan: Plan,
    pub(crate) shared: &'a Shared,
}

impl Worker<'_> {
    /// Makes requests until the window ends, waits for all of them, and reads back what `verify` wants to see.
    pub(crate) fn run(mut self, window: Window, verify: bool) -> anyhow::Result<Tally> {
        let mut tally = Tally {
            latency: Histogram::new(),
            kicks: 0,
            sleeps: 0,
            errors: 0,
            verified: 0,
            finished: window.from,
        };
        self.queue.set_used_notif_enabled(false);
        let mut left = window.ops;
        self.drive(&mut tally, window, |plan, now| {
            let go = left > 0 && window.until.is_none_or(|end| now < end);
            left = left.saturating_sub(1);
            go.then(|| plan.next())
        })?;
        if verify {
            let mut ops = self.plan.read_back().into_iter();
            let never = Window { from: Instant::now() + std::time::Duration::from_secs(1 << 30), ..window };
            self.drive(&mut tally, never, |_, _| ops.next())?;
        }
        Ok(tally)
    }

    /// Keeps the queue full with what `next` gives until it gives nothing, then empties it.
    fn drive(
        &mut self,
        tally: &mut Tally,
        window: Window,
        mut next: impl FnMut(&mut Plan, Instant) -> Option<Op>,
    ) -> anyhow::Result<()> {
        let mut free: Vec<u16> = (0..self.depth).rev().collect();
        let mut drained = Vec::with_capacity(self.depth.into());
        let mut more = true;
        loop {
            let now = Instant::now();
            let before = free.len();
            while more && let Some(slot) = free.pop() {
                match next(&mut self.plan, now) {
                    Some(op) => self.submit(Context { slot, op, submitted: now })?,
                    None => {
                        free.push(slot);
                        more = false;
                    }
                }
            }
            if free.len() < before {
                // Between the ring's index and the server's wish to be notified.
                fence(Ordering::SeqCst);
                if self.queue.avail_notif_needed() {
                    self.kick.notify()?;
                    tally.kicks += 1;
                }
            }
            if free.len() == usize::from(self.depth) {
                return Ok(());
            }

            self.await_completion(tally)?;
            drained.extend(self.queue.completions());
            let now = Instant::now();
            let counts = now >= window.from && window.until.is_none_or(|end| now < end);
            self.shared.completed.fetch_add(drained.len() as u64, Ordering::Relaxed);
            for done in drained.drain(..) {
                let Context { slot, op, submitted } = done.context;
                if counts {
                    tally.latency.record(now - submitted);
                    tally.finished = now;
                }
                if done.ret != 0 {
                    tally.errors += 1;
                } else if !op.write && op.sequence != 0 {
                    self.check(slot, op)?;
                    tally.verified += 1;
                }
                self.plan.done(op);
                free.push(slot);
            }
        }
    }

    fn await_completion(&mut self, tally: &mut Tally) -> anyhow::Result<()> {
        while !self.queue.completions().has_next() {
            if self.shared.abort.load(Ordering::Relaxed) {
                bail!("the server stopped answering");
            }
            match self.wait {
                Wait::Poll => std::hint::spin_loop(),
                Wait::Block => {
                    self.queue.set_used_notif_enabled(true);
                    if !self.queue.completions().has_next() {
                        // A plain read would not do: servers make the eventfd, which is shared, non-blocking.
                        poll(&mut [PollFd::new(&*self.call, PollFlags::IN)], None)?;
                        self.call.read()?;
                        tally.sleeps += 1;
                    }
                    self.queue.set_used_notif_enabled(false);
                }
            }
        }
        Ok(())
    }

    fn submit(&mut self, context: Context) -> anyhow::Result<()> {
        let Context { slot, op, .. } = context;
        let offset = self.offset(op);
        let data = self.block(slot);
        // SAFETY: `data` is a block of the memory shared with the server that only this request uses: its slot was
        // free, and is freed again when the request completes.
        unsafe {
            if op.write {
                if op.sequence != 0 {
                    pattern::fill(&mut *data, offset, op.sequence);
                }
                self.queue.write_raw(offset, data.cast(), data.len(), context)?;
            } else {
                self.queue.read_raw(offset, data.cast(), data.len(), context)?;
            }
        }
        Ok(())
    }

    fn check(&self, slot: u16, op: Op) -> anyhow::Result<()> {
        // SAFETY: the request of this slot has completed, so that nobody writes to its block.
        let data = unsafe { &*self.block(slot) };
        pattern::check(data, self.offset(op), op.sequence).map_err(anyhow::Error::msg)
    }

    fn offset(&self, op: Op) -> u64 {
        self.disk_offset + op.block * u64::from(self.block_size)
    }

    fn block(&self, slot: u16) -> *mut [u8] {
        let len = self.block_size as usize;
        std::ptr::slice_from_raw_parts_mut(self.memory.at(self.memory_offset + usize::from(slot) * len), len)
    }
}
