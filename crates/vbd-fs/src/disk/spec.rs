//! What can be asked of a whole disk.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vbd_image::partition::{Guid, kind};
use vbd_image::size::{Human, Size};

use crate::{Error, Filesystem, Result, vfat};

/// The kind of a partition table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TableKind {
    /// GPT, of UEFI.
    Gpt,
    /// MBR, of PCs before UEFI; at most four partitions.
    Mbr,
}

/// Who starts the system that is on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Boot {
    /// Nobody: the machine gets its kernel from elsewhere.
    None,
    /// UEFI firmware, through systemd-boot or a unified kernel image in the EFI system partition.
    Uefi,
    /// Xen's pygrub or PV-GRUB, by a grub.cfg in the tree.
    Xen,
}

/// The processor that a system is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Architecture {
    /// AMD64.
    #[serde(rename = "x86-64")]
    X86_64,
    /// ARMv8 and later, 64 bit.
    Arm64,
}

impl Architecture {
    /// The one of this machine, or x86-64 where it is none of these.
    pub fn of_this_machine() -> Architecture {
        if std::env::consts::ARCH == "aarch64" { Architecture::Arm64 } else { Architecture::X86_64 }
    }

    /// The type of a root partition by the discoverable partitions specification.
    pub(crate) fn root(self) -> Guid {
        match self {
            Architecture::X86_64 => kind::ROOT_X86_64,
            Architecture::Arm64 => kind::ROOT_ARM64,
        }
    }

    /// How UEFI names programs for it: `BOOTX64.EFI`.
    pub(crate) fn efi(self) -> &'static str {
        match self {
            Architecture::X86_64 => "x64",
            Architecture::Arm64 => "aa64",
        }
    }
}

/// What is in a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Holds {
    /// ext2.
    Ext2,
    /// ext3.
    Ext3,
    /// ext4.
    Ext4,
    /// FAT, filled from a directory or an archive.
    Vfat,
    /// Swap space.
    Swap,
    /// Nothing.
    None,
}

impl Holds {
    /// The filesystem that the builder makes, if it is one of its.
    pub(crate) fn ext(self) -> Option<Filesystem> {
        match self {
            Holds::Ext2 => Some(Filesystem::Ext2),
            Holds::Ext3 => Some(Filesystem::Ext3),
            Holds::Ext4 => Some(Filesystem::Ext4),
            Holds::Vfat | Holds::Swap | Holds::None => None,
        }
    }

    /// The name as fstab has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Holds::Ext2 => "ext2",
            Holds::Ext3 => "ext3",
            Holds::Ext4 => "ext4",
            Holds::Vfat => "vfat",
            Holds::Swap => "swap",
            Holds::None => "none",
        }
    }
}

macro_rules! by_name {
    ($($type:ident { $($variant:ident = $name:literal),* })*) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $($type::$variant => $name),* })
            }
        }

        impl FromStr for $type {
            type Err = Error;

            fn from_str(text: &str) -> Result<$type> {
                match text {
                    $($name => Ok($type::$variant),)*
                    _ => Err(Error::Invalid(format!("{text:?} is none of {}", [$($name),*].join(", ")))),
                }
            }
        }
    )*};
}

by_name! {
    TableKind { Gpt = "gpt", Mbr = "mbr" }
    Boot { None = "none", Uefi = "uefi", Xen = "xen" }
    Architecture { X86_64 = "x86-64", Arm64 = "arm64" }
}

/// A partition besides the EFI system partition, the swap partition and the root: `[[partition]]` of a description.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PartitionSpec {
    /// Its size, rounded up to whole MiB.
    pub size: Size,
    /// What is in it.
    #[serde(default = "ext4")]
    pub filesystem: Holds,
    /// What fills the filesystem: a directory, or an archive (tar, cpio, squashfs). It is empty where not given.
    #[serde(default)]
    pub from: Option<PathBuf>,
    /// Where fstab mounts it.
    #[serde(default)]
    pub mount: Option<String>,
    /// Mount options for fstab.
    #[serde(default)]
    pub options: Option<String>,
    /// The filesystem's label.
    #[serde(default)]
    pub label: Option<String>,
    /// The partition's name in a GPT; made of the mount point where not given.
    #[serde(default)]
    pub name: Option<String>,
    /// The partition's type in a GPT, as a UUID; follows from the mount point where not given.
    #[serde(default, rename = "type")]
    pub kind: Option<Guid>,
    /// The partition's UUID in a GPT; derived where not given.
    #[serde(default)]
    pub uuid: Option<Guid>,
}

fn ext4() -> Holds {
    Holds::Ext4
}

/// A whole disk around the filesystem of a build: the `[disk.build.disk]` table of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskSpec {
    /// The kind of the partition table.
    pub table: TableKind,
    /// The disk's UUID in a GPT, or its number (eight hexadecimal digits) in an MBR; derived where not given.
    #[serde(default)]
    pub uuid: Option<String>,
    /// Bytes in a sector of the machine's disk, 512 or 4096; 512 where not given.
    #[serde(default)]
    pub sector_size: Option<u64>,
    /// Who starts the system. Where not given: UEFI, if there is an EFI system partition and the tree has a kernel.
    #[serde(default)]
    pub boot: Option<Boot>,
    /// The processor that the system is for; this machine's where not given.
    #[serde(default)]
    pub architecture: Option<Architecture>,
    /// The size of the EFI system partition; 256 MiB in a GPT where not given, unless Xen starts the system.
    #[serde(default)]
    pub esp: Option<Size>,
    /// The size of a swap partition; there is none where not given.
    #[serde(default)]
    pub swap: Option<Size>,
    /// More words for the kernel's command line.
    #[serde(default)]
    pub kernel_options: Vec<String>,
    /// The root partition's UUID in a GPT; derived where not given.
    #[serde(default)]
    pub root_uuid: Option<Guid>,
    /// More partitions, which come before the root.
    #[serde(default)]
    pub partition: Vec<PartitionSpec>,
}

impl DiskSpec {
    /// A disk with everything as it is by default.
    pub fn new(table: TableKind) -> DiskSpec {
        DiskSpec {
            table,
            uuid: None,
            sector_size: None,
            boot: None,
            architecture: None,
            esp: None,
            swap: None,
            kernel_options: Vec::new(),
            root_uuid: None,
            partition: Vec::new(),
        }
    }

    /// Reads the keys of a `[disk]` table from a TOML file of their own.
    ///
    /// # Errors
    ///
    /// TOML that does not parse, keys that are not known and values that do not fit, with line and column.
    pub fn from_toml(text: &str) -> Result<DiskSpec> {
        let spec: DiskSpec = toml::from_str(text).map_err(|e| Error::Invalid(e.to_string()))?;
        spec.check()?;
        Ok(spec)
    }

    /// Has relative paths begin at `directory`, where the description is.
    pub fn begin_paths_at(&mut self, directory: &Path) {
        for path in self.partition.iter_mut().filter_map(|partition| partition.from.as_mut()) {
            *path = directory.join(&*path);
        }
    }

    /// The size in bytes of the EFI system partition, where there is one.
    pub(crate) fn esp_size(&self) -> Option<u64> {
        const USUAL: u64 = 256 << 20;
        let usual = match (self.table, self.boot) {
            (_, Some(Boot::Uefi)) => true,
            (TableKind::Gpt, boot) => boot.is_none(),
            (TableKind::Mbr, _) => false,
        };
        self.esp.map(Size::bytes).or(usual.then_some(USUAL))
    }

    /// Finds what cannot work on any disk.
    ///
    /// # Errors
    ///
    /// The first value that is out of its bounds or does not go with another.
    pub fn check(&self) -> Result<()> {
        let invalid = |text: String| Err(Error::Invalid(text));
        let gpt = self.table == TableKind::Gpt;
        let sector = self.sector_size.unwrap_or(512);
        if sector != 512 && !(sector == 4096 && gpt) {
            return invalid(format!("sectors of {sector} bytes: a GPT has 512 or 4096, an MBR 512"));
        }
        if let Some(uuid) = &self.uuid {
            if gpt {
                uuid.parse::<Guid>().map_err(|e| Error::Invalid(e.to_string()))?;
            } else {
                mbr_number(uuid)?;
            }
        }
        if !gpt && self.root_uuid.is_some() {
            return invalid("partitions of an MBR have no UUID of their own".to_owned());
        }
        for (size, what) in
            [(self.esp_size(), "the EFI system partition"), (self.swap.map(Size::bytes), "swap")]
        {
            let least = if what == "swap" { super::swap::SMALLEST } else { vfat::SMALLEST };
            if let Some(size) = size
                && size < least
            {
                return invalid(format!("{} are too few for {what}: at least {}", Human(size), Human(least)));
            }
        }
        let word =
            |word: &String| word.is_empty() || word.contains(|c: char| c.is_whitespace() || c.is_control());
        if let Some(bad) = self.kernel_options.iter().find(|option| word(option)) {
            return invalid(format!("kernel option {bad:?}: give the command line's words one by one"));
        }
        self.partition.iter().try_for_each(|partition| partition.check(gpt))
    }
}

impl PartitionSpec {
    fn check(&self, gpt: bool) -> Result<()> {
        let named = self.mount.as_deref().or(self.name.as_deref()).unwrap_or("without a mount point");
        let invalid = |text: &str| Err(Error::Invalid(format!("partition {named}: {text}")));
        if !gpt && (self.uuid.is_some() || self.name.is_some() || self.kind.is_some()) {
            return invalid("name, type and uuid are for a GPT");
        }
        if let Some(point) = &self.mount {
            let bad = |c: char| c.is_whitespace() || c.is_control() || c == '#' || c == ':';
            let odd = |part: &str| part == "." || part == "..";
            if !point.starts_with('/') || point == "/" || point.contains(bad) || point.split('/').any(odd) {
                return invalid("a mount point is a path from /, without spaces and not / itself");
            }
        }
        if let Some(options) = &self.options
            && (options.is_empty() || options.contains(|c: char| c.is_whitespace() || c.is_control()))
        {
            return invalid("mount options have no spaces");
        }
        let holds_files = self.filesystem == Holds::Vfat || self.filesystem.ext().is_some();
        if !holds_files && (self.from.is_some() || self.mount.is_some()) {
            return invalid("only a filesystem can be filled and mounted");
        }
        if !holds_files && self.filesystem != Holds::Swap && self.label.is_some() {
            return invalid("a label needs a filesystem or swap");
        }
        let least = match self.filesystem {
            Holds::Vfat => vfat::SMALLEST,
            Holds::Swap => super::swap::SMALLEST,
            _ => 0,
        };
        if self.size.bytes() < least {
            return invalid(&format!("{} are too few, at least {}", self.size.human(), Human(least)));
        }
        if self.filesystem == Holds::Vfat
            && let Some(label) = &self.label
        {
            vfat::Name::new(label, 0).map_err(Error::Invalid)?;
        }
        Ok(())
    }
}

/// The number of a disk with an MBR: eight hexadecimal digits, as `fdisk` prints them.
pub(crate) fn mbr_number(text: &str) -> Result<u32> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let hexadecimal = digits.len() == 8 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = hexadecimal.then(|| u32::from_str_radix(digits, 16).ok()).flatten();
    number.filter(|number| *number != 0).ok_or_else(|| {
        Error::Invalid(format!(
            "{text:?} is no number of a disk with an MBR: eight hexadecimal digits, not all 0"
        ))
    })
}
