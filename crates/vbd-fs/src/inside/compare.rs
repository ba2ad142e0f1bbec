//! Two trees of images, compared: which entries there are, what they are, and what is in them.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::iter::Peekable;

use serde::Serialize;
use vbd_ext4::read::{self, DirEntry, FileType, Filesystem, Inode, Timestamp};

use super::walk::sorted;
use crate::Cancel;
use crate::{Error, Result};

/// Bytes that are compared at once.
const PIECE: usize = 256 << 10;

/// What is not compared.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Times of the last change.
    pub ignore_times: bool,
    /// Owners and groups.
    pub ignore_owners: bool,
    /// What the comparison stops for.
    pub cancel: Cancel,
}

/// One thing that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "difference")]
pub enum Difference {
    /// Only the first has it; for a directory, with all in it.
    Removed {
        /// What it is.
        kind: &'static str,
    },
    /// Only the second has it; for a directory, with all in it.
    Added {
        /// What it is.
        kind: &'static str,
    },
    /// Both have it, and they differ in these.
    Changed {
        /// In what they differ.
        changes: Vec<Change>,
    },
}

/// In what an entry differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Change {
    /// What of it.
    pub what: String,
    /// As the first has it; nothing where it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// As the second has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}

/// A tree: a filesystem and where in it the tree begins.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// The filesystem.
    pub filesystem: &'a Filesystem,
    /// The beginning.
    pub root: &'a Inode,
}

/// Compares two trees, and calls `found` with the path of each entry that differs, in bytewise order within each directory.
/// How many there are.
///
/// # Errors
///
/// The first entry that cannot be read, a wish to stop, or what `found` says.
pub fn compare(
    left: Side<'_>,
    right: Side<'_>,
    options: &Options,
    found: &mut dyn FnMut(&[u8], Difference) -> Result<()>,
) -> Result<u64> {
    let mut comparison = Comparison {
        sides: [left, right],
        options,
        found,
        count: 0,
        partners: [HashMap::new(), HashMap::new()],
        levels: Vec::new(),
        path: Vec::new(),
    };
    comparison.run()?;
    Ok(comparison.count)
}

/// What a kind is called.
pub fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::Regular => "file",
        FileType::Directory => "directory",
        FileType::Character => "character device",
        FileType::Block => "block device",
        FileType::Fifo => "FIFO",
        FileType::Socket => "socket",
        FileType::Symlink => "symbolic link",
    }
}

type Names = Peekable<std::vec::IntoIter<DirEntry>>;

struct Comparison<'a> {
    sides: [Side<'a>; 2],
    options: &'a Options,
    found: &'a mut dyn FnMut(&[u8], Difference) -> Result<()>,
    count: u64,
    /// Of each inode of one side the one of the other side that it was met with: names of one file have to be names of
    /// one file there.
    partners: [HashMap<u32, u32>; 2],
    /// The listings of each pair of directories on the way down, and the length of their path.
    levels: Vec<(Names, Names, usize)>,
    path: Vec<u8>,
}

impl Comparison<'_> {
    fn run(&mut self) -> Result<()> {
        let [left, right] = self.sides;
        self.pair(left.root, right.root)?;
        while let Some((left, right, length)) = self.levels.last_mut() {
            if self.options.cancel.requested() {
                return Err(Error::Stopped);
            }
            self.path.truncate(*length);
            let order = match (left.peek(), right.peek()) {
                (None, None) => {
                    self.levels.pop();
                    continue;
                }
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(left), Some(right)) => left.name.cmp(&right.name),
            };
            let left = if order == Ordering::Greater { None } else { left.next() };
            let right = if order == Ordering::Less { None } else { right.next() };
            let Some(name) = left.as_ref().or(right.as_ref()).map(|entry| entry.name.clone()) else {
                continue;
            };
            if !self.path.is_empty() {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(&name);
            let left = left.map(|entry| self.read(self.sides[0].filesystem.entry(&entry))).transpose()?;
            let right = right.map(|entry| self.read(self.sides[1].filesystem.entry(&entry))).transpose()?;
            match (left, right) {
                (Some(left), Some(right)) => self.pair(&left, &right)?,
                (Some(left), None) => {
                    self.report(Difference::Removed { kind: kind_name(left.file_type()) })?;
                }
                (None, Some(right)) => {
                    self.report(Difference::Added { kind: kind_name(right.file_type()) })?;
                }
                (None, None) => {}
            }
        }
        Ok(())
    }

    /// What went wrong in reading, with the path.
    fn read<T>(&self, result: read::Result<T>) -> Result<T> {
        result.map_err(|error| {
            let path = String::from_utf8_lossy(&self.path).replace(char::is_control, "?");
            Error::Inside(format!("/{path}: {error}"))
        })
    }

    fn report(&mut self, difference: Difference) -> Result<()> {
        self.count += 1;
        (self.found)(&self.path, difference)
    }

    /// Compares two entries of one name.
    fn pair(&mut self, left: &Inode, right: &Inode) -> Result<()> {
        let mut changes = Vec::new();
        let kinds = (left.file_type(), right.file_type());
        if kinds.0 != kinds.1 {
            changes.push(Change {
                what: "kind".to_owned(),
                from: Some(kind_name(kinds.0).to_owned()),
                to: Some(kind_name(kinds.1).to_owned()),
            });
        } else {
            self.attributes(left, right, &mut changes);
            let [xattrs_left, xattrs_right] = [self.xattrs(0, left)?, self.xattrs(1, right)?];
            xattrs(&xattrs_left, &xattrs_right, &mut changes);
            self.content(left, right, &mut changes)?;
            if kinds.0 == FileType::Directory {
                // What is in them comes after them.
                self.enter(left, right)?;
            } else {
                self.names(left, right, &mut changes);
            }
        }
        if changes.is_empty() { Ok(()) } else { self.report(Difference::Changed { changes }) }
    }

    fn enter(&mut self, left: &Inode, right: &Inode) -> Result<()> {
        for (side, inode) in [(0, left), (1, right)] {
            if self.partners[side].insert(inode.number(), 0).is_some() {
                return self.read(Err(inode.twice()));
            }
        }
        let [first, second] = self.sides;
        let left = self.read(sorted(first.filesystem, left))?;
        let right = self.read(sorted(second.filesystem, right))?;
        self.levels.push((left.into_iter().peekable(), right.into_iter().peekable(), self.path.len()));
        Ok(())
    }

    fn attributes(&self, left: &Inode, right: &Inode, changes: &mut Vec<Change>) {
        let (a, b) = (left.attributes(), right.attributes());
        let mut differ = |what: &str, from: String, to: String| {
            if from != to {
                changes.push(Change { what: what.to_owned(), from: Some(from), to: Some(to) });
            }
        };
        differ("mode", format!("{:04o}", a.mode), format!("{:04o}", b.mode));
        if !self.options.ignore_owners {
            differ("owner", a.uid.to_string(), b.uid.to_string());
            differ("group", a.gid.to_string(), b.gid.to_string());
        }
        if !self.options.ignore_times {
            let text = |time: Timestamp| format!("{}.{:09}", time.seconds, time.nanoseconds);
            differ("mtime", text(a.mtime), text(b.mtime));
        }
        let device =
            |inode: &Inode| inode.device().map_or(String::new(), |(major, minor)| format!("{major}:{minor}"));
        differ("device", device(left), device(right));
    }

    fn xattrs(&self, side: usize, inode: &Inode) -> Result<Vec<read::Xattr>> {
        self.read(self.sides[side].filesystem.xattrs(inode))
    }

    /// Names of one file have to be names of one file on the other side as well.
    fn names(&mut self, left: &Inode, right: &Inode, changes: &mut Vec<Change>) {
        if left.links() < 2 && right.links() < 2 {
            return;
        }
        let numbers = [left.number(), right.number()];
        let mut same = true;
        for (side, (own, other)) in
            [(numbers[0], numbers[1]), (numbers[1], numbers[0])].into_iter().enumerate()
        {
            same &= *self.partners[side].entry(own).or_insert(other) == other;
        }
        if !same {
            changes.push(Change { what: "hard links".to_owned(), from: None, to: None });
        }
    }

    fn content(&self, left: &Inode, right: &Inode, changes: &mut Vec<Change>) -> Result<()> {
        let [a, b] = self.sides.map(|side| side.filesystem);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match left.file_type() {
            FileType::Symlink => {
                let (from, to) = (self.read(a.read_link(left))?, self.read(b.read_link(right))?);
                if from != to {
                    let (from, to) = (Some(text(&from)), Some(text(&to)));
                    changes.push(Change { what: "target".to_owned(), from, to });
                }
            }
            FileType::Regular if left.size() != right.size() => {
                let (from, to) = (Some(left.size().to_string()), Some(right.size().to_string()));
                changes.push(Change { what: "size".to_owned(), from, to });
            }
            FileType::Regular => {
                if let Some(at) = self.first_difference(left, right)? {
                    let what = format!("content, from byte {at} on");
                    changes.push(Change { what, from: None, to: None });
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The first byte in which two files of one size differ. Where both have a hole nothing is read.
    fn first_difference(&self, left: &Inode, right: &Inode) -> Result<Option<u64>> {
        let [a, b] = self.sides.map(|side| side.filesystem);
        let mut ranges = [self.read(a.data(left, 0))?.peekable(), self.read(b.data(right, 0))?.peekable()];
        let mut buffers = [vec![0; PIECE], vec![0; PIECE]];
        let mut at = 0;
        loop {
            // The next byte that one of them has, and where what is known of both ends.
            let mut next: Option<(u64, u64)> = None;
            for ranges in &mut ranges {
                while ranges.next_if(|range| range.as_ref().is_ok_and(|range| range.end <= at)).is_some() {}
                let range = match ranges.next_if(|range| range.is_err()) {
                    Some(error) => Some(self.read(error)?),
                    None => ranges.peek().and_then(|range| range.as_ref().ok().cloned()),
                };
                if let Some(range) = range {
                    let (start, end) = (range.start.max(at), range.end);
                    next = Some(match next {
                        Some((other, other_end)) if other <= start => (other, other_end),
                        _ => (start, end),
                    });
                }
            }
            let Some((start, end)) = next else { return Ok(None) };
            if self.options.cancel.requested() {
                return Err(Error::Stopped);
            }
            let length = usize::try_from(end - start).unwrap_or(PIECE).min(PIECE);
            let [first, second] = &mut buffers;
            self.read(a.read_at(left, start, &mut first[..length]))?;
            self.read(b.read_at(right, start, &mut second[..length]))?;
            if first[..length] != second[..length] {
                let same = first.iter().zip(&*second).take_while(|(first, second)| first == second).count();
                return Ok(Some(start + same as u64));
            }
            at = start + length as u64;
        }
    }
}

fn xattrs(left: &[read::Xattr], right: &[read::Xattr], changes: &mut Vec<Change>) {
    let find = |list: &[read::Xattr], name: &[u8]| {
        list.iter().find(|(own, _)| own == name).map(|(_, value)| value.clone())
    };
    let mut names: Vec<&[u8]> = left.iter().chain(right).map(|(name, _)| &name[..]).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let (from, to) = (find(left, name), find(right, name));
        if from != to {
            let text = |value: Option<Vec<u8>>| value.map(|value| format!("{} bytes", value.len()));
            let what = format!("attribute {}", String::from_utf8_lossy(name));
            changes.push(Change { what, from: text(from), to: text(to) });
        }
    }
}
