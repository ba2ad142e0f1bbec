//! What an image can be filled from.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::oci::{ImageRef, ImageStore, RegistryRef};

/// Where the tree of a new filesystem comes from.
///
/// As text: `-` for an archive on standard input, `debian:SUITE`, `ubuntu:SUITE`, `oci:DIRECTORY[:NAME]` and
/// `docker-archive:FILE[:NAME]` for container images, `docker://[HOST/]NAME[:TAG]` for one in a registry, and anything else is the path of a
/// directory or an archive (write `./debian:x` for a file of that name).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Source {
    /// A directory, a tar or cpio that may be compressed with gzip, xz or zstd, or a squashfs.
    Path(PathBuf),
    /// An archive on standard input.
    Stdin,
    /// A container image in a layout directory or an archive.
    Image(ImageRef),
    /// A container image in a registry.
    Registry(RegistryRef),
    /// A distribution's suite, installed afresh by mmdebstrap.
    Suite {
        /// Whose suite it is.
        distribution: Distribution,
        /// The suite's name, such as `bookworm`.
        suite: String,
    },
}

/// A distribution that mmdebstrap installs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distribution {
    /// Debian.
    Debian,
    /// Ubuntu.
    Ubuntu,
}

impl Distribution {
    /// The name before the colon, and the last part of the archive's path on its mirrors.
    pub fn name(self) -> &'static str {
        match self {
            Distribution::Debian => "debian",
            Distribution::Ubuntu => "ubuntu",
        }
    }
}

impl FromStr for Source {
    type Err = Error;

    fn from_str(text: &str) -> Result<Source, Error> {
        if text.is_empty() || text.contains('\0') {
            return Err(Error::Invalid(
                "the source is empty: name a directory, an archive, - or debian:SUITE".to_owned(),
            ));
        }
        if text == "-" {
            return Ok(Source::Stdin);
        }
        if text.starts_with(RegistryRef::PREFIX) {
            return RegistryRef::parse(text).map(Source::Registry);
        }
        for store in [ImageStore::Layout, ImageStore::Archive] {
            let rest = text.strip_prefix(store.prefix()).and_then(|rest| rest.strip_prefix(':'));
            if let Some(rest) = rest {
                return ImageRef::parse(store, rest).map(Source::Image);
            }
        }
        for distribution in [Distribution::Debian, Distribution::Ubuntu] {
            let suite = text.strip_prefix(distribution.name()).and_then(|rest| rest.strip_prefix(':'));
            let Some(suite) = suite else { continue };
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/');
            if !suite.starts_with(|c: char| c.is_ascii_alphanumeric()) || !suite.chars().all(plain) {
                return Err(Error::Invalid(format!(
                    "{text}: {suite:?} is no suite's name (such as debian:bookworm)"
                )));
            }
            return Ok(Source::Suite { distribution, suite: suite.to_owned() });
        }
        Ok(Source::Path(PathBuf::from(text)))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Path(path) => write!(f, "{}", path.display()),
            Source::Stdin => f.write_str("-"),
            Source::Image(image) => image.fmt(f),
            Source::Registry(image) => image.fmt(f),
            Source::Suite { distribution, suite } => write!(f, "{}:{suite}", distribution.name()),
        }
    }
}

impl TryFrom<String> for Source {
    type Error = Error;

    fn try_from(text: String) -> Result<Source, Error> {
        text.parse()
    }
}

impl From<Source> for String {
    fn from(source: Source) -> String {
        source.to_string()
    }
}
