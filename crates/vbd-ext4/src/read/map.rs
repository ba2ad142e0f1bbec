//! Where the blocks of a file are: extent trees, and the block maps of ext2 and ext3.

use std::collections::HashSet;
use std::sync::Arc;

use zerocopy::FromBytes;

use super::inode::Inode;
use super::{Error, Filesystem, Place, Result};
use crate::format::Block;
use crate::format::extent::{self, ExtentEntry, ExtentHeader, ExtentIndex};
use crate::format::inode::flags;

/// Blocks of a file, in a row there and on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first block, counted from the file's beginning.
    pub(crate) logical: u64,
    /// How many.
    pub(crate) length: u64,
    /// The first block on the disk.
    pub(crate) physical: Block,
    /// Allocated and not written: reads as zeros.
    pub(crate) unwritten: bool,
}

/// The blocks that a file has, in rising order; what is between the runs is a hole. Ends after the first error.
pub(crate) struct Runs<'a> {
    filesystem: &'a Filesystem,
    inode: &'a Inode,
    map: Map,
    /// The first block that was not given out yet.
    from: u64,
    /// No runs from here on.
    end: u64,
    /// Blocks given out: no file has more than there are.
    given: u64,
    done: bool,
}

enum Map {
    /// The nodes from the root to the present leaf.
    Tree(Vec<Node>),
    Direct(Direct),
}

struct Node {
    bytes: Arc<[u8]>,
    place: Place,
    depth: u16,
    next: usize,
    entries: usize,
    /// What comes from here on belongs to the node's right neighbour.
    end: u64,
}

impl Filesystem {
    /// The runs of a file from that block on, up to the block `end`; the first run may begin before.
    pub(crate) fn runs<'a>(&'a self, inode: &'a Inode, from: u64, end: u64) -> Result<Runs<'a>> {
        let map = if inode.has(flags::EXTENTS) {
            let place = Place::Extents { inode: inode.number(), block: 0 };
            let mut root = Node::new(inode.fields().block.as_slice().into(), place, None, 1 << 32)?;
            root.seek(from);
            Map::Tree(vec![root])
        } else {
            Map::Direct(Direct::new(self.geometry.block_size))
        };
        Ok(Runs { filesystem: self, inode, map, from, end, given: 0, done: false })
    }

    /// The node below an entry of `parent`.
    fn child(&self, inode: &Inode, parent: &Node, index: ExtentIndex, end: u64) -> Result<Node> {
        let block = index.child();
        if !self.blocks.exist(block, 1) {
            return Err(Error::corrupt(parent.place, format!("a node is said to be in block {block}")));
        }
        let place = Place::Extents { inode: inode.number(), block };
        let bytes = self.blocks.metadata(block, place)?;
        let node = Node::new(bytes, place, Some(parent.depth), end)?;
        if self.verify
            && let Some(seed) = self.geometry.seed
        {
            let begin = seed.of_inode(inode.number(), inode.generation());
            let stored = extent::tail(&node.bytes).and_then(|at| node.bytes.get(at..at + 4)?.try_into().ok());
            if extent::sum(begin, &node.bytes) != stored.map(u32::from_le_bytes) {
                return Err(Error::Checksum(place));
            }
        }
        Ok(node)
    }
}

impl Node {
    fn new(bytes: Arc<[u8]>, place: Place, parent: Option<u16>, end: u64) -> Result<Node> {
        let bad = |reason: String| Error::corrupt(place, reason);
        let header = ExtentHeader::read_from_prefix(&bytes).map_err(|_| bad("it is too short".to_owned()))?.0;
        if header.magic.get() != extent::MAGIC {
            return Err(bad(format!("it begins with {:#x}", header.magic.get())));
        }
        let (entries, max, depth) =
            (usize::from(header.entries.get()), usize::from(header.max.get()), header.depth.get());
        if entries > max || max > bytes.len() / extent::ENTRY - 1 {
            return Err(bad(format!("it says it has {entries} entries of {max}")));
        }
        let right = match parent {
            Some(parent) => parent == depth + 1,
            None => depth <= extent::MAX_DEPTH,
        };
        if !right {
            return Err(bad(format!("its depth is {depth}")));
        }
        Ok(Node { bytes, place, depth, next: 0, entries, end })
    }

    /// The first logical block of an entry, the same place in both kinds.
    fn logical(&self, entry: usize) -> u64 {
        let at = extent::ENTRY * (entry + 1);
        self.bytes
            .get(at..at + 4)
            .map_or(0, |word| u64::from(u32::from_le_bytes([word[0], word[1], word[2], word[3]])))
    }

    fn entry<T: FromBytes>(&self, entry: usize) -> Result<T> {
        let bytes = self.bytes.get(extent::ENTRY * (entry + 1)..).unwrap_or_default();
        let read = T::read_from_prefix(bytes).map_err(|_| Error::corrupt(self.place, "it is too short"))?;
        Ok(read.0)
    }

    /// Goes to the last entry that begins at this block or before.
    fn seek(&mut self, block: u64) {
        let (mut low, mut high) = (0, self.entries);
        while low < high {
            let middle = low.midpoint(high);
            if self.logical(middle) <= block { low = middle + 1 } else { high = middle }
        }
        self.next = low.saturating_sub(1);
    }

    /// Where the entry after the one that comes next begins.
    fn bound(&self) -> Result<u64> {
        let this = self.logical(self.next);
        let end = if self.next + 1 < self.entries { self.logical(self.next + 1) } else { self.end };
        if this >= end {
            return Err(Error::corrupt(self.place, "its entries are out of order"));
        }
        Ok(end)
    }
}

impl Runs<'_> {
    fn tree(&mut self) -> Result<Option<Run>> {
        let Map::Tree(nodes) = &mut self.map else { return Ok(None) };
        loop {
            let Some(node) = nodes.last_mut() else { return Ok(None) };
            if node.next >= node.entries {
                nodes.pop();
                continue;
            }
            if node.logical(node.next) >= self.end {
                return Ok(None);
            }
            let bound = node.bound()?;
            if node.depth == 0 {
                let found = node.entry::<ExtentEntry>(node.next)?.extent();
                node.next += 1;
                let (logical, length) = (u64::from(found.logical), u64::from(found.length));
                if length == 0 || logical + length > bound {
                    let reason = format!("{length} blocks from block {logical} on do not fit between others");
                    return Err(Error::corrupt(node.place, reason));
                }
                if logical + length > self.from {
                    return Ok(Some(Run {
                        logical,
                        length,
                        physical: found.physical,
                        unwritten: found.unwritten,
                    }));
                }
                continue;
            }
            let index = node.entry::<ExtentIndex>(node.next)?;
            node.next += 1;
            let mut child = self.filesystem.child(self.inode, node, index, bound)?;
            if child.entries > 0 && child.logical(0) < u64::from(index.logical.get()) {
                return Err(Error::corrupt(child.place, "it begins before its entry in the node above"));
            }
            child.seek(self.from);
            nodes.push(child);
            // Nodes are blocks of the file as well; one that is named again and again comes to an end this way.
            self.given += 1;
            if self.given > self.filesystem.blocks.count() {
                return Err(Error::corrupt(Place::Inode(self.inode.number()), MORE));
            }
        }
    }

    fn next_run(&mut self) -> Result<Option<Run>> {
        let found = match &mut self.map {
            Map::Tree(_) => self.tree()?,
            Map::Direct(direct) => direct.next(self.filesystem, self.inode, self.from, self.end)?,
        };
        let Some(run) = found else { return Ok(None) };
        let place = Place::Inode(self.inode.number());
        if !self.filesystem.blocks.exist(run.physical, run.length) {
            let Run { length, physical, .. } = run;
            return Err(Error::corrupt(
                place,
                format!("it is said to have {length} blocks from {physical} on"),
            ));
        }
        self.given = self.given.saturating_add(run.length);
        if self.given > self.filesystem.blocks.count() {
            return Err(Error::corrupt(place, MORE));
        }
        self.from = run.logical + run.length;
        Ok(Some(run))
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<Run>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done || self.from >= self.end {
            return None;
        }
        let found = self.next_run().transpose();
        self.done = !matches!(found, Some(Ok(_)));
        found
    }
}

/// More blocks than the filesystem has mean that some are there twice.
const MORE: &str = "it has more blocks than there are";

/// The block map ("Direct/Indirect Block Addressing"): 12 numbers of blocks, and three trees of one, two and three levels.
struct Direct {
    /// Numbers in an indirect block.
    fan: u64,
    /// The indirect blocks on the way to the last block, from the uppermost one, each with the first block it is about.
    path: Vec<(Block, u64)>,
    /// All indirect blocks so far: one that is there twice could make a few of them say anything about billions of blocks.
    seen: HashSet<Block>,
}

/// The blocks that the inode itself names.
const DIRECT: u64 = 12;

impl Direct {
    fn new(block_size: u32) -> Direct {
        Direct { fan: u64::from(block_size / 4), path: Vec::new(), seen: HashSet::new() }
    }

    /// The next run from this block on: as many blocks as lie in a row.
    fn next(&mut self, filesystem: &Filesystem, inode: &Inode, from: u64, end: u64) -> Result<Option<Run>> {
        let mut at = from;
        let mut run: Option<Run> = None;
        while at < end {
            let (physical, skip) = match self.lookup(filesystem, inode, at)? {
                Some(Mapped { physical, span }) => (physical, span),
                None => break,
            };
            match (&mut run, physical) {
                (None, 0) => {}
                (None, physical) => {
                    run = Some(Run { logical: at, length: 1, physical, unwritten: false });
                }
                (Some(run), physical) if physical == run.physical + run.length => run.length += 1,
                (Some(_), _) => break,
            }
            // One read, or one piece of a file, needs no more.
            if run.is_some_and(|run| run.length >= MOST) {
                break;
            }
            at = at.saturating_add(skip);
        }
        Ok(run)
    }

    /// The number of a block, 0 for a hole, and how far the same answer reaches; nothing behind the last block.
    fn lookup(&mut self, filesystem: &Filesystem, inode: &Inode, block: u64) -> Result<Option<Mapped>> {
        let word = |bytes: &[u8], at: u64| {
            let at = usize::try_from(at * 4).unwrap_or(usize::MAX);
            let word = bytes.get(at..at.saturating_add(4)).unwrap_or(&[0; 4]);
            u64::from(u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        };
        let root = &inode.fields().block;
        if block < DIRECT {
            return Ok(Some(Mapped { physical: word(root, block), span: 1 }));
        }
        let mut within = block - DIRECT;
        let mut span = self.fan;
        for level in 0..3 {
            if within < span {
                let mut physical = word(root, DIRECT + level);
                let mut depth = 0;
                while physical != 0 && span > 1 {
                    if !filesystem.blocks.exist(physical, 1) {
                        let reason = format!("an indirect block is said to be block {physical}");
                        return Err(Error::corrupt(Place::Inode(inode.number()), reason));
                    }
                    let place = Place::Indirect { inode: inode.number(), block: physical };
                    let bytes = filesystem.blocks.metadata(physical, place)?;
                    span /= self.fan;
                    let now = (physical, block - within);
                    if self.path.get(depth) != Some(&now) {
                        self.path.truncate(depth);
                        self.path.push(now);
                        if !self.seen.insert(physical) {
                            return Err(Error::corrupt(place, "the inode has it twice"));
                        }
                    }
                    depth += 1;
                    physical = word(&bytes, within / span);
                    within %= span;
                }
                // A hole reaches to the end of the tree that is not there.
                return Ok(Some(Mapped {
                    physical,
                    span: if physical == 0 { span - within % span } else { 1 },
                }));
            }
            within -= span;
            span *= self.fan;
        }
        Ok(None)
    }
}

/// Blocks in one run at most, so that a large file is not looked through before the first is given out.
const MOST: u64 = 1 << 15;

/// What a block map says of a block.
struct Mapped {
    physical: Block,
    span: u64,
}
