//! Filesystems in files: build one from a tree, an archive or a suite, and tailor it.
//!
//! The way of an entry: a source (the scan of a directory, a tar, mmdebstrap's output) yields entries, a sink takes
//! them, and tailoring edits a [`Root`]. For ext4 both are a plan, a tree in memory, which is then written in one pass.
//! For ext2 and ext3 both are a staging tree, a real directory, that `mke2fs -d` reads.

mod ahead;
mod archive;
mod bootstrap;
mod build;
mod builder;
mod compress;
pub mod cpio;
mod digest;
mod disk;
mod entry;
mod epoch;
mod error;
mod fill;
pub mod inside;
mod meter;
pub mod oci;
mod pattern;
mod plan;
mod process;
mod progress;
mod seed;
mod size;
mod source;
mod spec;
pub mod squashfs;
mod stage;
mod staging;
mod sys;
pub mod tailor;
pub mod tar;
mod tree;
pub mod upkeep;
pub mod vfat;
mod walk;
mod watched;
mod zeros;

pub use build::{Report, build};
pub use disk::{Architecture, Boot, DiskSpec, Holds, PartitionReport, PartitionSpec, TableKind};
pub use entry::{Counts, Meta, Time};
pub use epoch::source_date_epoch;
pub use error::{Error, Result, Shortage};
pub use progress::{Cancel, Progress, Silent, Step};
pub use seed::{LARGEST_SEED_FILE, Seed, SeedReport};
pub use size::{ImageSize, Spare};
pub use source::{Distribution, Source};
pub use spec::{BuildOptions, BuildSpec, Filesystem, JournalSize, Owner, Sharing, Variant};
pub use stage::remote::serve as serve_stage;
pub use tailor::{Root, Tailor};
