//! What can go wrong while a filesystem is made, with the place and the remedy.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vbd_image::create::CreateError;
use vbd_image::lease::LeaseError;
use vbd_image::size::Human;

/// The result of an operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a filesystem could not be built or tailored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request makes no sense, whatever the state of the machine.
    #[error("{0}")]
    Invalid(String),
    /// The image cannot be made or named: it exists and replacing it was not asked for, it is in use, there is no such
    /// directory.
    #[error(transparent)]
    Image(#[from] CreateError),
    /// A disk is in use.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A call to the system failed.
    #[error("{what}: {error}")]
    Io {
        /// What was being done, to what.
        what: String,
        /// The system's answer.
        error: io::Error,
    },
    /// A part of the source cannot be read, or changed under the reader.
    #[error("{}: {reason}", .path.display())]
    Source {
        /// The file or directory of the source.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// Parts of the source cannot be read.
    #[error("{} entries cannot be taken:{}", .0.len(), lines(.0))]
    Unreadable(
        /// Each with what is wrong with it.
        Vec<(PathBuf, String)>,
    ),
    /// An archive is damaged or hostile.
    #[error("{archive}{} {reason}", entry_clause(.entry))]
    Archive {
        /// The archive's name.
        archive: String,
        /// The entry's name, or nothing where the archive itself is meant.
        entry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The source is larger than the filesystem.
    #[error("{0}")]
    NoRoom(Shortage),
    /// A program that is needed is not installed.
    #[error("{program} is not installed: install the package {package}")]
    Missing {
        /// The program's name.
        program: String,
        /// The Debian package that has it.
        package: String,
    },
    /// A program failed.
    #[error("{program} failed ({status}){}", said(.stderr))]
    Tool {
        /// The program's name.
        program: String,
        /// How it ended.
        status: String,
        /// The end of what it said.
        stderr: String,
    },
    /// A change that was asked for does not fit the tree.
    #[error("tailoring {item}: {reason}")]
    Tailor {
        /// The option, or the path in the image.
        item: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// Something in an image cannot be read; the text names it.
    #[error("{0}")]
    Inside(String),
    /// The caller asked to stop something that leaves behind what it has done.
    #[error("interrupted")]
    Stopped,
    /// What was written is not what it was made from.
    #[error("the filesystem was read back and is not what it was made from: {}: {reason}", .path.display())]
    Verify {
        /// The entry.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The caller asked to stop.
    #[error("interrupted: nothing was left behind")]
    Interrupted,
    /// The process that does the work for an ordinary user failed; the text says how.
    #[error("{0}")]
    Stage(String),
}

impl Error {
    /// An error of a call, with what was being done.
    pub(crate) fn io(what: impl Into<String>, error: io::Error) -> Error {
        Error::Io { what: what.into(), error }
    }

    /// Entries that cannot be read, of which there is one at least.
    pub(crate) fn unreadable(mut entries: Vec<(PathBuf, String)>) -> Error {
        match entries.pop() {
            Some((path, reason)) if entries.is_empty() => Error::Source { path, reason },
            last => {
                entries.extend(last);
                Error::Unreadable(entries)
            }
        }
    }

    /// An error about one change of a tailoring.
    pub(crate) fn tailor(item: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Tailor { item: item.into(), reason: reason.into() }
    }
}

/// Adds what was being done to an [`io::Error`].
pub(crate) trait Context<T> {
    /// Names the action and the path it was done to.
    fn at(self, action: &str, path: &Path) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn at(self, action: &str, path: &Path) -> Result<T> {
        self.map_err(|e| Error::io(format!("cannot {action} {}", path.display()), e))
    }
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn at(self, action: &str, path: &Path) -> Result<T> {
        self.map_err(io::Error::from).at(action, path)
    }
}

/// How much a filesystem lacks to hold a source.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Shortage {
    /// Bytes that the source takes in this filesystem, its metadata included.
    pub needed_bytes: u64,
    /// Bytes that the empty filesystem has free.
    pub free_bytes: u64,
    /// Files, directories, links and devices in the source.
    pub needed_inodes: u64,
    /// Inodes that the empty filesystem has free.
    pub free_inodes: u64,
    /// The size in bytes of the image.
    pub size: u64,
    /// A size in bytes that would do, where it could be found.
    pub enough: Option<u64>,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not enough room: an image of {} has ", Human(self.size))?;
        let bytes = self.needed_bytes.saturating_sub(self.free_bytes);
        let inodes = self.needed_inodes.saturating_sub(self.free_inodes);
        if bytes > 0 || inodes == 0 {
            write!(
                f,
                "{} for files and the source needs {}",
                Human(self.free_bytes),
                Human(self.needed_bytes)
            )?;
            if bytes > 0 {
                write!(f, ", {} are missing", Human(bytes))?;
            }
        }
        if inodes > 0 {
            let joint = if bytes > 0 { "; it has " } else { "" };
            write!(
                f,
                "{joint}{} inodes and the source needs {}, {inodes} are missing (see the option inodes)",
                self.free_inodes, self.needed_inodes
            )?;
        }
        if let Some(enough) = self.enough {
            write!(f, "; a size of {}M would do", enough.div_ceil(1 << 20))?;
        }
        Ok(())
    }
}

fn entry_clause(entry: &str) -> String {
    if entry.is_empty() { String::new() } else { format!(": entry {entry:?}") }
}

fn lines(entries: &[(PathBuf, String)]) -> String {
    entries.iter().map(|(path, reason)| format!("\n  {}: {reason}", path.display())).collect()
}

fn said(stderr: &str) -> String {
    let text = stderr.trim();
    if text.is_empty() { String::new() } else { format!(": {text}") }
}
