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
    /// Virtual PC's, Hyper-V's and Xen's format: fixed, growing, or on a parent; at most 2040 GiB.
    Vhd,
    /// VMware's format, for reading.
    Vmdk,
    /// VirtualBox's format, for reading.
    Vdi,
    /// Hyper-V's second format, for reading.
    Vhdx,
    /// The bytes of the disk, encrypted behind a LUKS header.
    Luks,
}

/// A text that names no format that is known here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError {
    name: String,
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.name;
        // QEMU's older formats are known by name.
        if name == "qcow" || name == "qed" {
            return write!(
                f,
                "format `{name}` is not supported: \
                 `qemu-img convert -f {name} -O raw IMAGE NEW` makes a raw image of it"
            );
        }
        let names: Vec<_> = Format::ALL.iter().map(|format| format!("`{format}`")).collect();
        let (last, rest) = names.split_last().expect("there are formats");
        write!(f, "unknown format `{}`: it is {} or {last}", name.escape_debug(), rest.join(", "))
    }
}

impl std::error::Error for FormatError {}

impl Format {
    /// All that can be opened.
    pub const ALL: [Format; 7] =
        [Format::Raw, Format::Qcow2, Format::Vhd, Format::Vmdk, Format::Vdi, Format::Vhdx, Format::Luks];

    /// What an image calls the format of the file that it stands on: QEMU reads that, too, and calls VHD by the name of
    /// the program that made it.
    pub fn in_images(self) -> &'static str {
        if self == Format::Vhd { "vpc" } else { self.name() }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vhd => "vhd",
            Format::Vmdk => "vmdk",
            Format::Vdi => "vdi",
            Format::Vhdx => "vhdx",
            Format::Luks => "luks",
        }
    }

    /// Whether images of it can be written to, and made.
    pub fn is_writable(self) -> bool {
        self.foreign().is_none()
    }

    /// What it is to the readers of other programs' images, where it is one of those.
    pub(crate) fn foreign(self) -> Option<vbd_foreign::Format> {
        match self {
            Format::Raw | Format::Qcow2 | Format::Vhd | Format::Luks => None,
            Format::Vmdk => Some(vbd_foreign::Format::Vmdk),
            Format::Vdi => Some(vbd_foreign::Format::Vdi),
            Format::Vhdx => Some(vbd_foreign::Format::Vhdx),
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
        let found = Self::ALL.into_iter().find(|format| [format.name(), format.in_images()].contains(&name));
        found.ok_or_else(|| FormatError { name: name.to_owned() })
    }
}
