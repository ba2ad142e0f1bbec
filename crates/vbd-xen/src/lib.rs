//! The Xen front-end: a blkif back-end in user space.
//!
//! A domain's blkfront puts requests into a ring in memory that it grants; this crate maps that ring, gives the requests
//! to the disk on a reactor, and answers there. Devices are announced, negotiated and closed through xenstore: one state
//! machine for each, on a control thread of the [`Server`]. See `docs/xen.md`.
//!
//! Everything that a front-end writes is hostile until checked: ring indices, requests, grant references, and every key
//! and state in xenstore. Whoever breaks a rule loses his own disk, and nobody else notices.

mod abi;
mod connect;
mod control;
mod device;
#[doc(hidden)]
pub mod fake;
mod fuzz;
mod indices;
mod intake;
mod jobs;
mod keys;
mod mail;
mod memory;
mod options;
mod placement;
mod queue;
mod record;
mod ring;
mod server;
mod slots;
mod status;
pub mod sys;
#[cfg(test)]
mod takeover;
mod tell;

#[doc(hidden)]
pub use fuzz::{fuzz_ring, fuzz_store};
pub use options::{BackendKind, DeviceId, DeviceRequest, Mode, Options, Provided, Provider};
pub use server::{Error, Server};
pub use status::{DeviceStatus, State};
pub use sys::Platform;
