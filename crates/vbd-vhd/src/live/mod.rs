//! A VHD that is served.
//!
//! All metadata is written through: nothing that completed is lost when the process is killed, and a flush is one
//! fdatasync. Blocks are only ever added, at the end, on room that is durably zero, and no bit of a bitmap is taken back;
//! a discard gives the room of a block back and leaves the block. So a block that is in place stays where it is, and
//! whoever finds it in memory reads and writes it without a lock.
//!
//! What a power cut may leave is settled by the order of writes:
//! - Room: the file grows, gets its new footer, and has the old footer zeroed; then fdatasync; then blocks are placed.
//! - A block of a dynamic disk: content and bitmap, then the table's entry. Without the entry it reads as zeroes, as
//!   before; with the entry and without the content, too.
//! - A sector of a differencing disk: its content, then fdatasync (one for all writes that wait at that time), then its
//!   bit. A bit without its content would read as neither old nor new.

mod bitmap;
mod channel;
mod extents;
mod map;
mod relay;
mod space;
mod work;
mod write;

pub(crate) use bitmap::is_full;
pub(crate) use channel::VhdChannel;
pub(crate) use map::{Image, Map};
