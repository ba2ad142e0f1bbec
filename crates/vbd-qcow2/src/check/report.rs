//! What a check finds.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

/// What was found in an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What is wrong: writing to the image may destroy data, or data cannot be read.
    pub errors: u64,
    /// Clusters that are counted more often than they are used: room that is lost, and nothing else.
    pub leaks: u64,
    /// How many there are of each kind.
    pub classes: BTreeMap<Class, u64>,
    /// What was found, in the order in which it was found; [`super::Options::kept`] of each
    /// kind.
    pub findings: Vec<Finding>,
    /// What is as it may be and still worth a word.
    pub notes: Vec<String>,
    /// Whether a table could not be followed, so that something may be in use that nothing was found to use.
    pub incomplete: bool,
    /// Guest clusters of the active disk that have a place in a file.
    pub allocated: u64,
    /// Guest clusters of the active disk.
    pub total: u64,
    /// Compressed ones among those that have a place.
    pub compressed: u64,
    /// The end of the last cluster in use, in bytes.
    pub image_end: u64,
    #[serde(skip)]
    kept: usize,
    /// Findings of each kind that are kept.
    #[serde(skip)]
    kept_of: BTreeMap<Class, usize>,
}

/// What kind of thing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// A count is higher than its cluster is used.
    Leak,
    /// A count is lower than its cluster is used.
    Refcount,
    /// The flag that says whether a cluster is used exactly once is wrong.
    Copied,
    /// Two things are in one place.
    Overlap,
    /// An entry of a table is malformed.
    Entry,
    /// Something is behind the end of the file.
    BeyondEnd,
    /// The snapshot table is malformed.
    Snapshot,
    /// The bitmaps are malformed.
    Bitmap,
    /// The header contradicts itself.
    Header,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind of thing it is.
    pub class: Class,
    /// The structure, such as "the L1 table" or "clusters 5 to 9".
    pub place: String,
    /// What is wrong with it.
    pub reason: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.reason)
    }
}

/// Notes that are kept.
const NOTES: usize = 100;

impl Report {
    pub(super) fn new(kept: usize) -> Self {
        Report { kept, ..Report::default() }
    }

    /// Whether nothing is wrong and nothing leaks.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.leaks == 0
    }

    /// Whether something of a kind was found.
    pub fn has(&self, class: Class) -> bool {
        self.classes.contains_key(&class)
    }

    /// Adds `count` of the same kind. The text is made only where it is kept.
    pub(super) fn add(&mut self, class: Class, count: u64, text: impl FnOnce() -> (String, String)) {
        let counter = if class == Class::Leak { &mut self.leaks } else { &mut self.errors };
        *counter = counter.saturating_add(count);
        let counter = self.classes.entry(class).or_insert(0);
        *counter = counter.saturating_add(count);
        // One kind must not hide the others.
        let kept = self.kept_of.entry(class).or_insert(0);
        if *kept < self.kept {
            *kept += 1;
            let (place, reason) = text();
            self.findings.push(Finding { class, place, reason });
        }
    }

    pub(super) fn note(&mut self, note: impl Into<String>) {
        if self.notes.len() < NOTES {
            self.notes.push(note.into());
        }
    }
}
