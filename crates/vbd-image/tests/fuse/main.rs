//! Images on storage that refuses locks, or hangs.

mod hangs;
mod no_locks;
mod one_file;

/// A front-end on a reactor, as the core's own tests have it.
#[path = "../../../vbd-core/tests/support/mod.rs"]
mod support;
