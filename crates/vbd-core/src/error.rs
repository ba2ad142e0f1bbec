//! Errors of the data path: a kind, a source and a context.

use std::fmt;

use crate::Operation;

/// Results of the data path.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as far as a guest or a policy can tell the difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The storage below failed.
    Io,
    /// There is no room left below (ENOSPC, EDQUOT, EFBIG).
    NoSpace,
    /// The request names a range or a length that the disk does not have. Made by the guest.
    OutOfRange,
    /// The disk is read-only. Made by the guest.
    ReadOnly,
    /// The disk cannot do this. Made by the guest, or by a fast-only request.
    Unsupported,
    /// An earlier flush has failed; nothing can be promised any more.
    FlushLost,
    /// The request was given up: its disk or its front-end is stopping, or a policy said so.
    Cancelled,
    /// The lease is held by somebody else.
    Busy,
    /// The image is not what it should be: truncated, replaced, malformed.
    Corrupt,
}

impl ErrorKind {
    /// Whether the guest made this error itself. Such errors are logged at debug level only: a guest must not be
    /// able to fill the host's log.
    pub fn is_guest_made(self) -> bool {
        matches!(self, ErrorKind::OutOfRange | ErrorKind::ReadOnly | ErrorKind::Unsupported)
    }

    /// The errno that says the same, for front-ends that speak errno (NBD).
    pub fn errno(self) -> i32 {
        match self {
            ErrorKind::Io | ErrorKind::FlushLost | ErrorKind::Corrupt => libc::EIO,
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::OutOfRange => libc::EINVAL,
            ErrorKind::ReadOnly => libc::EPERM,
            ErrorKind::Unsupported => libc::EOPNOTSUPP,
            ErrorKind::Cancelled => libc::ESHUTDOWN,
            ErrorKind::Busy => libc::EBUSY,
        }
    }
}

/// An error with what it happened to. Made on failure paths only, so it may allocate.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    detail: Box<Detail>,
}

#[derive(Debug, Default)]
struct Detail {
    message: String,
    image: Option<String>,
    at: Option<(Operation, u64, u64)>,
    source: Option<std::io::Error>,
}

impl Error {
    /// An error that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, detail: Box::new(Detail { message: message.into(), ..Detail::default() }) }
    }

    /// An error of the storage below.
    pub fn io(message: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ErrorKind::NoSpace,
            Some(libc::EOPNOTSUPP) => ErrorKind::Unsupported,
            Some(libc::ECANCELED) => ErrorKind::Cancelled,
            _ => ErrorKind::Io,
        };
        let mut error = Error::new(kind, message);
        error.detail.source = Some(source);
        error
    }

    /// The same with the image it happened to.
    #[must_use]
    pub fn of(mut self, image: impl Into<String>) -> Self {
        self.detail.image.get_or_insert(image.into());
        self
    }

    /// The same with the operation, offset and length (bytes) it happened to.
    #[must_use]
    pub fn at(mut self, operation: Operation, offset: u64, len: u64) -> Self {
        self.detail.at.get_or_insert((operation, offset, len));
        self
    }

    /// What kind of error this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The system's error number below, if there was one.
    pub fn os_error(&self) -> Option<i32> {
        self.detail.source.as_ref().and_then(std::io::Error::raw_os_error)
    }

    /// Writes the error to the log, at the level its kind deserves.
    pub fn log(&self) {
        if self.kind.is_guest_made() || self.kind == ErrorKind::Cancelled {
            tracing::debug!("{self}");
        } else {
            tracing::error!("{self}");
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(image) = &self.detail.image {
            write!(f, "{image}: ")?;
        }
        if let Some((operation, offset, len)) = self.detail.at {
            write!(f, "{operation} of {len} bytes at {offset}: ")?;
        }
        f.write_str(&self.detail.message)?;
        if let Some(source) = &self.detail.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.detail.source.as_ref().map(|source| source as _)
    }
}
