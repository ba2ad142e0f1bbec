//! Requests in the steady state cost no allocation.

#![allow(clippy::cast_possible_truncation, reason = "sizes of tests are small")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use common::frontend::*;
use common::{Bench, ID};
use vbd_testing::eventually;

static COUNT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The test's own thread, which may allocate.
    static FREE: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

// SAFETY: passes everything on.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !FREE.get() {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: the contract is the trait's.
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn requests_allocate_nothing() {
    FREE.set(true);
    for persistent in [true, false] {
        let bench = Bench::new();
        let mut front = Frontend::connected(&bench.hypervisor, ID, Shape { persistent, ..PLAIN });
        let page = front.page(true);
        let round = |front: &mut Frontend| {
            for index in 0..32 {
                let operation = if index % 2 == 0 { READ } else { WRITE };
                front.put(0, operation, index, index * 8, &[(page.reference, 0, 7)]);
            }
            front.push(0);
            let mut answered = 0;
            eventually("all are answered", || {
                answered += front.reap(0).len();
                answered == 32
            });
        };
        (0..20).for_each(|_| round(&mut front));
        let before = COUNT.load(Ordering::Relaxed);
        (0..300).for_each(|_| round(&mut front));
        let after = COUNT.load(Ordering::Relaxed);
        // The disk of this test keeps a list of what it was asked, which grows now and then; and the reactor allocates
        // once when it wakes up, which it does for each of the 300 rounds at most.
        assert!(after - before < 300 + 20, "{} allocations for 9600 requests", after - before);
    }
}
