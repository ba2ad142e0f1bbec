//! Whole disks: a partition table, an EFI system partition with a boot loader, swap, and filesystems.
//!
//! What goes where is decided first ([`plan`]), from the request alone; then the root is made, and the other
//! partitions; the files that start the system are read out of the root ([`boot`]).

mod boot;
mod build;
mod fat;
pub(crate) mod kernels;
mod plan;
mod spec;
pub(crate) mod swap;
mod tree;

pub use build::PartitionReport;
pub(crate) use build::build;
pub use spec::{Architecture, Boot, DiskSpec, Holds, PartitionSpec, TableKind};
