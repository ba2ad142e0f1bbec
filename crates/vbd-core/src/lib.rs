//! What a disk is: requests, channels, the ordering contract, and I/O on plain files.
//!
//! A [`Disk`] is known by name and may be idle. [`Disk::open`] takes its lease and gives a [`Session`], which any
//! number of front-ends share; each of their queues asks the session for a [`Channel`] of its own, which belongs to one
//! reactor thread and takes [`Request`]s without locks.
//!
//! # The ordering contract
//!
//! As for an NVMe disk:
//! - Requests in flight have no order between them; a reader of a sector that is being written sees old or new.
//! - A flush covers every request that had completed, on any channel of the session, when the flush was submitted.
//! - FUA covers its own request, discards and zeroes too.
//! - A failed flush is never retried into success: it and every later one fail until the disk is opened anew.
//! - Every request comes back to its [`Sink`] exactly once, with every outcome; `submit` may complete it before it
//!   returns.

pub mod ask;
pub mod bitmap;
pub mod client;
mod disk;
mod error;
pub mod file;
pub mod filter;
mod flush;
mod live;
pub mod memory;
pub mod range_lock;
mod request;
mod statistics;
pub mod track;

pub use client::Client;
pub use disk::{Capabilities, Channel, Disk, Event, Geometry, Reader, Session, Watchers};
pub use error::{Error, ErrorKind, Result};
pub use flush::flush;
pub use live::{Commit, Layer, LayerExtent, Live, Snapshot, Watch};
pub use request::{Extent, ExtentKind, Flags, Guard, Operation, Request, Sink};
pub use statistics::{OperationCount, QueueCounters, QueueSnapshot, Statistics};

pub use vbd_ring::IoVec;

/// The unit in which guests see a disk, and its capacity is counted: a sector of 512 bytes. A request may begin and end
/// within one; such a write excludes others from the sector, on every channel of the disk.
pub const SECTOR: u64 = 512;
