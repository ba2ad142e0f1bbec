//! The reactor: a thread with one io_uring in which file I/O, sockets, kick eventfds and timers all wait.
//!
//! [`Reactor::spawn`] starts a thread and gives a [`Handle`] that other threads post closures to. Code that runs on
//! the thread gets a [`Local`]: it submits operations ([`Op`]) whose results come back through [`Completion`], adds
//! pollers, timers and tasks. Nothing outside this crate knows io_uring; where the kernel forbids it a thread pool
//! stands behind the same face ([`EngineKind`]). What lives on the thread is reached from others as a [`Remote`].
//!
//! A driver's control commands, which a reactor's ring has no room for, go by [`command`].
//!
//! Memory handed to an operation must stay valid until its completion was seen, whatever was cancelled: the
//! completion sink owns it, and the reactor owns the sink until then.

mod clock;
pub mod command;
mod engine;
mod file;
mod op;
mod poller;
mod pool;
mod priority;
mod reactor;
mod remote;
#[cfg(shuttle)]
mod simulated;
pub mod sync;
mod task;
mod threads;
mod uring;

pub use clock::TimerId;
pub use engine::EngineKind;
pub use file::FileHandle;
pub use op::{Completion, IoVec, Op, OpId, execute};
pub use poller::Poller;
pub use priority::yield_to_others;
pub use reactor::{Handle, Local, Reactor, Settings};
pub use remote::{Place, Remote};
