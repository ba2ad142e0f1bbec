//! The blocks of an inode: extent trees, and the block maps of ext2 and ext3.

use zerocopy::FromBytes;

use super::Checker;
use crate::format::extent::{self, ExtentEntry, ExtentHeader, ExtentIndex};
use crate::format::{Block, Ino};
use crate::read::{Place, Result};

/// How often all blocks of a filesystem may be claimed before no extents are looked at any more.
const MOST_CLAIMS: u64 = 4;

/// Blocks in a row, of a file and on the disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) logical: u64,
    pub(super) physical: Block,
    pub(super) length: u64,
}

/// What the blocks of an inode come to.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    /// All of them, those of its trees included.
    pub(super) count: u64,
    /// The block of the file behind the last one that is written.
    pub(super) end: u64,
    /// Where they are; kept for directories and the like.
    pub(super) runs: Vec<Run>,
    /// Whether any is allocated and not written.
    pub(super) unwritten: bool,
    /// Whether something is wrong, so that counts mean nothing.
    pub(super) failed: bool,
    keep: bool,
}

impl Blocks {
    /// `keep`: whether the runs are wanted.
    pub(super) fn new(keep: bool) -> Blocks {
        Blocks { keep, ..Blocks::default() }
    }

    fn add(&mut self, logical: u64, physical: Block, length: u64) {
        self.count += length;
        if !self.keep {
            return;
        }
        match self.runs.last_mut() {
            Some(last)
                if last.logical + last.length == logical && last.physical + last.length == physical =>
            {
                last.length += length;
            }
            _ => self.runs.push(Run { logical, physical, length }),
        }
    }
}

/// A node of an extent tree.
struct Node<'a> {
    bytes: &'a [u8],
    place: Place,
    /// Below the root: the depth it has to have.
    depth: Option<u16>,
    /// The logical blocks that may be in it.
    from: u64,
    end: u64,
}

impl Checker<'_> {
    /// The extents of an inode.
    pub(super) fn extents(
        &mut self,
        ino: Ino,
        generation: u32,
        root: &[u8; 60],
        blocks: &mut Blocks,
    ) -> Result<()> {
        let place = Place::Extents { inode: ino, block: 0 };
        self.node(ino, generation, &Node { bytes: root, place, depth: None, from: 0, end: 1 << 32 }, blocks)
    }

    fn node(&mut self, ino: Ino, generation: u32, node: &Node<'_>, blocks: &mut Blocks) -> Result<()> {
        let mut fail = |checker: &mut Self, reason: String| {
            blocks.failed = true;
            checker.bad(node.place, reason);
            Ok(())
        };
        let Ok((header, _)) = ExtentHeader::read_from_prefix(node.bytes) else {
            return fail(self, "it is too short".to_owned());
        };
        if header.magic.get() != extent::MAGIC {
            return fail(self, format!("it begins with {:#x}", header.magic.get()));
        }
        let (entries, max, depth) = (header.entries.get(), header.max.get(), header.depth.get());
        let room = node.bytes.len() / extent::ENTRY - 1;
        if entries > max || usize::from(max) > room || max == 0 || node.depth.is_some() && entries == 0 {
            return fail(self, format!("it says it has {entries} entries of {max}"));
        }
        if node.depth.map_or(depth > extent::MAX_DEPTH, |wanted| wanted != depth) {
            return fail(self, format!("its depth is {depth}"));
        }
        if let (Some(seed), Some(_)) = (self.numbers.seed, node.depth) {
            let stored = extent::tail(node.bytes).and_then(|at| node.bytes.get(at..at + 4)?.try_into().ok());
            if extent::sum(seed.of_inode(ino, generation), node.bytes) != stored.map(u32::from_le_bytes) {
                self.bad(node.place, "the checksum is wrong");
            }
        }
        let entry = |number: u16| &node.bytes[extent::ENTRY * (usize::from(number) + 1)..][..extent::ENTRY];
        let logical = |number: u16| {
            let word = entry(number);
            u64::from(u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        };
        let mut from = node.from;
        if node.depth.is_some() && logical(0) != node.from {
            self.bad(node.place, "it does not begin where the node above says");
            blocks.failed = true;
        }
        for number in 0..entries {
            let end = if number + 1 < entries { logical(number + 1) } else { node.end };
            if logical(number) < from || logical(number) >= end {
                self.bad(node.place, format!("entry {number} is out of order"));
                blocks.failed = true;
                continue;
            }
            if depth == 0 {
                let Ok(found) = ExtentEntry::read_from_bytes(entry(number)) else { continue };
                from = self.extent(node, &found, end, blocks);
            } else {
                let Ok(index) = ExtentIndex::read_from_bytes(entry(number)) else { continue };
                from = logical(number) + 1;
                self.below(ino, generation, (node, depth), (&index, end), blocks)?;
            }
        }
        Ok(())
    }

    /// Takes an extent; where the next one may begin.
    fn extent(&mut self, node: &Node<'_>, entry: &ExtentEntry, end: u64, blocks: &mut Blocks) -> u64 {
        let found = entry.extent();
        let (logical, length) = (u64::from(found.logical), u64::from(found.length));
        if length == 0 || logical + length > end || !self.used.exist(found.physical, length) {
            let physical = found.physical;
            self.bad(node.place, format!("{length} blocks from {logical} on at block {physical} cannot be"));
            blocks.failed = true;
            return logical + 1;
        }
        // Extents of a few bytes may name the same blocks again and again: that work has an end.
        self.claimed = self.claimed.saturating_add(length);
        if self.claimed > self.numbers.blocks.saturating_mul(MOST_CLAIMS) {
            if !self.report.incomplete {
                self.report.incomplete = true;
                self.bad(node.place, "so much belongs to several files that the rest was not looked at");
            }
            blocks.failed = true;
            return logical + length;
        }
        self.claim(&node.place, found.physical, length);
        blocks.add(logical, found.physical, length);
        if found.unwritten {
            blocks.unwritten = true;
        } else {
            blocks.end = logical + length;
        }
        logical + length
    }

    fn below(
        &mut self,
        ino: Ino,
        generation: u32,
        (node, depth): (&Node<'_>, u16),
        (index, end): (&ExtentIndex, u64),
        blocks: &mut Blocks,
    ) -> Result<()> {
        let child = index.child();
        if !self.used.exist(child, 1) {
            self.bad(node.place, format!("a node is said to be in block {child}"));
            blocks.failed = true;
            return Ok(());
        }
        let place = Place::Extents { inode: ino, block: child };
        // A node that is somebody else's may be one that leads here.
        if !self.claim(&place, child, 1) {
            blocks.failed = true;
            return Ok(());
        }
        blocks.count += 1;
        let bytes = self.filesystem.block(child, place)?;
        let from = u64::from(index.logical.get());
        self.node(ino, generation, &Node { bytes: &bytes, place, depth: Some(depth - 1), from, end }, blocks)
    }

    /// The block map of an inode.
    pub(super) fn map(&mut self, ino: Ino, root: &[u8; 60], blocks: &mut Blocks) -> Result<()> {
        let fan = u64::from(self.numbers.block_size / 4);
        let mut logical = 0;
        for number in 0..15 {
            let block = word(root, number);
            let levels = number.saturating_sub(11);
            let span = fan.pow(u32::try_from(levels).unwrap_or(0));
            if block != 0 {
                self.pointer(ino, block, levels, logical, blocks)?;
            }
            logical += span;
        }
        Ok(())
    }

    /// A block of a block map, `levels` above the data.
    fn pointer(
        &mut self,
        ino: Ino,
        block: Block,
        levels: usize,
        logical: u64,
        blocks: &mut Blocks,
    ) -> Result<()> {
        let place = Place::Indirect { inode: ino, block };
        if !self.used.exist(block, 1) {
            self.bad(Place::Inode(ino), format!("its block map names block {block}"));
            blocks.failed = true;
            return Ok(());
        }
        if levels == 0 {
            self.claim(&Place::Inode(ino), block, 1);
            blocks.add(logical, block, 1);
            blocks.end = blocks.end.max(logical + 1);
            return Ok(());
        }
        if !self.claim(&place, block, 1) {
            blocks.failed = true;
            return Ok(());
        }
        blocks.count += 1;
        let bytes = self.filesystem.block(block, place)?;
        let fan = bytes.len() / 4;
        let span = (fan as u64).pow(u32::try_from(levels - 1).unwrap_or(0));
        for number in 0..fan {
            let next = word(&bytes, number);
            if next != 0 {
                self.pointer(ino, next, levels - 1, logical + number as u64 * span, blocks)?;
            }
        }
        Ok(())
    }
}

/// A number of a block in a block map.
pub(super) fn word(bytes: &[u8], number: usize) -> Block {
    let word = &bytes[number * 4..number * 4 + 4];
    u64::from(u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
}
