//! What can be asked of a build.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, Source, Tailor};

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
    /// The filesystem's UUID; random where not given.
    #[serde(default, deserialize_with = "read_uuid")]
    pub uuid: Option<String>,
    /// Percent of the blocks that only the guest's root may fill, 0 to 50; mke2fs decides where not given.
    #[serde(default, deserialize_with = "read_reserved")]
    pub reserved_percent: Option<u8>,
    /// How many inodes to make; mke2fs derives them from the size where not given.
    #[serde(default, deserialize_with = "read_inodes")]
    pub inodes: Option<u64>,
    /// More arguments for mke2fs, as they are.
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
            mkfs_args: Vec::new(),
            exclude: Vec::new(),
            live: false,
            mirror: None,
            components: Vec::new(),
            packages: Vec::new(),
            variant: None,
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
        Ok(())
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

/// Everything about one build.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// The image's size in bytes. The filesystem takes its whole blocks; an odd tail stays, unused.
    pub size: u64,
    /// What to make and from what.
    pub spec: BuildSpec,
    /// What to change in it.
    pub tailor: Tailor,
    /// Replace a file of that name.
    pub force: bool,
    /// The program, with arguments, that calls [`serve_stage`](crate::serve_stage): as an ordinary user the work is done
    /// by it, under fakeroot.
    pub helper: Vec<PathBuf>,
}
