//! Filesystems in files: build one from a tree, an archive or a suite, and tailor it.
//!
//! The way of an entry: a source (the walk through a directory, a tar, mmdebstrap's output) yields entries, a sink takes
//! them. Today's sink is a staging tree that `mke2fs -d` reads; tailoring edits a [`Root`], which is that tree. Both
//! seams are made so that a writer which needs no tree can take their other side.

mod bootstrap;
mod build;
mod builder;
mod compress;
mod digest;
mod entry;
mod epoch;
mod error;
pub mod inside;
mod meter;
mod pattern;
mod process;
mod progress;
mod seed;
mod source;
mod spec;
mod stage;
mod staging;
mod sys;
pub mod tailor;
pub mod tar;
mod tree;
mod vfat;
mod walk;

pub use build::{Report, build};
pub use entry::{Counts, Meta, Time};
pub use epoch::source_date_epoch;
pub use error::{Error, Result, Shortage};
pub use progress::{Cancel, Progress, Silent, Step};
pub use seed::{LARGEST_SEED_FILE, Seed, SeedReport};
pub use source::{Distribution, Source};
pub use spec::{BuildOptions, BuildSpec, Filesystem, Variant};
pub use stage::remote::serve as serve_stage;
pub use tailor::{Root, Tailor};
