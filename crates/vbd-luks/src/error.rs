//! What can be wrong with an encrypted disk.

use vbd_core::{Error, ErrorKind};

/// Why an encrypted disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LuksError {
    /// It is something else.
    #[error("is not encrypted with LUKS: its mark is missing")]
    NotLuks,
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
    /// The header is damaged.
    #[error("the LUKS header is damaged: {0}")]
    Damaged(&'static str),
    /// No key slot takes the passphrase.
    #[error("the key is wrong: no key slot takes it")]
    WrongKey,
    /// The key cannot be had.
    #[error("cannot read the key from {from}: {error}")]
    Key {
        /// Where it was to come from.
        from: String,
        /// What the kernel said.
        error: std::io::Error,
    },
    /// The disk cannot be read.
    #[error("cannot read the LUKS header: {0}")]
    Io(#[from] std::io::Error),
}

impl LuksError {
    /// As an error of the disk that is called so.
    pub fn of(self, label: &str) -> Error {
        let error = match self {
            LuksError::Io(error) => Error::io("cannot read the LUKS header", error),
            LuksError::Unsupported(_) | LuksError::WrongKey | LuksError::Key { .. } => {
                Error::new(ErrorKind::Unsupported, self.to_string())
            }
            other => Error::new(ErrorKind::Corrupt, other.to_string()),
        };
        error.of(label)
    }

    pub(crate) fn value(field: &'static str, found: impl ToString, allowed: &'static str) -> Self {
        // A header's text may be anything.
        let found = found.to_string().chars().take(80).collect::<String>().escape_debug().to_string();
        LuksError::Value { field, found, allowed }
    }
}
