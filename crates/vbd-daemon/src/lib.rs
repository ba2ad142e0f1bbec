//! Configuration, supervision and the control socket.
//!
//! [`config`] says what to serve, a [`Supervisor`] serves it, [`control`] is how others reach the supervisor, and a
//! [`Daemon`] is all of it in one process, from start to clean stop.

pub mod config;
pub mod control;
mod daemon;
mod fault;
mod service;
mod supervisor;
pub mod xen;

pub use daemon::{Daemon, Options, StartError};
pub use fault::{Fault, FaultKind};
pub use service::{Listener, passed_listeners};
pub use supervisor::{Supervisor, back_up, bitmaps, change_bitmaps};
pub use vbd_ring::{EngineKind, Settings as ReactorSettings};
