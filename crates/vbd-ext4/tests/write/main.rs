//! Filesystems written by vbd-ext4, held against e2fsck, debugfs, resize2fs, ext4-view and the kernel.

mod content;
mod grown;
mod large;
mod model;
mod mounted;
mod properties;
mod settings;
mod sizes;
mod tools;
