//! What the tests of several crates have in common: a disk whose behaviour they choose, the inputs that fuzzers keep,
//! and waiting. For tests only: it panics where something is not as it should be.

pub mod client;
pub mod corpus;
mod disk;
mod failing;
mod mount;
pub mod power;
pub mod qcow2;
pub mod qemu;
mod random;

use std::time::{Duration, Instant};

pub use disk::{Asked, Behaviour, MemDisk};
pub use failing::{Failing, with_failing};
pub use mount::Mounted;
pub use random::{Random, seeds};

/// Waits for something that another thread does; a test hangs on a bug no longer than this.
///
/// # Panics
/// It did not come within 20 s.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
