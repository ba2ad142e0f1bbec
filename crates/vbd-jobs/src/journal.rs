//! What an interrupted job leaves beside the file that it makes, so that it can go on.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The version of the file's form.
const VERSION: u32 = 1;
/// More than this is no journal, in bytes.
const LONGEST: u64 = 1 << 20;

/// A file, to be known again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileId {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    /// The time of its last change in nanoseconds since 1970.
    changed: i128,
}

impl FileId {
    pub(crate) fn of(path: &Path) -> io::Result<FileId> {
        let metadata = path.metadata()?;
        let changed = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        Ok(FileId {
            path: std::path::absolute(path)?,
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            changed,
        })
    }
}

/// How far a job is, and of what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Journal {
    version: u32,
    /// The files that are read: they must be as they were.
    pub(crate) sources: Vec<FileId>,
    /// What is made of them, in words that are compared.
    pub(crate) what: String,
    /// Below this offset of the disk everything is written and durable.
    pub(crate) done: u64,
}

impl Journal {
    pub(crate) fn new(sources: Vec<FileId>, what: String) -> Self {
        Journal { version: VERSION, sources, what, done: 0 }
    }

    /// Reads one; none where there is none.
    pub(crate) fn read(path: &Path) -> Result<Option<Journal>> {
        let failed = Error::io(path, "read the journal");
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut text = String::new();
        io::Read::read_to_string(&mut io::Read::take(file, LONGEST), &mut text).map_err(failed)?;
        let journal: Journal = serde_json::from_str(&text).map_err(|error| {
            Error::Refused(format!("{}: is no journal ({error}): begin anew with --restart", path.display()))
        })?;
        if journal.version != VERSION {
            let message = "is of another version of vbd: begin anew with --restart";
            return Err(Error::Refused(format!("{}: {message}", path.display())));
        }
        Ok(Some(journal))
    }

    /// Writes it, durably, as a whole.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let next = path.with_extension("next");
        let write = || -> io::Result<()> {
            let mut file = File::create(&next)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            file.sync_all()?;
            fs::rename(&next, path)?;
            sync_directory(path)
        };
        write().map_err(Error::io(path, "write the journal"))
    }
}

/// Makes the names in a file's directory durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}
