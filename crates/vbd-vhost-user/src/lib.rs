//! The vhost-user-blk front-end: a disk for QEMU, Cloud Hypervisor, crosvm and every other machine that speaks
//! vhost-user over a unix socket.
//!
//! The front-end (the machine's own process) shares the guest's memory and its virtqueues. Requests are read from
//! there in place, given to the disk on a reactor, and answered there; no byte is copied. See `docs/vhost-user.md`.
//!
//! Everything that a guest or a front-end says is hostile until checked: descriptors (`chain`), addresses
//! (`memory`), messages (`device`), even the memory itself, which may vanish at any time (`sigbus`). Whoever
//! breaks a rule loses his own disk, and nobody else notices.

mod backchannel;
mod chain;
mod config;
mod connection;
mod device;
mod dirty;
mod fuzz;
mod inflight;
mod log;
mod lost;
mod memory;
mod notify;
mod path;
mod queue;
mod request;
mod ring;
mod server;
mod sigbus;

#[doc(hidden)]
pub use fuzz::{fuzz_inflight, fuzz_virtqueue};
pub use server::{Error, Options, Server, Status};
