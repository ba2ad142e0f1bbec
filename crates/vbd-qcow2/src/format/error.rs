//! What can be wrong with the structures of a file.

use std::io;

/// Results of reading the structures of a file.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a structure of a qcow2 file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read {what} at {offset}: {error}")]
    Read {
        /// What was read.
        what: &'static str,
        /// Where, in bytes.
        offset: u64,
        /// What the system said.
        error: io::Error,
    },
    /// The file is something else.
    #[error("is no qcow2 image: it begins with {found}; say which format it has")]
    Foreign {
        /// What it begins with, for people.
        found: String,
    },
    /// The file ends in the middle of a structure.
    #[error("the image is truncated: {what} takes {need} bytes at {offset}, and the file ends at {end}")]
    Truncated {
        /// The structure.
        what: &'static str,
        /// Where it starts, in bytes.
        offset: u64,
        /// Its length in bytes.
        need: u64,
        /// Where the file ends.
        end: u64,
    },
    /// A field has a value that it cannot have.
    #[error("{field} is {value}; {allowed}")]
    Field {
        /// The field.
        field: String,
        /// Its value.
        value: String,
        /// What it may be, as a sentence without its stop.
        allowed: String,
    },
    /// The image uses incompatible features that are not known here.
    #[error("the image uses what is not known here: {}; a newer version of this program may know it", .0.join(", "))]
    UnknownFeatures(Vec<String>),
    /// What is to be written takes more room than there is.
    #[error("{what} takes {need} bytes, and there is room for {room}; {hint}")]
    NoRoom {
        /// The structure.
        what: &'static str,
        /// What it takes, in bytes.
        need: u64,
        /// The room, in bytes.
        room: u64,
        /// What can be done.
        hint: &'static str,
    },
}

impl Error {
    /// A field with a value that it cannot have.
    pub(crate) fn field(
        field: impl Into<String>,
        value: impl std::fmt::Display,
        allowed: impl Into<String>,
    ) -> Self {
        Error::Field { field: field.into(), value: value.to_string(), allowed: allowed.into() }
    }
}
