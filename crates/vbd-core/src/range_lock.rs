//! Ranges that exclude each other, across the reactors of one disk.
//!
//! Whoever reads, modifies and writes a block excludes every overlapping write, zeroes and discard. First come, first
//! served: a request that would have to pass an earlier waiter waits too, so nobody starves.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

use vbd_ring::sync::{Mutex, MutexGuard};

/// The ranges, in bytes, that somebody has taken.
#[derive(Default)]
pub struct RangeLocks(Mutex<State>);

#[derive(Default)]
struct State {
    held: Vec<(u64, Range<u64>)>,
    waiting: VecDeque<Waiter>,
    next: u64,
}

struct Waiter {
    id: u64,
    range: Range<u64>,
    waker: Waker,
}

impl State {
    fn is_free(&self, range: &Range<u64>, before: usize) -> bool {
        let earlier = self.waiting.iter().take(before).map(|waiter| &waiter.range);
        !self.held.iter().map(|(_, held)| held).chain(earlier).any(|other| overlap(other, range))
    }

    fn hold(&mut self, range: Range<u64>) -> u64 {
        self.next += 1;
        self.held.push((self.next, range));
        self.next
    }

    /// Gives up `id`, held or waiting, and moves on whoever waited for it.
    fn release(&mut self, id: u64) {
        self.held.retain(|(held, _)| *held != id);
        self.waiting.retain(|waiter| waiter.id != id);
        let mut index = 0;
        while let Some(waiter) = self.waiting.get(index) {
            if self.is_free(&waiter.range.clone(), index)
                && let Some(waiter) = self.waiting.remove(index)
            {
                self.held.push((waiter.id, waiter.range));
                waiter.waker.wake();
            } else {
                index += 1;
            }
        }
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl RangeLocks {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the range if it is free now.
    ///
    /// Whoever waits is served first: none, then, where it overlaps what somebody waits for.
    pub fn try_lock(self: &Arc<Self>, range: Range<u64>) -> Option<RangeGuard> {
        let mut state = self.state();
        let free = state.is_free(&range, usize::MAX);
        free.then(|| state.hold(range)).map(|id| RangeGuard { locks: self.clone(), id })
    }

    /// Takes the range when it is free.
    pub fn lock(self: &Arc<Self>, range: Range<u64>) -> Locking {
        Locking { locks: self.clone(), range, id: None }
    }
}

/// A range held. Dropping it lets others in.
pub struct RangeGuard {
    locks: Arc<RangeLocks>,
    id: u64,
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        self.locks.state().release(self.id);
    }
}

/// Waits for a range.
pub struct Locking {
    locks: Arc<RangeLocks>,
    range: Range<u64>,
    id: Option<u64>,
}

impl Future for Locking {
    type Output = RangeGuard;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<RangeGuard> {
        let this = &mut *self;
        let mut state = this.locks.state();
        let Some(id) = this.id else {
            if state.is_free(&this.range, usize::MAX) {
                let id = state.hold(this.range.clone());
                return Poll::Ready(RangeGuard { locks: this.locks.clone(), id });
            }
            state.next += 1;
            let id = state.next;
            state.waiting.push_back(Waiter { id, range: this.range.clone(), waker: context.waker().clone() });
            drop(state);
            this.id = Some(id);
            return Poll::Pending;
        };
        if let Some(waiter) = state.waiting.iter_mut().find(|waiter| waiter.id == id) {
            waiter.waker.clone_from(context.waker());
            return Poll::Pending;
        }
        drop(state);
        this.id = None;
        Poll::Ready(RangeGuard { locks: this.locks.clone(), id })
    }
}

impl Drop for Locking {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.locks.state().release(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Wake;

    struct Nobody;
    impl Wake for Nobody {
        fn wake(self: Arc<Self>) {}
    }

    fn poll(locking: &mut Locking) -> Option<RangeGuard> {
        let waker = Waker::from(Arc::new(Nobody));
        match Pin::new(locking).poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(guard) => Some(guard),
            Poll::Pending => None,
        }
    }

    #[test]
    fn overlapping_ranges_wait_in_order_and_others_pass() {
        let locks = Arc::new(RangeLocks::default());
        let first = locks.try_lock(0..4096).expect("free");
        let mut second = locks.lock(0..8192);
        assert!(poll(&mut second).is_none());
        // Free, but behind an earlier waiter that overlaps.
        assert!(locks.try_lock(4096..8192).is_none());
        assert!(locks.try_lock(8192..9000).is_some());
        drop(first);
        let second = poll(&mut second).expect("granted at release");
        assert!(locks.try_lock(4096..8192).is_none());
        drop(second);
        assert!(locks.try_lock(4096..8192).is_some());
    }

    #[test]
    fn a_waiter_that_gives_up_leaves_nothing_behind() {
        let locks = Arc::new(RangeLocks::default());
        let first = locks.try_lock(0..10).expect("free");
        let (mut second, mut third) = (locks.lock(5..15), locks.lock(12..20));
        assert!(poll(&mut second).is_none() && poll(&mut third).is_none());
        drop(second);
        assert!(poll(&mut third).is_some(), "only the waiter stood in the way");
        // Granted while nobody polled, then dropped.
        let mut fourth = locks.lock(0..5);
        assert!(poll(&mut fourth).is_none());
        drop(first);
        drop(fourth);
        assert!(locks.try_lock(0..100).is_some());
    }

    #[test]
    fn threads_never_share_a_range() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let locks = Arc::new(RangeLocks::default());
        let inside = Arc::new(AtomicU32::new(0));
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (locks, inside) = (&locks, &inside);
                scope.spawn(move || {
                    for round in 0..500 {
                        // All of them hold sector 8.
                        let start = (round + thread) % 8;
                        let guard = block_on(locks.lock(start..9));
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(guard);
                    }
                });
            }
        });
    }

    fn block_on(mut locking: Locking) -> RangeGuard {
        struct Unpark(std::thread::Thread);
        impl Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        loop {
            match Pin::new(&mut locking).poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(guard) => return guard,
                Poll::Pending => std::thread::park(),
            }
        }
    }
}
