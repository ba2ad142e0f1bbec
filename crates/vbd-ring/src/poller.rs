//! Rings in shared memory that are looked at instead of waited for.

use std::rc::Rc;

/// Something with work that shows in memory, such as a virtqueue's available ring.
///
/// A poller is looked at while it is active ([`Local::activate`](crate::Local::activate)). Before the reactor sleeps
/// it arms every active poller and forgets it; a kick, or a completion of its own, makes its owner activate it again.
pub trait Poller {
    /// Takes what there is; true if there was something.
    fn poll(self: Rc<Self>) -> bool;

    /// Asks the other side to kick from now on. Returns true if work has arrived in the meantime: then the reactor
    /// does not sleep, and the poller stays active.
    fn arm(self: Rc<Self>) -> bool;
}
