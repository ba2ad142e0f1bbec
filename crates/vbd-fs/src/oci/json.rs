//! What describes an image, as far as a filesystem needs it.

use std::fmt;

use serde::Deserialize;

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

/// What an image is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Here(&'static str);

impl fmt::Display for Here {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "linux/{}", self.0)
    }
}

/// This machine, as images call it.
pub(super) fn this_machine() -> Here {
    Here(match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    })
}

/// What an image is for.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

impl Platform {
    pub(super) fn is(&self, here: Here) -> bool {
        self.os == "linux" && self.architecture == here.0
    }
}

impl Descriptor {
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
