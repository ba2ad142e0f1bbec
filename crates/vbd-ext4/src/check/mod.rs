//! Whether everything in a filesystem fits together: what e2fsck finds in its five passes, in filesystems as mke2fs, the
//! kernel and [`crate::write`] make them, and nothing is ever written.
//!
//! The order is: superblock and group descriptors with their backups, the journal and the orphans, inodes with their
//! blocks and extended attributes, directories with their hash trees, the tree that they make, and the bitmaps and counts
//! at last. An unclean filesystem is looked at as it will be after the journal was replayed.
//!
//! Memory: a bit for each block of the groups that hold something, and some 40 bytes for each inode in use.

mod bitmaps;
mod blocks;
mod directories;
pub mod fuzz;
mod groups;
mod hashes;
mod inodes;
mod journal;
mod quota;
mod report;
mod special;
mod superblock;
mod tree;
mod usage;
mod xattrs;

use std::collections::{BTreeMap, BTreeSet, HashMap};

pub use report::{Problem, Report};

use crate::format::superblock::{incompat, ro_compat};
use crate::format::{Block, FileType, Ino, Superblock};
use crate::read::{Error, Filesystem, Options, Result, Source};
use blocks::Run;
use usage::Usage;

/// Looks at all of a filesystem. `progress` is told of groups that were looked at, and of how many.
///
/// What is wrong with it is in the report; so is what keeps it from being looked at further, unless that is a feature.
///
/// # Errors
///
/// The source cannot be read, holds no such filesystem, or one with a feature that is not looked at here.
pub fn check(source: impl Source + 'static, progress: &mut dyn FnMut(u32, u32)) -> Result<Report> {
    look(source, progress, &mut |_, _| {})
}

/// Looks at all of a filesystem as [`check`] does, and tells in rising order which of its bytes nothing uses. Nobody is
/// told where something is wrong.
///
/// # Errors
///
/// Those of [`check`].
pub fn unused(
    source: impl Source + 'static,
    progress: &mut dyn FnMut(u32, u32),
) -> Result<(Report, Vec<std::ops::Range<u64>>)> {
    let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
    let report = look(source, progress, &mut |start, end| match ranges.last_mut() {
        Some(last) if last.end == start => last.end = end,
        _ => ranges.push(start..end),
    })?;
    if !report.is_clean() {
        ranges.clear();
    }
    Ok((report, ranges))
}

fn look(
    source: impl Source + 'static,
    progress: &mut dyn FnMut(u32, u32),
    free: &mut dyn FnMut(u64, u64),
) -> Result<Report> {
    let source: std::sync::Arc<dyn Source> = std::sync::Arc::new(source);
    let mut report = Report::default();
    // Once with all checksums, for those of the journal are looked at only while it is opened.
    let strict = Filesystem::open(source.clone(), Options { verify: true, replay: true });
    let opened = match strict {
        Ok(filesystem) => Ok(filesystem),
        Err(error @ (Error::Checksum(_) | Error::Corrupt { .. })) => {
            report.error(error)?;
            Filesystem::open(source, Options { verify: false, replay: true })
        }
        Err(error) => Err(error),
    };
    let filesystem = match opened {
        Ok(filesystem) => filesystem,
        Err(error @ (Error::Checksum(_) | Error::Corrupt { .. })) => {
            report.error(error)?;
            report.incomplete = true;
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    let superblock = filesystem.superblock();
    let unknown = [
        (superblock.has_ro_compat(ro_compat::BIGALLOC), "bigalloc"),
        (superblock.has_ro_compat(ro_compat::SHARED_BLOCKS), "shared_blocks"),
        (superblock.has_incompat(incompat::DIRDATA), "dirdata"),
    ];
    if let Some((_, feature)) = unknown.iter().find(|(has, _)| *has) {
        return Err(Error::unsupported(crate::read::Place::Superblock, *feature));
    }
    let mut checker = Checker::new(&filesystem, report);
    checker.all(progress)?;
    if checker.report.is_clean() {
        checker.free(free);
    }
    Ok(checker.report)
}

/// What is known so far.
struct Checker<'a> {
    filesystem: &'a Filesystem,
    numbers: crate::read::raw::Numbers,
    superblock: Superblock,
    report: Report,
    used: Usage,
    /// Inodes in use, by number.
    inodes: Vec<Used>,
    directories: BTreeMap<Ino, Directory>,
    /// Blocks of xattrs: what they say of how many share them, and how many do.
    xattr_blocks: HashMap<Block, (u32, u32)>,
    /// Inodes that hold values of xattrs, and how often they are named.
    values: HashMap<Ino, u32>,
    orphans: BTreeSet<Ino>,
    free_blocks: u64,
    free_inodes: u64,
    /// Blocks of extents that were claimed so far, each as often as it was.
    claimed: u64,
    counted: quota::Counted,
}

/// An inode in use.
struct Used {
    ino: Ino,
    kind: Option<FileType>,
    /// Names that it says it has.
    links: u16,
    /// Names that were found.
    found: u32,
    /// Whether names in directories do not matter: the filesystem's own, and values of xattrs.
    own: bool,
}

/// A directory.
#[derive(Default)]
struct Directory {
    /// The directory with its name; 0: none was found.
    parent: Ino,
    /// Where its `..` leads.
    above: Ino,
    flags: u32,
    generation: u32,
    size: u64,
    runs: Vec<Run>,
}

impl<'a> Checker<'a> {
    fn new(filesystem: &'a Filesystem, report: Report) -> Checker<'a> {
        let numbers = filesystem.numbers();
        Checker {
            filesystem,
            superblock: filesystem.superblock().clone(),
            used: Usage::new(&numbers),
            numbers,
            report,
            inodes: Vec::new(),
            directories: BTreeMap::new(),
            xattr_blocks: HashMap::new(),
            values: HashMap::new(),
            orphans: BTreeSet::new(),
            free_blocks: 0,
            free_inodes: 0,
            claimed: 0,
            counted: quota::Counted::default(),
        }
    }

    fn all(&mut self, progress: &mut dyn FnMut(u32, u32)) -> Result<()> {
        for note in self.filesystem.notes() {
            self.report.note(note.clone());
        }
        if self.filesystem.replayed() > 0 {
            let count = self.filesystem.replayed();
            self.report
                .note(format!("it was not unmounted: {count} transactions of its journal are to come"));
        }
        if !self.superblock() {
            // Nothing below can be found with numbers like these.
            self.report.incomplete = true;
            return Ok(());
        }
        self.groups()?;
        self.journal()?;
        self.orphans()?;
        self.inodes(progress)?;
        self.xattr_references();
        self.directories()?;
        self.tree();
        self.bitmaps()?;
        self.quotas()?;
        Ok(())
    }

    /// The bytes of blocks that nothing uses.
    fn free(&self, give: &mut dyn FnMut(u64, u64)) {
        let size = u64::from(self.numbers.block_size);
        for group in 0..self.numbers.groups {
            let (start, length) = (self.start(group), self.length(group));
            let Some(bits) = self.used.group(group) else {
                give(start * size, (start + length) * size);
                continue;
            };
            let mut from = None;
            for bit in 0..=length {
                let at = usize::try_from(bit).unwrap_or(0);
                let used = bit == length || bits[at / 8] & 1 << (at % 8) != 0;
                match (used, from) {
                    (false, None) => from = Some(bit),
                    (true, Some(first)) => {
                        give((start + first) * size, (start + bit) * size);
                        from = None;
                    }
                    _ => {}
                }
            }
        }
    }

    /// Something that is wrong.
    fn bad(&mut self, place: impl std::fmt::Display, reason: impl Into<String>) {
        self.report.add(place.to_string(), reason.into());
    }

    /// Takes an error of the reader for a problem, unless the source itself cannot be read.
    fn found<T>(&mut self, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) => self.report.error(error).map(|()| None),
        }
    }

    /// The inode in use of this number.
    fn inode(&mut self, ino: Ino) -> Option<&mut Used> {
        let at = self.inodes.binary_search_by_key(&ino, |used| used.ino).ok()?;
        self.inodes.get_mut(at)
    }

    /// Claims blocks for somebody; says so where they are somebody else's already. Whether they were free.
    fn claim(&mut self, whose: &dyn std::fmt::Display, start: Block, length: u64) -> bool {
        match self.used.claim(start, length) {
            None => true,
            Some(block) => {
                self.bad(whose, format!("block {block} belongs to something else as well"));
                false
            }
        }
    }

    fn has_sums(&self) -> bool {
        self.numbers.seed.is_some()
    }

    /// Whether group descriptors have checksums of either kind, without which nothing in them may be left for later.
    fn has_group_sums(&self) -> bool {
        self.has_sums() || self.superblock.has_ro_compat(ro_compat::GDT_CSUM)
    }
}
