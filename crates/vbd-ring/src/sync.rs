//! Locks, atomics, channels and threads.
//!
//! They are the standard library's. In a build with `--cfg shuttle` they are those of a checker, which runs all threads
//! in turns and decides at each of these operations whose turn is next: so tests go through orders of events that
//! machines show once a year. What runs on reactors takes them from here, because a thread that waits in any other way
//! keeps the checker from going on. `Arc` and what never waits or decides anything may be the standard library's.

#[cfg(shuttle)]
pub use shuttle::sync::{Condvar, Mutex, MutexGuard, atomic, mpsc};
#[cfg(shuttle)]
pub use shuttle::{thread, thread_local};
#[cfg(not(shuttle))]
pub use std::sync::{Condvar, Mutex, MutexGuard, atomic, mpsc};
#[cfg(not(shuttle))]
pub use std::{thread, thread_local};
