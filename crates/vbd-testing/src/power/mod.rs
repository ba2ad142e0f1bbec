//! Power cuts: what a file may hold after one.
//!
//! A [`Recording`] sees every write, hole, length and flush of some files. From it come all the states that the power
//! may leave them in ([`Recording::crash`]): what was flushed is there; of what was not, any part is, torn at sectors.
//! [`Expected`] knows what a guest may then find on its disk.

mod crash;
mod drive;
mod expected;
mod memory;
mod recording;

pub use crash::Cut;
pub use drive::{Load, drive};
pub use expected::{Expected, SECTOR, Stamp, fill, stamp_of};
pub use memory::MemFile;
pub use recording::{FileRecorder, Recording};
