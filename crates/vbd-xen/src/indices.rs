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

    fn fresh() -> Indices {
        Indices {
            req_prod: AtomicU32::new(0),
            req_event: AtomicU32::new(1),
            rsp_prod: AtomicU32::new(0),
            rsp_event: AtomicU32::new(1),
        }
    }

    /// The front-end produces two requests, one by one, and notifies where that is asked for; this end goes to sleep
    /// when it sees none. It must never sleep with a request in the ring and no notification on its way.
    #[test]
    fn no_request_is_slept_through() {
        loom::model(|| {
            let ring = Arc::new(fresh());
            let kicked = Arc::new(AtomicBool::new(false));
            let front = {
                let (ring, kicked) = (ring.clone(), kicked.clone());
                thread::spawn(move || {
                    for new in 1..=2u32 {
                        ring.req_prod.store(new, Ordering::Release);
                        fence(Ordering::SeqCst);
                        let event = ring.req_event.load(Ordering::Relaxed);
                        if new.wrapping_sub(event) < 1 {
                            kicked.store(true, Ordering::SeqCst);
                        }
                    }
                })
            };
            let mut consumed = ring.requests();
            while ring.arm(consumed) {
                consumed = ring.requests();
            }
            front.join().unwrap();
            assert!(consumed == 2 || kicked.load(Ordering::SeqCst), "asleep at {consumed}");
        });
    }

    /// The same the other way: the front-end sleeps unless there is a response.
    #[test]
    fn no_response_is_slept_through() {
        loom::model(|| {
            let ring = Arc::new(fresh());
            let interrupted = Arc::new(AtomicBool::new(false));
            let back = {
                let (ring, interrupted) = (ring.clone(), interrupted.clone());
                thread::spawn(move || {
                    for old in 0..2u32 {
                        if ring.publish(old, old + 1) {
                            interrupted.store(true, Ordering::SeqCst);
                        }
                    }
                })
            };
            let mut seen = ring.rsp_prod.load(Ordering::Acquire);
            loop {
                ring.rsp_event.store(seen + 1, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                let now = ring.rsp_prod.load(Ordering::Acquire);
                if now == seen {
                    break;
                }
                seen = now;
            }
            back.join().unwrap();
            assert!(seen == 2 || interrupted.load(Ordering::SeqCst), "asleep at {seen}");
        });
    }
}
