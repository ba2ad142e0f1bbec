//! The reader against what mke2fs, debugfs and the kernel make. Those that need a loop device need root.

mod features;
mod hashed;
mod hostile;
mod journals;
mod kernel;
mod sample;
mod support;
mod trees;
