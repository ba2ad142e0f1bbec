//! What is wrong with an image.

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It is something else.
    #[error("is no {0} image: its mark is missing")]
    Not(crate::Format),
    /// A value that is not allowed.
    #[error("{field} is {found}; {allowed}")]
    Value {
        /// The field.
        field: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// It can be had, but not here.
    #[error("{0}")]
    Unsupported(String),
    /// A checksum is wrong.
    #[error("the checksum of {0} is wrong: it is damaged")]
    Checksum(&'static str),
    /// The file ends too early.
    #[error("the file ends before {0} does: it was truncated")]
    Truncated(&'static str),
    /// It cannot be read.
    #[error("cannot read it: {0}")]
    Io(#[from] std::io::Error),
}

impl FormatError {
    pub(crate) fn value(field: &'static str, found: impl ToString, allowed: &'static str) -> Self {
        FormatError::Value { field, found: found.to_string(), allowed }
    }
}
