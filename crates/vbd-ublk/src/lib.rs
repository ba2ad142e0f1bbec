//! The ublk front-end: a disk as a block device of the host itself, `/dev/ublkbN` (Linux 6.0 and later). See
//! `docs/ublk.md`.
//!
//! The kernel's driver hands each request to the thread that serves its queue, by completing a command that waits in
//! that thread's io_uring; the answer is the next such command. So a queue lives on a reactor like any other, its
//! commands wait in the same ring as the file's I/O, and one `io_uring_enter` takes answers, new requests and storage
//! operations along together.
//!
//! # Why not libublk
//!
//! The crate of that name brings a ring, an executor and a thread for each queue, where vbd has reactors that many
//! queues and disks share; its control ring belongs to the thread that made it; and it needs libclang to build. What
//! the driver wants to be told is a dozen commands and three structures of fixed layout ([`abi`]), so they are spoken
//! here, on `vbd-ring`, and every build of vbd has this front-end.
//!
//! # How data is moved
//!
//! By the driver's default: each tag has a buffer, into which the driver copies what is written before it hands the
//! request over, and from which it takes what was read. That costs no system call. User copy (UBLK_F_USER_COPY) would
//! need one more operation for each request and cannot be had by unprivileged devices; zero copy and automatic buffer
//! registration (Linux 6.15 and later) are not used yet.

mod abi;
mod bounded;
mod buffers;
mod control;
mod device;
mod error;
mod find;
mod params;
mod queue;
mod request;
mod usage;

pub use device::{Device, Ending, Options, Status};
pub use error::Error;
