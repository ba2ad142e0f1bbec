//! The four shared indices of a ring (xen/io/ring.h): who may see what, and who has to be notified.
//!
//! All are running numbers that wrap. The front-end owns `req_prod` and `rsp_event`, this end `rsp_prod` and `req_event`.
//! An end that has nothing to do sets its event index and then looks once more; the other end publishes and then reads
//! the event index. With full barriers between, at least one of the two notices.

#[cfg(all(loom, test))]
use loom::sync::atomic::{AtomicU32, Ordering, fence};
#[cfg(not(all(loom, test)))]
use std::sync::atomic::{AtomicU32, Ordering, fence};

/// The start of a ring's first page.
#[repr(C)]
pub(crate) struct Indices {
    req_prod: AtomicU32,
    req_event: AtomicU32,
    rsp_prod: AtomicU32,
    rsp_event: AtomicU32,
}

impl Indices {
    /// Requests produced so far. What this says is hostile.
    #[inline]
    pub(crate) fn requests(&self) -> u32 {
        self.req_prod.load(Ordering::Acquire)
    }

    /// Responses produced so far, as the front-end sees it.
    pub(crate) fn responses(&self) -> u32 {
        self.rsp_prod.load(Ordering::Acquire)
    }

    /// Shows responses up to `new`; true if the front-end wants to be notified.
    #[inline]
    pub(crate) fn publish(&self, old: u32, new: u32) -> bool {
        self.rsp_prod.store(new, Ordering::Release);
        fence(Ordering::SeqCst);
        let event = self.rsp_event.load(Ordering::Relaxed);
        new.wrapping_sub(event) < new.wrapping_sub(old)
    }

    /// Asks for a notification at the request after `consumed`; true if it is there already.
    #[inline]
    pub(crate) fn arm(&self, consumed: u32) -> bool {
        self.req_event.store(consumed.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.req_prod.load(Ordering::Acquire) != consumed
    }
}

#[cfg(all(loom, test))]
mod tests {
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    use super::*;

    /// One request was produced, taken and answered, for which both ends had asked to be notified.
    fn used() -> Indices {
        Indices {
            req_prod: AtomicU32::new(1),
            req_event: AtomicU32::new(1),
            rsp_prod: AtomicU32::new(1),
            rsp_event: AtomicU32::new(1),
        }
    }

    /// The front-end produces one more while this end goes to sleep, which it must not do without a notification on its
    /// way.
    #[test]
    fn no_request_is_slept_through() {
        loom::model(|| {
            let ring = Arc::new(used());
            let kicked = Arc::new(AtomicBool::new(false));
            let front = {
                let (ring, kicked) = (ring.clone(), kicked.clone());
                thread::spawn(move || {
                    ring.req_prod.store(2, Ordering::Release);
                    fence(Ordering::SeqCst);
                    let event = ring.req_event.load(Ordering::Relaxed);
                    if 2u32.wrapping_sub(event) < 1 {
                        kicked.store(true, Ordering::SeqCst);
                    }
                })
            };
            let awake = ring.arm(1);
            front.join().unwrap();
            assert!(awake || kicked.load(Ordering::SeqCst), "asleep with a request in the ring");
        });
    }

    /// The same the other way.
    #[test]
    fn no_response_is_slept_through() {
        loom::model(|| {
            let ring = Arc::new(used());
            let back = {
                let ring = ring.clone();
                thread::spawn(move || ring.publish(1, 2))
            };
            ring.rsp_event.store(2, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            let awake = ring.rsp_prod.load(Ordering::Acquire) == 2;
            let interrupted = back.join().unwrap();
            assert!(awake || interrupted, "asleep with a response in the ring");
        });
    }
}
