//! The files of an image: in a directory, or in an archive that is not compressed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
#[cfg(feature = "registry")]
use std::sync::Arc;

use super::digest::Digest;
#[cfg(feature = "registry")]
use super::registry;
use crate::error::Context;
use crate::tar::clean_path;
use crate::{Cancel, Error, Result};

/// More files in an archive than these are no image's.
const FILES: usize = 100_000;

/// A file of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blob {
    /// Its name in the image.
    path: String,
    /// Where it begins in an archive.
    offset: u64,
    /// Its size in bytes.
    pub(super) size: u64,
}

/// The files.
pub(super) enum Blobs {
    Directory(PathBuf),
    Archive {
        file: File,
        members: HashMap<String, Blob>,
    },
    #[cfg(feature = "registry")]
    Registry {
        client: Arc<registry::Client>,
        /// The manifest that was asked for, by its path.
        manifest: (String, Vec<u8>),
    },
}

impl Blobs {
    pub(super) fn directory(path: &Path) -> Result<Blobs> {
        if !path.is_dir() {
            return Err(Error::Source {
                path: path.to_owned(),
                reason: "is no directory with an OCI layout".to_owned(),
            });
        }
        Ok(Blobs::Directory(path.to_owned()))
    }

    /// Looks through an archive for its files.
    pub(super) fn archive(path: &Path) -> Result<Blobs> {
        let source = |reason: String| Error::Source { path: path.to_owned(), reason };
        let file = File::open(path).map_err(|e| source(format!("cannot be read: {e}")))?;
        let mut magic = [0; 4];
        let start = file.read_at(&mut magic, 0).at("read", path)?;
        if magic[..start].starts_with(&[0x1f, 0x8b])
            || magic == [0x28, 0xb5, 0x2f, 0xfd]
            || magic == [0xfd, b'7', b'z', b'X']
        {
            return Err(source(
                "is compressed: unpack it first (gunzip), for its parts are read where they are".to_owned(),
            ));
        }
        let length = file.metadata().at("look at", path)?.len();
        let mut members = HashMap::new();
        let mut links = Vec::new();
        let mut archive = tar::Archive::new(io::BufReader::new(&file));
        let damaged = |e: io::Error| source(format!("is no archive of an image: {e}"));
        for entry in archive.entries_with_seek().map_err(damaged)? {
            let entry = entry.map_err(damaged)?;
            let raw = entry.path_bytes().into_owned();
            let name = clean_path(&raw)
                .map_err(|reason| source(format!("{}: {reason}", String::from_utf8_lossy(&raw))))?;
            let Some(name) = name.to_str().map(str::to_owned) else { continue };
            match entry.header().entry_type() {
                tar::EntryType::Regular => {
                    let (offset, size) = (entry.raw_file_position(), entry.size());
                    if offset.checked_add(size).is_none_or(|end| end > length) {
                        return Err(source(format!("{name}: is cut off")));
                    }
                    members.insert(name.clone(), Blob { path: name, offset, size });
                }
                // The old form has links where two images share a layer.
                tar::EntryType::Symlink | tar::EntryType::Link => {
                    let target =
                        entry.link_name_bytes().map(|target| target.into_owned()).unwrap_or_default();
                    links.push((name, entry.header().entry_type(), target));
                }
                tar::EntryType::Directory => {}
                other => return Err(source(format!("{name}: is of the type {other:?}, which no image has"))),
            }
            if members.len() + links.len() > FILES {
                return Err(source("has too many files for an image".to_owned()));
            }
        }
        for (name, kind, target) in links {
            let target = if kind == tar::EntryType::Link { Some(target) } else { joined(&name, &target) };
            let target = target
                .and_then(|target| clean_path(&target).ok())
                .and_then(|t| t.to_str().map(str::to_owned));
            if let Some(found) = target.and_then(|target| members.get(&target)).cloned() {
                members.insert(name, found);
            }
        }
        Ok(Blobs::Archive { file, members })
    }

    /// Where manifests are, other than the rest.
    pub(super) fn manifest_path(&self, digest: &Digest) -> String {
        match self {
            #[cfg(feature = "registry")]
            Blobs::Registry { .. } => format!("manifests/{digest}"),
            _ => digest.path(),
        }
    }

    /// As [`Blobs::find`], for a file whose size may be written elsewhere, which a registry is not asked for.
    pub(super) fn find_sized(
        &self,
        path: &str,
        #[cfg_attr(not(feature = "registry"), expect(unused_variables))] size: Option<u64>,
    ) -> Option<Blob> {
        match self {
            #[cfg(feature = "registry")]
            Blobs::Registry { .. } => Some(Blob { path: path.to_owned(), offset: 0, size: size? }),
            _ => self.find(path),
        }
    }

    pub(super) fn has(&self, path: &str) -> bool {
        self.find(path).is_some()
    }

    /// The file of that name, if it is one. Names come from the image: they must be clean.
    pub(super) fn find(&self, path: &str) -> Option<Blob> {
        let clean = clean_path(path.as_bytes()).ok()?;
        match self {
            Blobs::Directory(directory) => {
                let found =
                    std::fs::metadata(directory.join(&clean)).ok().filter(std::fs::Metadata::is_file)?;
                Some(Blob { path: path.to_owned(), offset: 0, size: found.len() })
            }
            Blobs::Archive { members, .. } => members.get(clean.to_str()?).cloned(),
            #[cfg(feature = "registry")]
            Blobs::Registry { .. } => None,
        }
    }

    /// Reads a file, until `cancel` where reading may take its time.
    pub(super) fn open(
        &self,
        blob: &Blob,
        #[cfg_attr(not(feature = "registry"), expect(unused_variables))] cancel: &Cancel,
    ) -> Result<Box<dyn Read + Send + '_>> {
        match self {
            Blobs::Directory(directory) => {
                let path = directory.join(&blob.path);
                let file = File::open(&path).at("open", &path)?;
                Ok(Box::new(file.take(blob.size)))
            }
            Blobs::Archive { file, .. } => Ok(Box::new(Part { file, at: blob.offset }.take(blob.size))),
            #[cfg(feature = "registry")]
            Blobs::Registry { manifest: (path, bytes), .. } if *path == blob.path => {
                Ok(Box::new(bytes.as_slice()))
            }
            #[cfg(feature = "registry")]
            Blobs::Registry { client, .. } => {
                // A registry's blobs have their digest as it is written everywhere else.
                let path = blob.path.replace("blobs/sha256/", "blobs/sha256:");
                Ok(Box::new(registry::Incoming::new(Arc::clone(client), path, blob.size, cancel.clone())))
            }
        }
    }
}

/// A part of an archive, read by itself: several are read at a time.
struct Part<'a> {
    file: &'a File,
    at: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// The path that a symbolic link at `name` leads to, `..` taken apart; nothing if it leads out.
fn joined(name: &str, target: &[u8]) -> Option<Vec<u8>> {
    let mut parts: Vec<&[u8]> = name.as_bytes().split(|byte| *byte == b'/').collect();
    parts.pop();
    for part in target.split(|byte| *byte == b'/') {
        match part {
            b"." | b"" => {}
            b".." => {
                parts.pop()?;
            }
            other => parts.push(other),
        }
    }
    Some(parts.join(&b'/'))
}
