//! Every image format behind one face.
//!
//! A [`Format`] is told, never guessed: a guest can write any format's header into a raw disk. [`open()`] makes a disk of
//! an image and of all that it names (backing files, data files), each of which passes a [`Gate`] first. The formats
//! themselves open nothing but the file they are given.

mod amend;
mod backing;
mod chain;
mod check;
mod create;
mod derive;
mod format;
mod gate;
mod identify;
mod open;
mod tracked;

pub use amend::{KeyChange, amend, change_key};
pub use backing::set_backing;
pub use chain::{Details, Link, broken_chain, chain};
pub use check::{Checked, Repair, check, has_structure};
pub use create::{Kind, NewImage, VhdKind, backing_size, create};
pub use derive::{open_copy, overlay};
pub use format::{Format, FormatError};
pub use gate::Gate;
pub use identify::{assumed_raw, identify};
pub use open::{ImageSpec, open, open_on};
pub use tracked::open_tracked;
