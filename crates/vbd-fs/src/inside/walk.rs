//! A walk through a tree: a directory before what is in it, the names in bytewise order.

use std::collections::HashSet;
use std::fmt;

use vbd_ext4::read::{self, DirEntry, FileType, Filesystem, Inode};

/// An entry of the tree.
#[derive(Debug, Clone)]
pub struct Found {
    /// Relative to where the walk began, without a slash in front; empty for the beginning itself.
    pub path: Vec<u8>,
    /// How many directories are above it, 0 for where the walk began.
    pub depth: usize,
    /// What it is.
    pub inode: Inode,
}

impl Found {
    /// The last part of the path; empty for where the walk began.
    pub fn name(&self) -> &[u8] {
        self.path.rsplit(|&byte| byte == b'/').next().unwrap_or_default()
    }
}

/// What a walk comes to.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all of them are entries, and none is kept")]
pub enum Step {
    /// An entry. If it is a directory, what is in it comes next, then [`Step::Leave`].
    Enter(Found),
    /// All of the directory that was entered last, and not left, has come.
    Leave,
}

/// An entry that cannot be read. The walk goes on behind it.
#[derive(Debug)]
pub struct Trouble {
    /// Relative to where the walk began.
    pub path: Vec<u8>,
    /// What is wrong.
    pub error: read::Error,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}: {}", String::from_utf8_lossy(&self.path).replace(char::is_control, "?"), self.error)
    }
}

impl std::error::Error for Trouble {}

/// The entries of a directory without itself and the one above, in bytewise order.
///
/// # Errors
///
/// Those of reading it.
pub fn sorted(filesystem: &Filesystem, directory: &Inode) -> read::Result<Vec<DirEntry>> {
    let mut entries = Vec::new();
    for entry in filesystem.entries(directory)? {
        let entry = entry?;
        if entry.name != b"." && entry.name != b".." {
            entries.push(entry);
        }
    }
    entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

struct Level {
    entries: std::vec::IntoIter<DirEntry>,
    /// How long the path of the directory is.
    length: usize,
}

/// The walk. Its memory is that of the listings between the beginning and where it is, and a number for each directory.
pub struct Walk<'a> {
    filesystem: &'a Filesystem,
    levels: Vec<Level>,
    path: Vec<u8>,
    /// A directory that was given out, and is to be listed.
    entered: Option<Inode>,
    start: Option<Inode>,
    /// Every directory so far: one that comes again would have no end.
    seen: HashSet<u32>,
}

impl<'a> Walk<'a> {
    /// A walk from this inode on.
    pub fn new(filesystem: &'a Filesystem, start: Inode) -> Walk<'a> {
        Walk {
            filesystem,
            levels: Vec::new(),
            path: Vec::new(),
            entered: None,
            start: Some(start),
            seen: HashSet::new(),
        }
    }

    /// Passes over what is in the directory that came last. Nothing is left then, either.
    pub fn prune(&mut self) {
        self.entered = None;
    }

    fn give(&mut self, inode: Inode) -> Result<Step, Trouble> {
        if inode.file_type() == FileType::Directory {
            if !self.seen.insert(inode.number()) {
                return Err(self.trouble(inode.twice()));
            }
            self.entered = Some(inode.clone());
        }
        Ok(Step::Enter(Found { path: self.path.clone(), depth: self.levels.len(), inode }))
    }

    fn trouble(&self, error: read::Error) -> Trouble {
        Trouble { path: self.path.clone(), error }
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Step, Trouble>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(start) = self.start.take() {
            return Some(self.give(start));
        }
        if let Some(directory) = self.entered.take() {
            let listed = sorted(self.filesystem, &directory);
            let length = self.path.len();
            let (entries, trouble) = match listed {
                Ok(entries) => (entries, None),
                Err(error) => (Vec::new(), Some(self.trouble(error))),
            };
            self.levels.push(Level { entries: entries.into_iter(), length });
            if let Some(trouble) = trouble {
                return Some(Err(trouble));
            }
        }
        let level = self.levels.last_mut()?;
        self.path.truncate(level.length);
        let Some(entry) = level.entries.next() else {
            self.levels.pop();
            return Some(Ok(Step::Leave));
        };
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(&entry.name);
        Some(match self.filesystem.entry(&entry) {
            Ok(inode) => self.give(inode),
            Err(error) => Err(self.trouble(error)),
        })
    }
}
