//! ext4 in a plain file, without mounting it.
//!
//! - [`mod@format`]: what is on the disk, as structures, with its checksums and hashes. Everything else here is built on it.
//! - [`mod@write`]: a new filesystem, written in one pass.
//! - [`read`]: what is in an existing filesystem, of ext2 and ext3 as well.
//! - [`check`]: whether everything in a filesystem fits together.
//! - [`edit`]: an existing filesystem changed in place, through its journal.
//!
//! The specification is the kernel's documentation, `filesystems/ext4`; sections are named by their titles.

pub mod check;
pub mod edit;
pub mod format;
pub mod read;
pub mod write;
