//! VHD images: the format of Virtual PC, Hyper-V and Xen's tapdisk.
//!
//! - [`mod@format`]: what is in the file, read with bounds and written.
//! - [`Vhd`]: such a file as a disk.
//! - [`create()`]: a new one; [`grow()`]: a larger one.
//! - [`check()`]: whether everything in one fits together, and [`repair()`].
//!
//! A VHD ends at 2040 GiB.

pub mod check;
pub mod create;
mod disk;
pub mod format;
mod grow;
mod live;
mod shrink;
mod storage;

pub use check::{check, repair};
pub use create::create;
pub use disk::{Parent, Vhd, VhdOptions};
pub use grow::{GrowError, grow};
pub use shrink::shrink;
pub use storage::Storage;

/// What the fuzzer calls: a whole file, opened, its table read, checked, and its parents named.
pub fn fuzz(bytes: &[u8]) {
    let len = bytes.len() as u64;
    let Ok(head) = format::Head::read(bytes, len) else { return };
    let _ = head.size(format::SizeRule::Maker);
    let _ = head.parent_names(bytes);
    let _ = head.table(bytes).map(|table| head.content_end(&table));
    let _ = check::look(bytes, len);
}
