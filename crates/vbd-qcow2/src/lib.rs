//! qcow2 images (docs/interop/qcow2 of QEMU).
//!
//! - [`mod@format`]: the structures of the file, read from bytes that are hostile until checked, and written.
//! - [`storage`]: the file that an image is in, for all that happens while nobody is served from it.
//! - [`create()`]: new images, and how large one becomes ([`Measure`]); [`Builder`] writes one in one go, with all its data.
//! - [`check`]: whether everything in an image fits together, and its repair.
//! - [`amend()`] and [`shrink()`]: another version of the format or another option, and a smaller disk, in place.
//! - [`bitmaps`]: which blocks were written to, kept in the image.
//! - [`info`]: what an image says of itself.
//! - [`Qcow2`]: an image as a disk that is served.

mod amend;
pub mod bitmaps;
pub mod check;
mod create;
pub mod format;
pub mod info;
mod live;
mod pack;
mod rewrite;
mod shrink;
pub mod storage;

pub use amend::{Amend, amend};
pub use create::{
    Backing, BuildError, Builder, CreateError, CreateOptions, DataFile, Measure, Measured, Placed,
    Preallocation, Version, create, create_in,
};
pub use live::{Qcow2, Qcow2Options, left_beside};
pub use pack::Packer;
pub use rewrite::{replace_header, with_backing};
pub use shrink::shrink;
