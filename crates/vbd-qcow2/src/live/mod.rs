//! The engine: an image that is served.
//!
//! [`Qcow2`] is the disk. What its channels share is an [`image::Image`]: the mapping in memory ([`map`]), reference
//! counts and free clusters ([`counts`]), and how both reach the disk ([`commit`]). A channel passes a request that maps
//! to one run of the file on as it is; the others become tasks ([`read`], [`mod@write`], [`space`]). [`grace`] says when
//! nobody uses a cluster any more, and when nobody does anything. `docs/qcow2.md` tells the whole story.

mod behind;
mod channel;
mod commit;
mod compact;
mod compress;
mod compressed;
mod counts;
mod direct;
mod disk;
mod flatten;
mod grace;
mod image;
mod io;
mod log;
mod map;
mod merge;
mod offers;
mod read;
mod replay;
mod resize;
mod service;
mod session;
mod set;
mod snapshot;
mod space;
mod walk;
mod worker;
mod write;

pub use disk::{Qcow2, Qcow2Options};
pub use log::left_beside;
