//! A new filesystem, written in one pass.
//!
//! [`Layout`] says where everything will be, without touching a file. [`Writer`] gives out blocks and inode numbers and
//! writes inodes and directories; whoever has the files' data writes it into the blocks of [`Writer::allocate`] himself, at
//! [`Writer::position`]. [`Writer::finish`] writes what is left: bitmaps, group descriptors, the superblock last.
//!
//! - Nothing is read: the range of the file must be zeros (fresh, or punched), and zeros are never written, so an empty
//!   filesystem of terabytes takes a few blocks, and its inode tables count as zeroed.
//! - Blocks are given out in rising order past the filesystem's own; the same calls make the same bytes.
//! - Nothing is flushed to the storage: that is for whoever owns the file.

pub(crate) mod directory;
mod error;
mod finish;
mod inodes;
mod layout;
pub mod measure;
mod run;
mod settings;
mod space;
mod target;
pub(crate) mod tree;
mod writer;
pub(crate) mod xattrs;

pub use directory::DirectoryEntry;
pub use error::{Result, WriteError};
pub use finish::Summary;
pub use layout::Layout;
pub use run::Run;
pub use settings::{Checksums, Journal, Settings};
pub use writer::{Body, Directory, Node, Writer};
