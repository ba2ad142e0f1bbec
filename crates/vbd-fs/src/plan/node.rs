//! What an entry is, apart from its names.

use std::ops::Range;

use super::names::{NameId, Text};
use crate::entry::{Meta, Special, Time};

/// Bytes in a block of the filesystem that is to be made.
pub(crate) const BLOCK: u64 = 4096;

/// A node's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeId(pub(super) u32);

impl NodeId {
    /// No node's number.
    pub(super) const NONE: NodeId = NodeId(u32::MAX);

    pub(super) fn new(index: usize) -> Option<NodeId> {
        u32::try_from(index).ok().filter(|&n| n < u32::MAX).map(NodeId)
    }

    /// Its place in a table of all nodes.
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// An inode that is to be.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    /// How many names it has; of a directory one, or none when it was removed.
    pub(crate) links: u32,
    pub(super) xattrs: u32,
    pub(crate) body: Body,
}

impl Node {
    pub(crate) fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory(_))
    }
}

#[derive(Debug)]
pub(crate) enum Body {
    Directory(Directory),
    File { size: u64, data: Data },
    Symlink(Text),
    Device { kind: Special, major: u32, minor: u32 },
}

/// The head of a directory's chain of names.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    pub(super) first: Option<NameId>,
    pub(super) entries: u32,
    /// The chain is in the order of the names' bytes.
    pub(super) sorted: bool,
    /// Its own name; the root has none.
    pub(super) own: Option<NameId>,
}

/// Where a file's content is.
#[derive(Debug)]
pub(crate) enum Data {
    /// Nowhere: it is all zeros.
    Hole,
    /// Here.
    Bytes(Box<[u8]>),
    /// In a file of the source, by its number in the plan.
    Origin(u32),
    /// In blocks of the image.
    Placed(Runs),
    /// In blocks of the file that waits for the image's size.
    Spooled(Runs),
    /// In blocks from its start to its end, which are given out after all others: these bytes, and zeros.
    Reserved(Box<[u8]>),
}

impl Data {
    /// The blocks that it has, where it has some of its own.
    pub(crate) fn runs(&self) -> &[Run] {
        match self {
            Data::Placed(runs) | Data::Spooled(runs) => runs.as_slice(),
            Data::Hole | Data::Bytes(_) | Data::Origin(_) | Data::Reserved(_) => &[],
        }
    }
}

/// Blocks of a file that follow each other in the file and where they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first block's number in the file.
    pub(crate) logical: u32,
    pub(crate) count: u32,
    /// The first block's number in what holds it.
    pub(crate) block: u64,
}

impl Run {
    /// The number in the file of the block after it.
    pub(crate) fn end(&self) -> u64 {
        u64::from(self.logical) + u64::from(self.count)
    }

    /// The bytes of the file that it holds, those after the file's end included.
    pub(crate) fn bytes(&self) -> Range<u64> {
        u64::from(self.logical) * BLOCK..self.end() * BLOCK
    }
}

/// Runs in rising order. Most files have one.
#[derive(Debug)]
pub(crate) enum Runs {
    One(Run),
    Many(Box<[Run]>),
}

impl Runs {
    pub(crate) fn as_slice(&self) -> &[Run] {
        match self {
            Runs::One(run) => std::slice::from_ref(run),
            Runs::Many(runs) => runs,
        }
    }
}

impl From<&[Run]> for Runs {
    fn from(runs: &[Run]) -> Runs {
        match runs {
            [run] => Runs::One(*run),
            _ => Runs::Many(runs.into()),
        }
    }
}

/// Adds a run, as a part of the last one where it goes on there.
pub(crate) fn push_run(runs: &mut Vec<Run>, run: Run) {
    if let Some(last) = runs.last_mut()
        && last.end() == u64::from(run.logical)
        && last.block + u64::from(last.count) == run.block
        && let Some(count) = last.count.checked_add(run.count)
    {
        last.count = count;
        return;
    }
    runs.push(run);
}

/// A regular file of the source, as it was when it was found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin {
    /// The name that it was found by.
    pub(crate) name: NameId,
    pub(crate) inode: u64,
    pub(crate) ctime: Time,
    /// Bytes that it takes where it is.
    pub(crate) stored: u64,
}
