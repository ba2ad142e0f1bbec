//! Work on whole disks, of any format: each job reads and writes through the disks' common face.
//!
//! Jobs block and run on the caller's threads; [`Image`] opens a disk for them, with a reactor of its own.

pub mod backup;
mod commit;
mod compare;
mod convert;
mod copy;
mod error;
mod fill;
mod image;
mod input;
mod journal;
mod layers;
mod progress;
mod ranges;
mod rebase;
mod served;
mod size;
mod target;
mod zeroes;

pub use commit::{Committed, commit};
pub use compare::{Compared, Difference, compare};
pub use convert::{Conversion, ConvertOptions, Leftover, convert};
pub use error::{Error, Result};
pub use image::Image;
pub use progress::{Progress, Silent};
pub use rebase::{NewBacking, rebase, rebase_unsafe};
pub use served::{Compacted, Flattened, Pace, commit_served, compact, flatten};
pub use size::{Measured, measure, resize};
