//! Keeps whoever writes a part of a block alone with it, over all queues of a file.
//!
//! A part of a block is written by reading the block, changing it and writing it back. A write of the whole block in
//! between would be undone by that. Where every request fits the storage's blocks this cannot happen, and no write takes
//! a lock: a queue only counts its writes under way, in a counter of its own. The first request that does not fit makes
//! all writes take locks from then on, and waits for those that went without.

use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use vbd_ring::Local;
use vbd_ring::sync::Mutex;
use vbd_ring::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::range_lock::{RangeGuard, RangeLocks};

/// How long the first partial write waits before it looks again for writes that went without a lock.
const LOOK_AGAIN: Duration = Duration::from_micros(200);

/// The writes of one file.
#[derive(Default)]
pub(super) struct Exclusion {
    locks: Arc<RangeLocks>,
    /// Every write takes a lock.
    locking: AtomicBool,
    /// And none that went without is under way any more.
    settled: AtomicBool,
    queues: Mutex<Vec<Weak<AtomicUsize>>>,
}

/// The writes of one queue that are under way without a lock.
#[derive(Clone)]
#[allow(
    clippy::redundant_allocation,
    reason = "cloned for every write, which should cost no atomic operation"
)]
pub(super) struct Writes(Rc<Arc<AtomicUsize>>);

/// Leave to write, until it is dropped.
pub(super) enum Permit {
    /// As one of many whole blocks.
    Whole(Writes),
    /// With the blocks locked.
    Locked(#[allow(dead_code, reason = "held")] RangeGuard),
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Permit::Whole(writes) = self {
            writes.0.fetch_sub(1, Ordering::Release);
        }
    }
}

impl Exclusion {
    /// The counter of a queue.
    pub(super) fn queue(&self) -> Writes {
        let count = Arc::new(AtomicUsize::new(0));
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(Arc::downgrade(&count));
        Writes(Rc::new(count))
    }

    /// Makes every write take a lock from now on.
    pub(super) fn lock_all(&self) {
        self.locking.store(true, Ordering::SeqCst);
    }

    /// Leave to write whole `blocks`, if it can be had at once.
    pub(super) fn try_whole(&self, writes: &Writes, blocks: impl FnOnce() -> Range<u64>) -> Option<Permit> {
        // Counted before the look, as `partial` looks at the counters after it has said that locks are needed: one of
        // the two sees the other.
        writes.0.fetch_add(1, Ordering::SeqCst);
        let permit = Permit::Whole(writes.clone());
        if !self.locking.load(Ordering::SeqCst) {
            return Some(permit);
        }
        drop(permit);
        self.locks.try_lock(blocks()).map(Permit::Locked)
    }

    /// The same, when it can be had.
    pub(super) async fn whole(&self, writes: &Writes, blocks: Range<u64>) -> Permit {
        match self.try_whole(writes, || blocks.clone()) {
            Some(permit) => permit,
            None => Permit::Locked(self.locks.lock(blocks).await),
        }
    }

    /// Leave to write parts of `blocks`.
    pub(super) async fn partial(&self, blocks: Range<u64>, local: &Local) -> Permit {
        if !self.settled.load(Ordering::SeqCst) {
            self.lock_all();
            while self.is_any_without() {
                local.sleep(LOOK_AGAIN).await;
            }
            self.settled.store(true, Ordering::SeqCst);
        }
        Permit::Locked(self.locks.lock(blocks).await)
    }

    fn is_any_without(&self) -> bool {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.iter().filter_map(Weak::upgrade).any(|queue| queue.load(Ordering::SeqCst) > 0)
    }
}
