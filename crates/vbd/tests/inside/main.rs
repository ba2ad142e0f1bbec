//! The verbs that look into a disk, on disks that mke2fs made.

#[path = "../common/mod.rs"]
mod common;
mod copies;
mod hostile;
mod looking;
mod support;
