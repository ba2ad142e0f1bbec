//! Images that exist: checked, made compact, cloned, grown and shrunk, without mounting them.

mod check;
mod clone;
mod compact;
mod copy;
mod disk;
mod grow;
mod identity;
mod names;
mod section;
mod shrink;

pub use check::{Checked, check, repair};
pub use clone::{CloneOptions, Cloned, clone};
pub use compact::{Compacted, compact};
pub use copy::How;
pub use disk::{Disk, Volume};
pub use grow::{Larger, grow};
pub use shrink::{Smaller, shrink};
