//! What was found.

use crate::read::{Error, Result};

/// Problems that are kept; the others are counted.
const KEPT: usize = 1000;

/// What was found in a filesystem.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What is wrong, in the order in which it was found; the first thousand.
    pub problems: Vec<Problem>,
    /// How many there are in all.
    pub count: u64,
    /// What is as it may be and still worth a word.
    pub notes: Vec<String>,
    /// Whether something kept it from being looked at to the end.
    pub incomplete: bool,
    /// Inodes in use.
    pub inodes: u64,
    /// Directories among them.
    pub directories: u64,
    /// Blocks in use.
    pub blocks: u64,
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The structure, such as "inode 12" or "the superblock".
    pub place: String,
    /// What is wrong with it.
    pub reason: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.place, self.reason)
    }
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.count == 0 && !self.incomplete
    }

    pub(super) fn add(&mut self, place: String, reason: String) {
        self.count += 1;
        if self.problems.len() < KEPT {
            self.problems.push(Problem { place, reason });
        }
    }

    pub(super) fn note(&mut self, note: String) {
        if self.notes.len() < KEPT {
            self.notes.push(note);
        }
    }

    /// An error of the reader is a problem of the filesystem, unless the source cannot be read.
    pub(super) fn error(&mut self, error: Error) -> Result<()> {
        match error {
            Error::Checksum(place) => self.add(place.to_string(), "the checksum is wrong".to_owned()),
            Error::Corrupt { place, reason } => self.add(place.to_string(), reason),
            Error::Unsupported { place, feature } => {
                self.add(place.to_string(), format!("it uses {feature}, which cannot be"));
            }
            other => return Err(other),
        }
        Ok(())
    }
}
