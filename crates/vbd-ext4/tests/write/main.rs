//! Filesystems written by vbd-ext4, held against e2fsck, debugfs, resize2fs, ext4-view and the kernel.

mod content;
mod model;
mod mounted;
mod sizes;
mod tools;
