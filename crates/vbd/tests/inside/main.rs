//! The verbs that look into a disk, and those that change what is in it, on disks that mke2fs made.

mod changing;
#[path = "../common/mod.rs"]
mod common;
mod copies;
mod hostile;
mod looking;
mod support;
