//! Images that exist: checked, made compact, cloned, grown and shrunk, without mounting them.

mod check;
mod compact;
mod disk;

pub use check::{Checked, check, repair};
pub use compact::{Compacted, compact};
pub use disk::{Disk, Volume};
