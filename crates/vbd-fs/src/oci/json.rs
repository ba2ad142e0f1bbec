//! What describes an image, as far as a filesystem needs it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// An index, and the `index.json` of a layout.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Index {
    #[serde(default)]
    pub(super) manifests: Vec<Descriptor>,
}

/// A manifest.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

/// What leads to a blob.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: String,
    #[serde(default)]
    pub(super) size: Option<u64>,
    #[serde(default)]
    pub(super) platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<Annotations>,
}

#[derive(Debug, Clone, Deserialize)]
struct Annotations {
    #[serde(default, rename = "org.opencontainers.image.ref.name")]
    name: Option<String>,
    /// The whole reference, as containerd and docker write it.
    #[serde(default, rename = "io.containerd.image.name")]
    reference: Option<String>,
}

/// The machine that an image is to be for: `linux/amd64`, `linux/arm/v7`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Machine {
    architecture: String,
    /// A kind of the architecture; any where not given.
    variant: Option<String>,
}

impl Machine {
    /// This one, as images call it.
    pub(super) fn this() -> Machine {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            other => other,
        };
        Machine { architecture: architecture.to_owned(), variant: None }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "linux/{}", self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

impl FromStr for Machine {
    type Err = Error;

    fn from_str(text: &str) -> Result<Machine, Error> {
        let plain = |part: &&str| {
            !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        let parts: Vec<&str> = text.split('/').collect();
        let (architecture, variant) = match parts[..] {
            ["linux", architecture] => (architecture, None),
            ["linux", architecture, variant] => (architecture, Some(variant)),
            _ => ("", None),
        };
        if !plain(&architecture) || !variant.as_ref().is_none_or(plain) {
            return Err(Error::Invalid(format!(
                "{text:?} is no platform such as linux/arm64 or linux/arm/v7"
            )));
        }
        Ok(Machine { architecture: architecture.to_owned(), variant: variant.map(str::to_owned) })
    }
}

impl TryFrom<String> for Machine {
    type Error = Error;

    fn try_from(text: String) -> Result<Machine, Error> {
        text.parse()
    }
}

impl From<Machine> for String {
    fn from(machine: Machine) -> String {
        machine.to_string()
    }
}

/// What an image is for.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    variant: Option<String>,
}

impl Platform {
    pub(super) fn is(&self, machine: &Machine) -> bool {
        let variant = machine.variant.is_none() || machine.variant == self.variant;
        self.os == "linux" && self.architecture == machine.architecture && variant
    }
}

impl Descriptor {
    /// What leads to a manifest or an index that is known by its digest.
    #[cfg(feature = "registry")]
    pub(super) fn of(media_type: String, digest: String, size: u64) -> Descriptor {
        Descriptor { media_type, digest, size: Some(size), platform: None, annotations: None }
    }

    pub(super) fn name(&self) -> Option<&str> {
        let annotations = self.annotations.as_ref()?;
        annotations.name.as_deref().or(annotations.reference.as_deref())
    }

    pub(super) fn is_called(&self, name: &str) -> bool {
        let of = |annotations: &Annotations| {
            [&annotations.name, &annotations.reference].into_iter().flatten().any(|own| own == name)
        };
        self.digest == name || self.annotations.as_ref().is_some_and(of)
    }

    pub(super) fn is_index(&self) -> bool {
        matches!(
            self.media_type.as_str(),
            "application/vnd.oci.image.index.v1+json"
                | "application/vnd.docker.distribution.manifest.list.v2+json"
        )
    }

    /// Whether it is a layer of files, however it is compressed.
    pub(super) fn is_tar(&self) -> bool {
        let kind = self.media_type.as_str();
        let of_oci = kind.strip_prefix("application/vnd.oci.image.layer.");
        let of_oci = of_oci.map(|kind| kind.strip_prefix("nondistributable.").unwrap_or(kind));
        of_oci.is_some_and(|kind| matches!(kind, "v1.tar" | "v1.tar+gzip" | "v1.tar+zstd"))
            || matches!(
                kind,
                "application/vnd.docker.image.rootfs.diff.tar"
                    | "application/vnd.docker.image.rootfs.diff.tar.gzip"
                    | "application/vnd.docker.image.rootfs.diff.tar.zstd"
                    | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
            )
    }
}

/// A container's configuration.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Config {
    pub(super) rootfs: Rootfs,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Rootfs {
    #[serde(default)]
    pub(super) diff_ids: Vec<String>,
}

/// An image in the `manifest.json` of `docker save`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Saved {
    pub(super) config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    pub(super) layers: Vec<String>,
}

impl Saved {
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.repo_tags.iter().flatten().map(String::as_str)
    }

    pub(super) fn is_called(&self, name: &str) -> bool {
        // "debian" means "debian:latest", as for docker.
        self.names().any(|own| own == name || own.strip_suffix(":latest") == Some(name))
    }
}
