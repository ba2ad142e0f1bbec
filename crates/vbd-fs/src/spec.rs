//! What can be asked of a build.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use vbd_image::size::{Human, Size};

use crate::disk::swap;
use crate::oci::Machine;
use crate::{DiskSpec, Error, ImageSize, Result, Source, Tailor, Time};

/// A filesystem that can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filesystem {
    /// No journal.
    Ext2,
    /// With a journal.
    Ext3,
    /// With a journal and extents.
    #[default]
    Ext4,
}

impl Filesystem {
    /// Its name, as `mount -t` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Filesystem::Ext2 => "ext2",
            Filesystem::Ext3 => "ext3",
            Filesystem::Ext4 => "ext4",
        }
    }
}

impl fmt::Display for Filesystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Filesystem {
    type Err = Error;

    fn from_str(text: &str) -> Result<Filesystem> {
        [Filesystem::Ext2, Filesystem::Ext3, Filesystem::Ext4]
            .into_iter()
            .find(|f| f.name() == text)
            .ok_or_else(|| Error::Invalid(format!("{text:?} is none of ext2, ext3, ext4")))
    }
}

/// How much of a suite mmdebstrap installs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// Essential packages alone.
    Essential,
    /// Essential packages and apt.
    Apt,
    /// Priority required.
    Minbase,
    /// Priority required and important: what an installer's minimal system has.
    #[default]
    Important,
    /// Priority standard as well.
    Standard,
}

impl Variant {
    /// Its name, as `mmdebstrap --variant` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Variant::Essential => "essential",
            Variant::Apt => "apt",
            Variant::Minbase => "minbase",
            Variant::Important => "important",
            Variant::Standard => "standard",
        }
    }
}

impl FromStr for Variant {
    type Err = Error;

    fn from_str(text: &str) -> Result<Variant> {
        [Variant::Essential, Variant::Apt, Variant::Minbase, Variant::Important, Variant::Standard]
            .into_iter()
            .find(|v| v.name() == text)
            .ok_or_else(|| {
                Error::Invalid(format!("{text:?} is none of essential, apt, minbase, important, standard"))
            })
    }
}

/// How an image is filled: the `[build]` table of a configuration. A value out of its bounds is refused where it is read,
/// so that a parser can tell its place.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BuildSpec {
    /// Where the tree comes from.
    pub from: Source,
    /// The filesystem to make.
    #[serde(default)]
    pub filesystem: Filesystem,
    /// The filesystem's label, at most 16 bytes.
    #[serde(default, deserialize_with = "read_label")]
    pub label: Option<String>,
    /// The filesystem's UUID; derived from its content where not given.
    #[serde(default, deserialize_with = "read_uuid")]
    pub uuid: Option<String>,
    /// Percent of the blocks that only the guest's root may fill, 0 to 50; 5 where not given.
    #[serde(default, deserialize_with = "read_reserved")]
    pub reserved_percent: Option<u8>,
    /// How many inodes to make; derived from the size where not given.
    #[serde(default, deserialize_with = "read_inodes")]
    pub inodes: Option<u64>,
    /// Bytes of the filesystem for which there is one inode, where their number is not given; 16384 by default. Of ext4.
    #[serde(default, deserialize_with = "read_ratio")]
    pub bytes_per_inode: Option<u64>,
    /// The journal's size. Of ext4.
    #[serde(default)]
    pub journal: JournalSize,
    /// Mount options that the filesystem asks for by itself, with commas, at most 63 bytes. Of ext4.
    #[serde(default, deserialize_with = "read_mount_options")]
    pub mount_options: Option<String>,
    /// The root directory's permission bits, instead of the source's. Of ext4.
    #[serde(default, deserialize_with = "read_mode")]
    pub root_mode: Option<u32>,
    /// The root directory's owner and group as `UID:GID`, instead of the source's. Of ext4.
    #[serde(default)]
    pub root_owner: Option<Owner>,
    /// Keep orphans in a file of their own, which kernels before 5.15 and e2fsprogs before 1.47 do not know. Of ext4.
    #[serde(default)]
    pub orphan_file: bool,
    /// Leave out what GRUB before 2.12 cannot read (metadata_csum_seed). Of ext4.
    #[serde(default)]
    pub for_old_grub: bool,
    /// The size of a file for swapping, `/swapfile`, with a line in `/etc/fstab`; there is none where not given. Of ext4.
    #[serde(default, deserialize_with = "read_swap_file")]
    pub swap_file: Option<Size>,
    /// Whether the image shares blocks with the source, where both are on one filesystem that can. Of ext4.
    #[serde(default)]
    pub reflink: Sharing,
    /// Leave out what cannot be read and list it, instead of giving up. Of ext4.
    #[serde(default)]
    pub skip_unreadable: bool,
    /// More arguments for mke2fs, as they are. Of ext2 and ext3.
    #[serde(default)]
    pub mkfs_args: Vec<String>,
    /// Paths in the source to leave out; `*`, `?` and `**` as a shell has them, with what is below.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// Take files that change while they are read as they are found, and report them, instead of giving up. Always so
    /// where the source is `/`.
    #[serde(default)]
    pub live: bool,
    /// A suite's mirror; the one in the host's apt sources where not given.
    #[serde(default, deserialize_with = "read_mirror")]
    pub mirror: Option<String>,
    /// A suite's components; `main` where not given.
    #[serde(default, deserialize_with = "read_words")]
    pub components: Vec<String>,
    /// Packages to install besides the suite's own.
    #[serde(default, deserialize_with = "read_words")]
    pub packages: Vec<String>,
    /// How much of a suite is installed; `important` where not given.
    #[serde(default)]
    pub variant: Option<Variant>,
    /// The machine that a container image is for, where there are several (`linux/arm64`); this one where not given.
    #[serde(default)]
    pub platform: Option<Machine>,
    /// A whole disk around the filesystem, which then is its root; the filesystem fills the file where not given.
    #[serde(default)]
    pub disk: Option<DiskSpec>,
}

impl BuildSpec {
    /// A build from `from`, with everything else as it is by default.
    pub fn new(from: Source) -> BuildSpec {
        BuildSpec {
            from,
            filesystem: Filesystem::default(),
            label: None,
            uuid: None,
            reserved_percent: None,
            inodes: None,
            bytes_per_inode: None,
            journal: JournalSize::Auto,
            mount_options: None,
            root_mode: None,
            root_owner: None,
            orphan_file: false,
            for_old_grub: false,
            swap_file: None,
            reflink: Sharing::Auto,
            skip_unreadable: false,
            mkfs_args: Vec::new(),
            exclude: Vec::new(),
            live: false,
            mirror: None,
            components: Vec::new(),
            packages: Vec::new(),
            variant: None,
            platform: None,
            disk: None,
        }
    }

    /// Finds what cannot work before anything is done.
    ///
    /// # Errors
    ///
    /// The first value that is out of its bounds, or that does not go with the source.
    pub fn check(&self) -> Result<()> {
        self.label.as_deref().map_or(Ok(()), check_label)?;
        self.uuid.as_deref().map_or(Ok(()), check_uuid)?;
        self.reserved_percent.as_ref().map_or(Ok(()), check_reserved)?;
        self.inodes.as_ref().map_or(Ok(()), check_inodes)?;
        self.disk.as_ref().map_or(Ok(()), DiskSpec::check)?;
        self.bytes_per_inode.as_ref().map_or(Ok(()), check_ratio)?;
        self.mount_options.as_ref().map_or(Ok(()), check_mount_options)?;
        self.root_mode.as_ref().map_or(Ok(()), check_mode)?;
        self.swap_file.as_ref().map_or(Ok(()), check_swap_file)?;
        self.check_filesystem()?;
        self.components.iter().chain(&self.packages).try_for_each(|word| check_word(word))?;
        self.mirror.as_deref().map_or(Ok(()), check_mirror)?;
        let of_suites = self.mirror.is_some()
            || self.variant.is_some()
            || !self.components.is_empty()
            || !self.packages.is_empty();
        if of_suites && !matches!(self.from, Source::Suite { .. }) {
            return invalid(format!(
                "mirror, components, packages and variant are for debian:SUITE and ubuntu:SUITE, not for {}",
                self.from
            ));
        }
        if self.platform.is_some() && !matches!(self.from, Source::Image(_) | Source::Registry(_)) {
            return invalid(format!("platform is for container images, not for {}", self.from));
        }
        Ok(())
    }
}

impl BuildSpec {
    /// Finds what the filesystem does not have.
    fn check_filesystem(&self) -> Result<()> {
        if self.filesystem == Filesystem::Ext4 {
            if !self.mkfs_args.is_empty() {
                return invalid("mkfs-args are for ext2 and ext3: no mke2fs makes ext4".to_owned());
            }
            return Ok(());
        }
        let of_ext4 = [
            (self.bytes_per_inode.is_some(), "bytes-per-inode"),
            (self.journal != JournalSize::Auto, "journal"),
            (self.mount_options.is_some(), "mount-options"),
            (self.root_mode.is_some(), "root-mode"),
            (self.root_owner.is_some(), "root-owner"),
            (self.orphan_file, "orphan-file"),
            (self.for_old_grub, "for-old-grub"),
            (self.swap_file.is_some(), "swap-file"),
            (self.reflink != Sharing::Auto, "reflink"),
            (self.skip_unreadable, "skip-unreadable"),
        ];
        match of_ext4.iter().find(|(given, _)| *given) {
            Some((_, name)) => invalid(format!("{name} is for ext4, not for {}", self.filesystem)),
            None => Ok(()),
        }
    }
}

fn invalid(text: String) -> Result<()> {
    Err(Error::Invalid(text))
}

fn check_label(label: &str) -> Result<()> {
    if label.len() > 16 || label.contains('\0') {
        return invalid(format!("label {label:?}: at most 16 bytes"));
    }
    Ok(())
}

fn check_uuid(uuid: &str) -> Result<()> {
    let groups: Vec<&str> = uuid.split('-').collect();
    let lengths = [8, 4, 4, 4, 12];
    let is_uuid = groups.len() == lengths.len()
        && groups.iter().zip(lengths).all(|(g, n)| g.len() == n && g.bytes().all(|b| b.is_ascii_hexdigit()));
    if !is_uuid {
        return invalid(format!("{uuid:?} is no UUID (8-4-4-4-12 hexadecimal digits)"));
    }
    Ok(())
}

fn check_reserved(percent: &u8) -> Result<()> {
    if *percent > 50 {
        return invalid("at most 50 percent of the blocks can be reserved".to_owned());
    }
    Ok(())
}

fn check_inodes(inodes: &u64) -> Result<()> {
    if !(16..=u64::from(u32::MAX)).contains(inodes) {
        return invalid(format!("the number of inodes is from 16 to {}", u32::MAX));
    }
    Ok(())
}

fn check_ratio(bytes: &u64) -> Result<()> {
    if !(1024..=1 << 26).contains(bytes) {
        return invalid("there is one inode for 1024 to 67108864 bytes".to_owned());
    }
    Ok(())
}

fn check_mount_options(options: &String) -> Result<()> {
    let plain = |b: u8| b.is_ascii_graphic();
    if options.len() > 63 || !options.bytes().all(plain) {
        return invalid(format!("mount options {options:?}: at most 63 plain characters without spaces"));
    }
    Ok(())
}

fn check_mode(mode: &u32) -> Result<()> {
    if *mode > 0o7777 {
        return invalid(format!("{mode:#o}: permission bits are 0 to 0o7777"));
    }
    Ok(())
}

fn check_swap_file(size: &Size) -> Result<()> {
    if !(swap::SMALLEST..=swap::LARGEST).contains(&size.bytes()) {
        let (least, most) = (Human(swap::SMALLEST), Human(swap::LARGEST));
        return invalid(format!("{}: a swap file has {least} at least and {most} at most", size.human()));
    }
    Ok(())
}

fn check_mirror(mirror: &str) -> Result<()> {
    if mirror.is_empty() || mirror.starts_with('-') {
        return invalid("the mirror is empty, or starts with a dash".to_owned());
    }
    Ok(())
}

fn check_word(word: &str) -> Result<()> {
    if word.is_empty() || word.contains([',', ' ', '\0']) {
        return invalid(format!("{word:?}: name components and packages one by one"));
    }
    Ok(())
}

fn read_label<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<String>, D::Error> {
    read(deserializer, |label: &String| check_label(label))
}

fn read_uuid<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<String>, D::Error> {
    read(deserializer, |uuid: &String| check_uuid(uuid))
}

fn read_reserved<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<u8>, D::Error> {
    read(deserializer, check_reserved)
}

fn read_inodes<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<u64>, D::Error> {
    read(deserializer, check_inodes)
}

fn read_ratio<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<u64>, D::Error> {
    read(deserializer, check_ratio)
}

fn read_mount_options<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<String>, D::Error> {
    read(deserializer, check_mount_options)
}

fn read_mode<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<u32>, D::Error> {
    read(deserializer, check_mode)
}

fn read_swap_file<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<Size>, D::Error> {
    read(deserializer, check_swap_file)
}

fn read_mirror<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<String>, D::Error> {
    read(deserializer, |mirror: &String| check_mirror(mirror))
}

fn read<'de, T, D>(deserializer: D, check: fn(&T) -> Result<()>) -> std::result::Result<Option<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    let value = Option::<T>::deserialize(deserializer)?;
    value.as_ref().map_or(Ok(()), check).map_err(D::Error::custom)?;
    Ok(value)
}

fn read_words<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<String>, D::Error> {
    let words = read(deserializer, |words: &Vec<String>| words.iter().try_for_each(|word| check_word(word)))?;
    Ok(words.unwrap_or_default())
}

/// How large a journal is: `auto`, `none` or a size. As small as 4 MiB, and at most 40,000 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum JournalSize {
    /// By the size of the filesystem, as mke2fs has it.
    #[default]
    Auto,
    /// There is none.
    None,
    /// So many bytes.
    Bytes(u64),
}

impl FromStr for JournalSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<JournalSize> {
        match text {
            "auto" => Ok(JournalSize::Auto),
            "none" => Ok(JournalSize::None),
            _ => {
                let size = text.parse::<Size>().map_err(|e| Error::Invalid(format!("the journal: {e}")))?;
                if !(4 << 20..=40_000 << 20).contains(&size.bytes()) {
                    return Err(Error::Invalid(format!("a journal of {text}: it has from 4M to 40000M")));
                }
                Ok(JournalSize::Bytes(size.bytes()))
            }
        }
    }
}

impl fmt::Display for JournalSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JournalSize::Auto => f.write_str("auto"),
            JournalSize::None => f.write_str("none"),
            JournalSize::Bytes(bytes) => write!(f, "{bytes}"),
        }
    }
}

/// Whether the blocks of files are shared rather than copied: `auto`, `always` or `never`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// Where it can be done, unless the build is to give the same bytes everywhere: shared blocks keep the zeros that
    /// the source stores.
    #[default]
    Auto,
    /// Where it can be done.
    Always,
    /// Not even there.
    Never,
}

impl Sharing {
    fn name(self) -> &'static str {
        match self {
            Sharing::Auto => "auto",
            Sharing::Always => "always",
            Sharing::Never => "never",
        }
    }
}

impl fmt::Display for Sharing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Sharing {
    type Err = Error;

    fn from_str(text: &str) -> Result<Sharing> {
        [Sharing::Auto, Sharing::Always, Sharing::Never]
            .into_iter()
            .find(|sharing| sharing.name() == text)
            .ok_or_else(|| Error::Invalid(format!("{text:?} is none of auto, always, never")))
    }
}

/// An owner and a group, as `UID:GID`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Owner {
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl FromStr for Owner {
    type Err = Error;

    fn from_str(text: &str) -> Result<Owner> {
        let number = |text: &str| text.parse().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()));
        let parts = text.split_once(':').and_then(|(uid, gid)| number(uid).zip(number(gid)));
        let (uid, gid) =
            parts.ok_or_else(|| Error::Invalid(format!("{text:?} is no owner: write UID:GID")))?;
        Ok(Owner { uid, gid })
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

macro_rules! as_text {
    ($($kind:ty),*) => {$(
        impl TryFrom<String> for $kind {
            type Error = Error;

            fn try_from(text: String) -> Result<$kind> {
                text.parse()
            }
        }

        impl From<$kind> for String {
            fn from(value: $kind) -> String {
                value.to_string()
            }
        }
    )*};
}

as_text!(JournalSize, Owner);

/// Everything about one build.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// The image's size. The filesystem takes its whole blocks; an odd tail stays, unused.
    pub size: ImageSize,
    /// What to make and from what.
    pub spec: BuildSpec,
    /// What to change in it.
    pub tailor: Tailor,
    /// Replace a file of that name.
    pub force: bool,
    /// When the image is made, and the latest time that an entry in it may have. With it the same build gives the same
    /// bytes, everywhere; without it, it is the time now, and no two images are the same.
    pub time: Option<Time>,
    /// Read the filesystem back and compare it with what it was made from. Of ext4.
    pub verify: bool,
    /// How many threads read a directory; where not given, as many as there are processors, up to eight.
    pub threads: Option<usize>,
    /// The program, with arguments, that calls [`serve_stage`](crate::serve_stage): an ordinary user's ext2 or ext3 is
    /// made by it, under fakeroot.
    pub helper: Vec<PathBuf>,
}
