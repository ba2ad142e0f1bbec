//! The formats, by the names that people and other programs call them.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// The format of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the disk, one to one.
    #[default]
    Raw,
    /// QEMU's format: allocates as it is written to, stands on backing files, keeps snapshots.
    Qcow2,
}

/// A text that names no format that is known here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError {
    name: String,
}

/// What is known by name only, and what QEMU calls it.
const OTHERS: [(&str, &str); 8] = [
    ("qcow2", "qcow2"),
    ("vhd", "vpc"),
    ("vpc", "vpc"),
    ("vhdx", "vhdx"),
    ("vmdk", "vmdk"),
    ("vdi", "vdi"),
    ("qcow", "qcow"),
    ("qed", "qed"),
];

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.name;
        match OTHERS.iter().find(|(other, _)| other == name) {
            Some((_, qemu)) => write!(
                f,
                "format `{name}` is not supported yet, only {}: \
                 `qemu-img convert -f {qemu} -O raw IMAGE NEW` makes a raw image of it",
                Format::names()
            ),
            None => write!(f, "unknown format `{}`: write {}", name.escape_debug(), Format::names()),
        }
    }
}

impl std::error::Error for FormatError {}

impl Format {
    /// All that can be opened.
    pub const ALL: [Format; 1] = [Format::Raw];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }

    /// Whether images of it can be written to, and made.
    pub fn is_writable(self) -> bool {
        match self {
            Format::Raw | Format::Qcow2 => true,
        }
    }

    /// The names of all, for messages: "`raw` or `qcow2`".
    fn names() -> String {
        let names: Vec<_> = Self::ALL.iter().map(|format| format!("`{format}`")).collect();
        match names.split_last() {
            Some((last, [])) => last.clone(),
            Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
            None => String::new(),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = FormatError;

    fn from_str(name: &str) -> Result<Self, FormatError> {
        let found = Self::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| FormatError { name: name.to_owned() })
    }
}
