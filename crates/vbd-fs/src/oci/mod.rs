//! Container images as a source: an OCI layout directory, the archive that `docker save` (or `podman save`) makes, in its
//! old form and with an OCI layout in it, or a registry.
//!
//! Layers are applied one on the other as they are read, with their whiteouts, and every digest is checked: what does
//! not match ends the build. The formats: OCI image specification 1.1 ("Image Layout", "Image Manifest", "Image Layer
//! Filesystem Changeset") and the Docker image specification 1.2.

mod blobs;
mod digest;
mod json;
mod layer;
mod registry;
mod unpack;

use std::collections::VecDeque;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Context;
use crate::plan::Gather;
use crate::tar::NamedAcl;
use crate::{Cancel, Error, Progress, Result, Step};

use blobs::{Blob, Blobs};
use digest::{Digest, Hashing};
use json::{Config, Descriptor, Index, Manifest, Saved};
use unpack::Unpacking;

pub use json::Machine;
pub use layer::fuzz as fuzz_layers;
pub use registry::{RegistryRef, fuzz as fuzz_registry};

/// The largest manifest or index that is read, in bytes: registries allow 4 MiB.
const MANIFEST: u64 = 4 << 20;
/// The largest configuration that is read, in bytes.
const CONFIG: u64 = 16 << 20;
/// More layers than these are none: runtimes stop at 127.
const LAYERS: usize = 1000;
/// How deep indexes may lead to indexes.
const DEPTH: u32 = 4;

/// Where a container image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRef {
    /// How it is stored.
    pub store: ImageStore,
    /// The directory or the archive.
    pub path: PathBuf,
    /// Which of the images there, by its tag or reference; where not given there must be one alone.
    pub name: Option<String>,
}

/// How container images are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageStore {
    /// A directory in the OCI layout.
    Layout,
    /// An archive, of `docker save` or of an OCI layout.
    Archive,
}

impl ImageStore {
    /// The word before the first colon.
    pub fn prefix(self) -> &'static str {
        match self {
            ImageStore::Layout => "oci",
            ImageStore::Archive => "docker-archive",
        }
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.store.prefix(), self.path.display())?;
        self.name.as_ref().map_or(Ok(()), |name| write!(f, ":{name}"))
    }
}

impl ImageRef {
    /// The rest of a text after its prefix and colon: `PATH` or `PATH:NAME`.
    ///
    /// # Errors
    ///
    /// A text without a path, or with an empty name.
    pub(crate) fn parse(store: ImageStore, text: &str) -> Result<ImageRef> {
        let (path, name) = text.split_once(':').map_or((text, None), |(path, name)| (path, Some(name)));
        if path.is_empty() || name == Some("") {
            let prefix = store.prefix();
            return Err(Error::Invalid(format!(
                "{prefix}:{text}: write it as {prefix}:PATH or {prefix}:PATH:NAME"
            )));
        }
        Ok(ImageRef { store, path: path.into(), name: name.map(str::to_owned) })
    }
}

/// A layer of an image.
struct Layer {
    blob: Blob,
    /// The digest of the blob as it is stored.
    stored: Option<Digest>,
    /// The digest of the tar in it.
    content: Option<Digest>,
}

/// An image whose manifest and configuration were read.
pub(crate) struct Image {
    shown: String,
    layers: Vec<Layer>,
    blobs: Blobs,
}

impl Image {
    /// Finds the image and reads what describes it.
    ///
    /// # Errors
    ///
    /// What is missing, damaged, of an unknown kind, or of which there are several.
    pub(crate) fn open(reference: &ImageRef, machine: Option<&Machine>) -> Result<Image> {
        let shown = reference.to_string();
        let blobs = match reference.store {
            ImageStore::Layout => Blobs::directory(&reference.path)?,
            ImageStore::Archive => Blobs::archive(&reference.path)?,
        };
        let name = reference.name.as_deref();
        let machine = machine.cloned().unwrap_or_else(Machine::this);
        let finder = Finder { shown: &shown, blobs: &blobs, machine };
        // What docker saves has both descriptions; the OCI one has digests.
        let layers = if blobs.has("index.json") {
            finder.layout(name)?
        } else if blobs.has("manifest.json") {
            finder.saved(name)?
        } else {
            return Err(finder.bad("", "is no container image: it has neither index.json nor manifest.json"));
        };
        Ok(Image { shown, layers, blobs })
    }

    /// Asks a registry for an image.
    ///
    /// # Errors
    ///
    /// As [`Image::open`]; a registry that cannot be reached, or refuses.
    #[cfg(feature = "registry")]
    pub(crate) fn fetch(reference: &RegistryRef, machine: Option<&Machine>) -> Result<Image> {
        let shown = reference.to_string();
        let bad = |reason: String| Error::Archive { archive: shown.clone(), entry: String::new(), reason };
        let client = registry::Client::new(reference).map_err(bad)?;
        let fetched = client.manifest(MANIFEST).map_err(bad)?;
        let found = Digest::of(&fetched.bytes);
        if let Some(wanted) = client.digest().filter(|wanted| *wanted != found.to_string()) {
            return Err(bad(format!("the manifest's digest is {found} and must be {wanted}")));
        }
        let size = fetched.bytes.len() as u64;
        let descriptor = Descriptor::of(fetched.kind, found.to_string(), size);
        let manifest = (format!("manifests/{found}"), fetched.bytes);
        let blobs = Blobs::Registry { client: std::sync::Arc::new(client), manifest };
        let machine = machine.cloned().unwrap_or_else(Machine::this);
        let finder = Finder { shown: &shown, blobs: &blobs, machine };
        let layers = finder.image(Index { manifests: vec![descriptor] }, None)?;
        Ok(Image { shown, layers, blobs })
    }

    /// Refuses to ask a registry.
    ///
    /// # Errors
    ///
    /// Always.
    #[cfg(not(feature = "registry"))]
    pub(crate) fn fetch(reference: &RegistryRef, _: Option<&Machine>) -> Result<Image> {
        Err(Error::Invalid(format!("{reference}: this program was built without the feature `registry`")))
    }

    /// Bytes of the layers as they are stored.
    pub(crate) fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.blob.size).sum()
    }

    /// Applies the layers, of which up to `ahead` are read and unpacked at once. What is returned are ACLs for names.
    ///
    /// # Errors
    ///
    /// A layer that is damaged, hostile or not what its digest says; those of the sink.
    pub(crate) fn unpack(
        &self,
        gather: &mut Gather<'_>,
        ahead: usize,
        progress: &mut dyn Progress,
    ) -> Result<Vec<NamedAcl>> {
        progress.step(Step::Read, Some(self.bytes()));
        let name = |number: usize| format!("{}, layer {number} of {}", self.shown, self.layers.len());
        std::thread::scope(|scope| {
            let mut named = Vec::new();
            let mut running = VecDeque::new();
            let mut to_come = (1..).zip(&self.layers);
            for (number, _) in (1..).zip(&self.layers) {
                let more = to_come.by_ref().take(ahead.max(1) - running.len());
                running.extend(more.map(|(number, layer)| {
                    Unpacking::start(scope, self, layer, (name(number), progress.cancel()))
                }));
                let Some(unpacking) = running.pop_front() else { break };
                named.extend(unpacking.apply(&name(number), gather, progress)?);
                progress.advance(0);
            }
            Ok(named)
        })
    }
}

struct Finder<'a> {
    shown: &'a str,
    blobs: &'a Blobs,
    machine: Machine,
}

impl Finder<'_> {
    fn bad(&self, entry: &str, reason: impl Into<String>) -> Error {
        Error::Archive { archive: self.shown.to_owned(), entry: entry.to_owned(), reason: reason.into() }
    }

    /// A small file of the image, and whether it is what its digest says.
    fn read(
        &self,
        path: &str,
        limit: u64,
        (digest, size): (Option<&Digest>, Option<u64>),
    ) -> Result<Vec<u8>> {
        let blob =
            self.blobs.find_sized(path, size).ok_or_else(|| self.bad(path, "is missing in the image"))?;
        if blob.size > limit {
            return Err(self.bad(path, format!("has {} bytes, which is too many", blob.size)));
        }
        let mut reader = Hashing::new(self.blobs.open(&blob, &Cancel::never())?.take(limit));
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).at("read in the image", Path::new(path))?;
        reader.check(digest).map_err(|e| self.bad(path, e.to_string()))?;
        Ok(bytes)
    }

    fn json<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        limit: u64,
        expected: (Option<&Digest>, Option<u64>),
    ) -> Result<T> {
        let bytes = self.read(path, limit, expected)?;
        serde_json::from_slice(&bytes).map_err(|e| self.bad(path, format!("is not as it must be: {e}")))
    }

    /// The layers of an image in an OCI layout.
    fn layout(&self, name: Option<&str>) -> Result<Vec<Layer>> {
        let index: Index = self.json("index.json", MANIFEST, (None, None))?;
        self.image(index, name)
    }

    /// The layers of an image in an index.
    fn image(&self, index: Index, name: Option<&str>) -> Result<Vec<Layer>> {
        let chosen = self.choose(index, name, DEPTH)?;
        let digest = self.digest(&chosen.digest)?;
        let path = self.blobs.manifest_path(&digest);
        let manifest: Manifest = self.json(&path, MANIFEST, (Some(&digest), chosen.size))?;
        if manifest.layers.len() > LAYERS {
            return Err(self.bad(&digest.path(), format!("has {} layers", manifest.layers.len())));
        }
        let digest = self.digest(&manifest.config.digest)?;
        // What is no container's has a configuration of its own kind.
        let config: Config = self.json(&digest.path(), CONFIG, (Some(&digest), manifest.config.size))?;
        let contents = self.contents(config, manifest.layers.len())?;
        let layers = manifest.layers.iter().zip(contents).map(|(layer, content)| {
            let digest = self.digest(&layer.digest)?;
            if !layer.is_tar() {
                let kind = &layer.media_type;
                return Err(self.bad(&digest.path(), format!("is a layer of the unknown type {kind:?}")));
            }
            let blob = self
                .blobs
                .find_sized(&digest.path(), layer.size)
                .ok_or_else(|| self.bad(&digest.path(), "is missing in the image"))?;
            if layer.size.is_some_and(|size| size != blob.size) {
                return Err(self
                    .bad(&digest.path(), format!("has {} bytes and not what its manifest says", blob.size)));
            }
            Ok(Layer { blob, stored: Some(digest), content })
        });
        layers.collect()
    }

    /// The one manifest that is meant.
    fn choose(&self, index: Index, name: Option<&str>, depth: u32) -> Result<Descriptor> {
        let all = index.manifests;
        let named: Vec<&Descriptor> = match name {
            Some(name) => all.iter().filter(|one| one.is_called(name)).collect(),
            None => all.iter().collect(),
        };
        let here = &self.machine;
        let fits = |one: &&&Descriptor| one.platform.as_ref().is_none_or(|platform| platform.is(here));
        let fitting: Vec<&&Descriptor> = named.iter().filter(fits).collect();
        let [chosen] = fitting.as_slice() else {
            let names: Vec<&str> = all.iter().filter_map(|one| one.name()).take(20).collect();
            let have =
                if names.is_empty() { "names none".to_owned() } else { format!("has {}", names.join(", ")) };
            let reason = match (fitting.len(), name) {
                (0, Some(name)) => format!("has no image {name:?} for {here} (it {have})"),
                (0, None) => format!("has no image for {here}"),
                _ => format!("has several images: name one after a colon (it {have})"),
            };
            return Err(self.bad("index.json", reason));
        };
        if chosen.is_index() {
            let Some(depth) = depth.checked_sub(1) else {
                return Err(self.bad("index.json", "leads from index to index too often"));
            };
            let digest = self.digest(&chosen.digest)?;
            let path = self.blobs.manifest_path(&digest);
            let index: Index = self.json(&path, MANIFEST, (Some(&digest), chosen.size))?;
            return self.choose(index, None, depth);
        }
        Ok((**chosen).clone())
    }

    /// The layers of an image that `docker save` packed in its own way.
    fn saved(&self, name: Option<&str>) -> Result<Vec<Layer>> {
        let all: Vec<Saved> = self.json("manifest.json", MANIFEST, (None, None))?;
        let called = |one: &&Saved| name.is_none_or(|name| one.is_called(name));
        let chosen: Vec<&Saved> = all.iter().filter(called).collect();
        let [chosen] = chosen.as_slice() else {
            let names: Vec<&str> = all.iter().flat_map(Saved::names).take(20).collect();
            let what = if chosen.is_empty() {
                "has no such image"
            } else {
                "has several images: name one after a colon"
            };
            return Err(self.bad("manifest.json", format!("{what} (it has {})", names.join(", "))));
        };
        if chosen.layers.len() > LAYERS {
            return Err(self.bad("manifest.json", format!("has {} layers", chosen.layers.len())));
        }
        let config: Config = self.json(&chosen.config, CONFIG, (None, None))?;
        let contents = self.contents(config, chosen.layers.len())?;
        let layers = chosen.layers.iter().zip(contents).map(|(path, content)| {
            let blob = self.blobs.find(path).ok_or_else(|| self.bad(path, "is missing in the image"))?;
            Ok(Layer { blob, stored: None, content })
        });
        layers.collect()
    }

    /// The digests of what is in the layers, one for each.
    fn contents(&self, config: Config, layers: usize) -> Result<Vec<Option<Digest>>> {
        let ids = config.rootfs.diff_ids;
        if ids.len() != layers {
            let reason =
                format!("has {layers} layers and digests of {}: is it a container image?", ids.len());
            return Err(self.bad("", reason));
        }
        ids.iter().map(|id| self.digest(id).map(Some)).collect()
    }

    fn digest(&self, text: &str) -> Result<Digest> {
        text.parse().map_err(|reason: String| self.bad("", reason))
    }
}

/// Reads what describes images, as an index, a manifest, a configuration and a `manifest.json`. For fuzzing: it must end
/// without a panic whatever it reads.
pub fn fuzz(bytes: &[u8]) {
    if let Ok(index) = serde_json::from_slice::<Index>(bytes) {
        for one in &index.manifests {
            let _ = (one.is_called("latest"), one.is_index(), one.is_tar(), one.digest.parse::<Digest>());
        }
    }
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(bytes) {
        let digests = manifest.layers.iter().chain([&manifest.config]);
        digests
            .filter_map(|one| one.digest.parse::<Digest>().ok())
            .for_each(|digest| assert!(!digest.path().contains("..")));
    }
    let _ = serde_json::from_slice::<Config>(bytes);
    let _ = serde_json::from_slice::<Vec<Saved>>(bytes);
}
