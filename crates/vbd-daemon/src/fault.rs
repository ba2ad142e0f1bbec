//! What goes wrong in the control plane: a kind that programs can tell apart, and a message for people.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The kinds of [`Fault`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// No disk, file or process of that name.
    Unknown,
    /// The name, the socket or the export is taken.
    Exists,
    /// The disk or its file is in use.
    Busy,
    /// The request makes no sense.
    Invalid,
    /// A limit of the configuration is reached.
    Limit,
    /// The server stops.
    Stopping,
    /// Something below failed.
    Failed,
}

/// A failure of an operation on disks, as the API carries it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Which kind.
    pub kind: FaultKind,
    /// What it happened to, what it was, and what to do.
    pub message: String,
}

impl Fault {
    /// A fault that says `message`.
    pub fn new(kind: FaultKind, message: impl Into<String>) -> Self {
        Fault { kind, message: message.into() }
    }

    /// No disk has this name.
    pub fn unknown(name: &str) -> Self {
        Fault::new(
            FaultKind::Unknown,
            format!("no disk is called `{name}`: `vbd list` shows those there are"),
        )
    }

    /// Something below failed, while `what` was done.
    pub fn failed(what: impl fmt::Display, error: impl fmt::Display) -> Self {
        Fault::new(FaultKind::Failed, format!("{what}: {error}"))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

impl From<vbd_core::Error> for Fault {
    fn from(error: vbd_core::Error) -> Self {
        use vbd_core::ErrorKind as Kind;
        let kind = match error.kind() {
            Kind::Busy => FaultKind::Busy,
            Kind::OutOfRange | Kind::ReadOnly | Kind::Unsupported => FaultKind::Invalid,
            Kind::Cancelled => FaultKind::Stopping,
            Kind::Io | Kind::NoSpace | Kind::FlushLost | Kind::Corrupt => FaultKind::Failed,
        };
        Fault::new(kind, error.to_string())
    }
}
