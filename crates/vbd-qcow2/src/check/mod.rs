//! Whether everything in an image fits together, and its repair.
//!
//! A check counts how often each cluster is used, by all tables that the header leads to, and compares that with the
//! counts that the image holds. It also finds what cannot be read, what lies over something else, and what is behind the
//! end of the file. It writes nothing.
//!
//! Memory: [`Options::memory`] for the counts, whatever the image's size: an image that needs more is looked at several
//! times, a window of the file each time. Beside that a refcount table (8 MiB at most), an L1 table's entries, and
//! 64 MiB of refcount blocks.
//!
//! [`mod@repair`] says how what was found is mended.

mod compare;
mod counts;
mod flags;
pub mod fuzz;
mod image;
mod rebuild;
mod repair;
mod report;
mod stored;
mod walk;

pub use repair::{Repair, Repaired, repair};
pub use report::{Class, Finding, Report};

use std::collections::BTreeSet;

use crate::format;
use crate::storage::{Source, Storage};
use compare::Differences;
use counts::Counts;
use image::Image;
use stored::Stored;
use walk::{Walk, Walked};

/// Results of a check.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an image could not be looked at to the end. What is wrong with it is no error, but in the report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The header is malformed, or says that nobody here knows the image.
    #[error(transparent)]
    Format(#[from] format::Error),
    /// The file could not be read or written.
    #[error("cannot {doing}: {error}")]
    Io {
        /// What failed.
        doing: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// A repair cannot be done.
    #[error("{0}")]
    Impossible(String),
}

/// How a check is done.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Memory for the counts, in bytes.
    pub memory: usize,
    /// Findings of each kind that are kept; the others are counted.
    pub kept: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options { memory: 256 << 20, kept: 100 }
    }
}

/// Looks at all of an image.
///
/// # Errors
///
/// It is no qcow2 image, its header is malformed, it uses features that are not known here, or it cannot be read.
pub fn check<S: Source + ?Sized>(source: &S, options: &Options) -> Result<Report> {
    let mut report = Report::new(options.kept);
    let image = Image::open(source, &mut report)?;
    look(&image, options, &mut report)?;
    Ok(report)
}

/// Makes a new refcount structure with room for more, for an image that nothing is wrong with.
pub(crate) fn rebuild_with_room<S: Storage + ?Sized>(storage: &S, options: &Options) -> Result<()> {
    let mut report = Report::new(1);
    let image = Image::open(storage, &mut report)?;
    look(&image, options, &mut report)?;
    if let Some(finding) = report.findings.first().filter(|_| !report.is_clean() || report.incomplete) {
        return Err(Error::Impossible(format!("the image has to be repaired first: {finding}")));
    }
    let room = image.refcount_table.len() as u64 + image.layout.cluster_size() / 8;
    let width = image.layout.refcount_width;
    rebuild::rebuild(&image, rebuild::Wanted { width, keep: false, room }, options, &mut Vec::new())
}

/// Makes a new refcount structure whose counts have another width, for an image that nothing is wrong with. The old one
/// leaks.
pub(crate) fn rebuild_with_width<S: Storage + ?Sized>(
    storage: &S,
    width: format::RefcountWidth,
    options: &Options,
) -> Result<()> {
    let image = Image::open(storage, &mut Report::new(1))?;
    rebuild::rebuild(&image, rebuild::Wanted { width, keep: false, room: 0 }, options, &mut Vec::new())
}

/// What a look at an image found beside its report.
#[derive(Default)]
struct Look {
    /// The refcount structure is damaged or lacks a block: a new one is needed before any count can be written.
    refcounts_damaged: bool,
    /// Clusters that are used for two things.
    overlaps: BTreeSet<u64>,
}

/// Looks at all of an image that is open.
fn look<S: Source + ?Sized>(image: &Image<'_, S>, options: &Options, report: &mut Report) -> Result<Look> {
    let mut stored = Stored::new(image);
    let mut found = Look::default();
    windows(image, options, report, Whole::default(), |counts, walked, report| {
        found.refcounts_damaged |= walked.refcounts_damaged;
        found.overlaps.append(&mut walked.overlaps);
        for (cluster, _) in counts.used(counts.window()) {
            report.image_end = report.image_end.max((cluster + 1) << image.layout.cluster_bits);
        }
        let mut differences = Differences::new(report, image.layout.cluster_bits);
        found.refcounts_damaged |= compare::compare(image, counts, &mut stored, &mut differences)?;
        Ok(())
    })?;
    flags::look(image, &mut stored, report, |_| Ok(()))?;
    report.total = image.layout.clusters(image.header.size);
    Ok(found)
}

/// What part of an image is walked through.
#[derive(Clone, Copy, Default)]
struct Whole {
    /// The first cluster that is counted; that of a chunk.
    start: u64,
    /// Whether the refcount structure is left out, since a new one is made.
    without_refcounts: bool,
}

/// Walks through an image, a window of the file at a time, and hands on the counts of each, in rising order.
fn windows<S: Source + ?Sized>(
    image: &Image<'_, S>,
    options: &Options,
    report: &mut Report,
    part: Whole,
    mut each: impl FnMut(&Counts, &mut Walked, &mut Report) -> Result<()>,
) -> Result<()> {
    let mut start = part.start;
    loop {
        let mut walk = Walk::new(image, Counts::new(start, options.memory), report, start == part.start);
        walk.without_refcounts = part.without_refcounts;
        walk.all()?;
        let end = walk.end_of_counts();
        let (counts, mut walked) = walk.finish();
        each(&counts, &mut walked, report)?;
        start = counts.window().end;
        if start >= end {
            return Ok(());
        }
    }
}
