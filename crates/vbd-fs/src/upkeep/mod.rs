//! Images that exist: checked, made compact, cloned, grown and shrunk, without mounting them.

mod check;
mod clone;
mod compact;
pub(crate) mod copy;
mod device;
mod disk;
mod grow;
mod identity;
mod names;
mod opened;
mod shrink;
mod smaller;

pub use check::{Checked, check, repair};
pub use clone::{CloneOptions, Cloned, clone, clone_of};
pub use compact::{Compacted, compact};
pub use copy::{How, copy, share};
pub use device::Device;
pub use disk::{Disk, Volume};
pub use grow::{Larger, grow, may_grow};
pub use opened::Opened;
pub use shrink::{Smaller, shrink};
