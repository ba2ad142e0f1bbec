//! qcow2 images (docs/interop/qcow2 of QEMU).
//!
//! - [`mod@format`]: the structures of the file, read from bytes that are hostile until checked, and written.
//! - [`storage`]: the file that an image is in, for all that happens while nobody is served from it.
//! - [`create()`]: new images, and how large one becomes ([`Measure`]).
//! - [`check`]: whether everything in an image fits together, and its repair.
//! - [`bitmaps`]: which blocks were written to, kept in the image.
//! - [`info`]: what an image says of itself.
//! - [`Qcow2`]: an image as a disk that is served.

pub mod bitmaps;
pub mod check;
mod create;
pub mod format;
pub mod info;
mod live;
mod rewrite;
pub mod storage;

pub use create::{
    Backing, CreateError, CreateOptions, DataFile, Measure, Measured, Preallocation, Version, create,
    create_in,
};
pub use live::{Qcow2, Qcow2Options};
pub use rewrite::{replace_header, with_backing};
