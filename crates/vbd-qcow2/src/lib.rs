//! qcow2 images (docs/interop/qcow2 of QEMU).
//!
//! - [`mod@format`]: the structures of the file, read from bytes that are hostile until checked, and written.
//! - [`storage`]: the file that an image is in, for all that happens while nobody is served from it.

pub mod format;
pub mod storage;
