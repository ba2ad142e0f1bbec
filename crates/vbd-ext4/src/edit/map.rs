//! Which blocks a file has, and a new map of them: an extent tree, or a block map in filesystems without extents.

use zerocopy::FromBytes;

use super::inodes::Raw;
use super::{EditError, Editor, Result};
use crate::format::extent::{ENTRY, ExtentEntry, MAGIC, MAX_DEPTH};
use crate::format::inode::flags;
use crate::format::superblock::incompat;
use crate::format::{Block, Extent, ExtentHeader, ExtentIndex};
use crate::read::Place;
use crate::write::Run;
use crate::write::tree::{self, Tree};

/// Blocks that a block map has in the inode itself.
const DIRECT: u32 = 12;

/// What an inode's map says.
#[derive(Debug, Default)]
pub(super) struct Mapped {
    /// The content, in rising order.
    pub(super) extents: Vec<Extent>,
    /// The blocks of the map itself.
    pub(super) nodes: Vec<Block>,
}

impl Editor {
    /// Everything that an inode's map says.
    pub(super) fn mapped(&self, raw: &Raw) -> Result<Mapped> {
        let mut mapped = Mapped::default();
        if raw.has(flags::EXTENTS) {
            self.extents(raw, &raw.fields.block, None, &mut mapped)?;
        } else {
            let words = |bytes: &[u8]| bytes.chunks_exact(4).map(word).collect::<Vec<u64>>();
            let root = words(&raw.fields.block);
            let mut logical = 0;
            for block in &root[..DIRECT as usize] {
                self.add(raw, &mut mapped, logical, *block)?;
                logical += 1;
            }
            for (level, block) in root[DIRECT as usize..].iter().enumerate() {
                self.indirect(raw, *block, level, &mut logical, &mut mapped)?;
            }
        }
        let mut after = 0;
        for extent in &mapped.extents {
            let begin = u64::from(extent.logical);
            if begin < after {
                let place = Place::Extents { inode: raw.ino, block: 0 };
                return Err(EditError::corrupt(place, "they overlap, or do not rise"));
            }
            after = begin + u64::from(extent.length);
        }
        Ok(mapped)
    }

    /// A node of the map: read, and noted. There are never more of them than there are blocks.
    fn node(&self, raw: &Raw, block: Block, mapped: &mut Mapped) -> Result<std::sync::Arc<[u8]>> {
        let place = Place::Extents { inode: raw.ino, block };
        let blocks = &self.filesystem.blocks;
        if !blocks.exist(block, 1) || mapped.nodes.len() as u64 >= blocks.count() {
            return Err(EditError::corrupt(place, "it is not in the filesystem"));
        }
        mapped.nodes.push(block);
        Ok(blocks.metadata(block, place)?)
    }

    fn extents(&self, raw: &Raw, node: &[u8], parent: Option<u16>, mapped: &mut Mapped) -> Result<()> {
        let place = Place::Extents { inode: raw.ino, block: 0 };
        let bad = |reason: &str| EditError::corrupt(place, reason);
        let header = ExtentHeader::read_from_prefix(node).map_err(|_| bad("a node is too short"))?.0;
        let (depth, entries) = (header.depth.get(), usize::from(header.entries.get()));
        let right = parent.map_or(depth <= MAX_DEPTH, |parent| depth + 1 == parent);
        if header.magic.get() != MAGIC || !right || (entries + 1) * ENTRY > node.len() {
            return Err(bad("a node is not one"));
        }
        for entry in node[ENTRY..].chunks_exact(ENTRY).take(entries) {
            if depth > 0 {
                let child =
                    ExtentIndex::read_from_bytes(entry).map_err(|_| bad("a node is too short"))?.child();
                let bytes = self.node(raw, child, mapped)?;
                self.extents(raw, &bytes, Some(depth), mapped)?;
                continue;
            }
            let extent =
                ExtentEntry::read_from_bytes(entry).map_err(|_| bad("a node is too short"))?.extent();
            let blocks = &self.filesystem.blocks;
            if extent.length == 0
                || !blocks.exist(extent.physical, extent.length.into())
                || mapped.extents.len() as u64 >= blocks.count()
            {
                return Err(bad("one of them is not in the filesystem"));
            }
            mapped.extents.push(extent);
        }
        Ok(())
    }

    /// Adds a block of a block map.
    fn add(&self, raw: &Raw, mapped: &mut Mapped, logical: u32, block: Block) -> Result<()> {
        if block == 0 {
            return Ok(());
        }
        if !self.filesystem.blocks.exist(block, 1)
            || mapped.extents.len() as u64 >= self.filesystem.blocks.count()
        {
            let place = Place::Indirect { inode: raw.ino, block };
            return Err(EditError::corrupt(place, "it is not in the filesystem"));
        }
        match mapped.extents.last_mut() {
            Some(last)
                if last.logical.checked_add(last.length) == Some(logical)
                    && last.physical + u64::from(last.length) == block =>
            {
                last.length += 1;
            }
            _ => mapped.extents.push(Extent { logical, physical: block, length: 1, unwritten: false }),
        }
        Ok(())
    }

    fn indirect(
        &self,
        raw: &Raw,
        block: Block,
        level: usize,
        logical: &mut u32,
        mapped: &mut Mapped,
    ) -> Result<()> {
        let fan = self.block_size() / 4;
        if block == 0 {
            let span = fan.checked_pow(u32::try_from(level).unwrap_or(2) + 1);
            *logical = logical.saturating_add(span.unwrap_or(u32::MAX));
            return Ok(());
        }
        let bytes = self.node(raw, block, mapped)?;
        for child in bytes.chunks_exact(4).map(word) {
            if level > 0 {
                self.indirect(raw, child, level - 1, logical, mapped)?;
            } else {
                self.add(raw, mapped, *logical, child)?;
                *logical = logical.saturating_add(1);
            }
        }
        Ok(())
    }

    /// Gives back all blocks of an inode's content and map, and leaves it without any.
    pub(super) fn release_content(&mut self, raw: &mut Raw) -> Result<()> {
        let mapped = self.mapped(raw)?;
        for extent in &mapped.extents {
            self.release(Run::new(extent.physical, extent.length.into()))?;
        }
        for node in &mapped.nodes {
            self.release(Run::new(*node, 1))?;
        }
        raw.fields.set_size(0);
        self.empty_map(raw)
    }

    /// An empty map, of the kind that this filesystem has.
    pub(super) fn empty_map(&mut self, raw: &mut Raw) -> Result<()> {
        raw.set_flag(flags::EXTENTS, self.superblock().has_incompat(incompat::EXTENTS));
        self.build_map(raw, &[])
    }

    /// Gives an inode these blocks instead of those that it had; the old map's own blocks are given back.
    pub(super) fn set_map(&mut self, raw: &mut Raw, old_nodes: &[Block], extents: &[Extent]) -> Result<()> {
        for node in old_nodes {
            self.release(Run::new(*node, 1))?;
        }
        self.build_map(raw, extents)
    }

    fn build_map(&mut self, raw: &mut Raw, extents: &[Extent]) -> Result<()> {
        let near = self.group_of(raw.ino);
        let end = extents.last().map_or(0, |last| u64::from(last.logical) + u64::from(last.length));
        let size = end * u64::from(self.block_size());
        let blocks: u64 = extents.iter().map(|extent| u64::from(extent.length)).sum();
        let nodes = if raw.has(flags::EXTENTS) {
            let extents = tree::normalized(extents, size, self.block_size())?;
            let begin = self
                .filesystem
                .geometry
                .seed
                .map_or(0, |seed| seed.of_inode(raw.ino, raw.fields.generation.get()));
            let Tree { root, blocks } = tree::build(&extents, begin, self.block_size(), |node| {
                let place = self.allocate_one(near)?;
                self.filesystem.blocks.stage(place, node.into());
                Ok::<_, EditError>(place)
            })?;
            raw.fields.block = root;
            blocks
        } else {
            self.build_block_map(raw, extents, near)?
        };
        let xattrs = u64::from(raw.fields.xattr_block() != 0);
        raw.fields.set_blocks(blocks + nodes + xattrs, self.block_size());
        Ok(())
    }

    /// A block map of these extents; how many blocks it has itself.
    fn build_block_map(&mut self, raw: &mut Raw, extents: &[Extent], near: u32) -> Result<u64> {
        let fan = self.block_size() / 4;
        let mut left = extents
            .iter()
            .flat_map(|extent| (extent.logical..).zip(extent.physical..).take(extent.length as usize))
            .peekable();
        let mut root = [0u32; 15];
        let narrow = |block: Block| u32::try_from(block).map_err(|_| too_far(raw.ino));
        while let Some((logical, physical)) = left.next_if(|(logical, _)| *logical < DIRECT) {
            root[logical as usize] = narrow(physical)?;
        }
        let mut first = u64::from(DIRECT);
        let mut nodes = 0;
        for level in 0..3u32 {
            let span = u64::from(fan).pow(level + 1);
            let mut node = |editor: &mut Editor, words: &[u32]| -> Result<u32> {
                let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                let place = editor.allocate_one(near)?;
                editor.filesystem.blocks.stage(place, bytes.into());
                nodes += 1;
                narrow(place)
            };
            // One node of each level is open at a time.
            if left.peek().is_some_and(|(logical, _)| u64::from(*logical) < first + span) {
                let slot = DIRECT as usize + level as usize;
                root[slot] = subtree(self, &mut left, first, level, fan, &mut node, raw.ino)?;
            }
            first += span;
        }
        if left.peek().is_some() {
            return Err(too_far(raw.ino));
        }
        drop(left);
        for (bytes, word) in raw.fields.block.chunks_exact_mut(4).zip(root) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Ok(nodes)
    }
}

fn too_far(ino: crate::format::Ino) -> EditError {
    EditError::Kind { ino, why: "cannot have blocks so far behind: its filesystem has no extents" }
}

fn word(bytes: &[u8]) -> u64 {
    u64::from(u32::from_le_bytes(bytes.try_into().expect("four bytes")))
}

/// Builds the part of a block map whose first block is `first`, from the blocks that are left; the block it is in.
fn subtree<I: Iterator<Item = (u32, Block)>>(
    editor: &mut Editor,
    left: &mut std::iter::Peekable<I>,
    first: u64,
    level: u32,
    fan: u32,
    node: &mut dyn FnMut(&mut Editor, &[u32]) -> Result<u32>,
    ino: crate::format::Ino,
) -> Result<u32> {
    let mut words = vec![0; fan as usize];
    let span = u64::from(fan).pow(level);
    for (number, word) in words.iter_mut().enumerate() {
        let begin = first + number as u64 * span;
        let Some((logical, physical)) = left.peek().copied() else { break };
        if u64::from(logical) >= begin + span {
            continue;
        }
        *word = if level == 0 {
            left.next();
            u32::try_from(physical).map_err(|_| too_far(ino))?
        } else {
            subtree(editor, left, begin, level - 1, fan, node, ino)?
        };
    }
    node(editor, &words)
}
