//! Whether everything in a VHD fits together, and mending its footers.

use std::fmt;

use vbd_image::ReadAt;

use crate::format::{FOOTER_LEN, FooterPlace, FormatError, Head, MOST_BYTES, SECTOR, SizeRule, UNUSED};
use crate::storage::Storage;

/// The most problems that a report names one by one; the rest is counted.
const MOST_NAMED: usize = 100;

/// One thing that does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// The footer at the end is damaged or missing; its copy at the start is good.
    NoFooter,
    /// The copy at the start is damaged; the footer at the end is good.
    NoCopy,
    /// Both are good and differ.
    FootersDiffer,
    /// They differ in the size alone: a change of it was interrupted, and the copy at the start counts.
    HalfResized,
    /// The footer is not right behind the content: room that nothing refers to.
    Slack {
        /// Bytes between.
        bytes: u64,
    },
    /// An entry of the table names a place that cannot be: in front of the blocks, or beyond the file.
    Outside {
        /// The block.
        block: u64,
        /// Its sector.
        sector: u32,
    },
    /// Two things have the same place.
    Overlap {
        /// The block.
        block: u64,
        /// The other block, or what else.
        other: String,
    },
    /// A bitmap cannot be read.
    Bitmap {
        /// The block.
        block: u64,
        /// Why.
        error: String,
    },
    /// A name of the parent lies outside the file.
    Locator,
    /// Something about the size.
    Size(String),
}

impl Problem {
    /// Whether [`repair`] mends it.
    pub fn is_repairable(&self) -> bool {
        matches!(self, Problem::NoFooter | Problem::NoCopy | Problem::HalfResized | Problem::Slack { .. })
    }

    /// Whether content may be wrong or lost. A leak is not an error.
    pub fn is_error(&self) -> bool {
        !matches!(self, Problem::Slack { .. })
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::NoFooter => f.write_str("the footer at the end is damaged or missing; its copy is good"),
            Problem::NoCopy => f.write_str("the footer's copy at the start is damaged; the footer is good"),
            Problem::FootersDiffer => f.write_str("the footer and its copy at the start differ"),
            Problem::HalfResized => {
                f.write_str("a change of the size was interrupted: the footer has the old one")
            }
            Problem::Slack { bytes } => write!(f, "{bytes} bytes before the footer are not used by anything"),
            Problem::Outside { block, sector } => {
                write!(f, "block {block} has the place {sector} (in sectors), which is not in the file")
            }
            Problem::Overlap { block, other } => write!(f, "block {block} has the same place as {other}"),
            Problem::Bitmap { block, error } => {
                write!(f, "the bitmap of block {block} cannot be read: {error}")
            }
            Problem::Locator => f.write_str("a parent locator lies outside the file"),
            Problem::Size(what) => f.write_str(what),
        }
    }
}

/// What a check has found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The first problems.
    pub problems: Vec<Problem>,
    /// How many there are in all.
    pub count: u64,
    /// Blocks that the disk can have.
    pub blocks: u64,
    /// Blocks that have a place.
    pub placed: u64,
    /// Of these, those whose bitmaps say that not all sectors are there.
    pub partial: u64,
    /// What [`repair`] has written.
    pub repaired: Vec<String>,
}

impl Report {
    /// Nothing is wrong, and nothing is wasted.
    pub fn is_clean(&self) -> bool {
        self.count == 0
    }

    fn add(&mut self, problem: Problem) {
        self.count += 1;
        if self.problems.len() < MOST_NAMED {
            self.problems.push(problem);
        }
    }
}

/// Looks at a VHD.
///
/// # Errors
/// It is none, or so damaged that its blocks cannot be found, or it cannot be read.
pub fn check(file: &(impl Storage + ?Sized)) -> Result<Report, FormatError> {
    look(file, file.length()?)
}

/// The same on anything that can be read, of `len` bytes.
///
/// # Errors
/// Those of [`check`].
pub fn look(source: &(impl ReadAt + ?Sized), len: u64) -> Result<Report, FormatError> {
    let head = Head::read(source, len)?;
    let mut report = Report::default();
    match head.place {
        FooterPlace::Good => {}
        FooterPlace::OnlyEnd => report.add(Problem::NoCopy),
        FooterPlace::OnlyStart => report.add(Problem::NoFooter),
        FooterPlace::Differ if head.is_half_resized(source)? => report.add(Problem::HalfResized),
        FooterPlace::Differ => report.add(Problem::FootersDiffer),
    }
    let size = match head.size(SizeRule::Maker) {
        Ok(size) => size,
        Err(error) => {
            report.add(Problem::Size(error.to_string()));
            head.footer.size(SizeRule::Maker).min(MOST_BYTES)
        }
    };
    let Some(header) = &head.header else { return Ok(report) };
    let table = head.table(source)?;
    report.blocks = header.blocks(size);
    for locator in header.locators.iter().filter(|locator| locator.is_used()) {
        if locator.offset.saturating_add(u64::from(locator.length)) > len {
            report.add(Problem::Locator);
        }
    }
    let misplaced = overlaps(&head, &table);
    let is_sound = misplaced.is_empty();
    for problem in misplaced {
        report.add(problem);
    }
    let mut bits = vec![0; usize::try_from(header.bitmap_len()).unwrap_or(usize::MAX)];
    for (block, entry) in (0u64..).zip(&table).filter(|(_, entry)| **entry != UNUSED) {
        report.placed += 1;
        // Else there may be many times more bitmaps than the file has room for.
        if !is_sound {
            continue;
        }
        let at = u64::from(*entry) * SECTOR;
        let rest = size.saturating_sub(block * u64::from(header.block_size));
        let sectors = rest.min(u64::from(header.block_size)) / SECTOR;
        match source.fill_at(at, &mut bits) {
            Ok(filled) if filled == bits.len() => {
                report.partial += u64::from(!crate::live::is_full(&bits, sectors));
            }
            Ok(_) => report.add(Problem::Bitmap { block, error: "the file ends".into() }),
            Err(error) => report.add(Problem::Bitmap { block, error: error.to_string() }),
        }
    }
    let end = head.content_end(&table);
    let slack = len.saturating_sub(end + FOOTER_LEN as u64);
    if slack > 0 {
        report.add(Problem::Slack { bytes: slack });
    }
    Ok(report)
}

/// Entries that cannot be: outside the file, in front of everything, or in the same place as others. At most as many as
/// a report names, and one more.
pub(crate) fn overlaps(head: &Head, table: &[u32]) -> Vec<Problem> {
    let Some(header) = &head.header else { return Vec::new() };
    let mut problems = Vec::new();
    let room = header.bitmap_len() + u64::from(header.block_size);
    let structures = head.structures();
    let mut placed: Vec<(u64, u64)> = Vec::new();
    for (block, entry) in (0u64..).zip(table).filter(|(_, entry)| **entry != UNUSED) {
        if problems.len() > MOST_NAMED {
            return problems;
        }
        let start = u64::from(*entry) * SECTOR;
        if start + room > head.file_len {
            problems.push(Problem::Outside { block, sector: *entry });
            continue;
        }
        if let Some((name, ..)) = structures.iter().find(|(_, from, to)| start < *to && *from < start + room)
        {
            problems.push(Problem::Overlap { block, other: (*name).to_owned() });
        }
        placed.push((start, block));
    }
    placed.sort_unstable();
    for pair in placed.windows(2) {
        if problems.len() > MOST_NAMED {
            break;
        }
        if pair[1].0 < pair[0].0 + room {
            problems.push(Problem::Overlap { block: pair[1].1, other: format!("block {}", pair[0].1) });
        }
    }
    problems
}

/// Mends what can be without losing anything: a damaged footer from its good copy, and room behind the content that
/// nothing refers to is given back. The report is that of a check afterwards, and says what was written.
///
/// # Errors
/// Those of [`check`], or the file cannot be written.
pub fn repair(file: &(impl Storage + ?Sized)) -> Result<Report, FormatError> {
    let len = file.length()?;
    let before = look(file, len)?;
    let mut repaired = Vec::new();
    // Where blocks do not fit together, what nothing refers to may be what is missed.
    let fits = !before.problems.iter().any(|problem| problem.is_error() && !problem.is_repairable());
    if fits && !before.is_clean() {
        let head = Head::read(file, len)?;
        let end = head.content_end(&head.table(file)?);
        let footer = head.footer.encode();
        let wanted = end + FOOTER_LEN as u64;
        // The good one stays until the other is durable.
        if before.problems.contains(&Problem::NoCopy) {
            file.write_all_at(0, &footer)?;
            file.sync()?;
            repaired.push("the footer's copy at the start was written".to_owned());
        }
        let is_old = |problem: &Problem| matches!(problem, Problem::NoFooter | Problem::HalfResized);
        if len != wanted || before.problems.iter().any(is_old) {
            file.write_all_at(end, &footer)?;
            file.sync()?;
            repaired.push(format!("the footer was written at {end}"));
            if len > wanted {
                file.set_len(wanted)?;
                repaired.push(format!("{} bytes behind the content were given back", len - wanted));
            }
            file.sync()?;
        }
    }
    let mut report = check(file)?;
    report.repaired = repaired;
    Ok(report)
}
