//! Whole disks: a partition table, an EFI system partition with a boot loader, swap, and filesystems.
//!
//! What goes where is decided first ([`plan`]), from the request alone; then each partition is made, the root last
//! but for the files that start it, which are read out of it ([`boot`]).

mod boot;
mod build;
pub(crate) mod kernels;
mod place;
mod plan;
mod spec;
mod swap;
mod tree;

pub use build::PartitionReport;
pub(crate) use build::build;
pub use spec::{Architecture, Boot, DiskSpec, Holds, PartitionSpec, TableKind};
