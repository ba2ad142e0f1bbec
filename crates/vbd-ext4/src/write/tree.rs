//! Extent trees, from the leaves up, every node full.

use zerocopy::IntoBytes;

use super::error::{Result, WriteError};
use super::run::Run;
use crate::format::extent::{
    ENTRY, MAX_BLOCKS, MAX_LENGTH, MAX_UNWRITTEN, ROOT_ENTRIES, entries_in_block, seal,
};
use crate::format::{Block, Extent, ExtentHeader, ExtentIndex};

/// A tree's root, and how many blocks the rest of it has.
pub(crate) struct Tree {
    pub(crate) root: [u8; 60],
    pub(crate) blocks: u64,
}

/// Runs as the extents of a file that they are all of.
pub(crate) fn extents(runs: &[Run]) -> Vec<Extent> {
    let mut logical = 0;
    runs.iter()
        .map(|run| {
            let length = u32::try_from(run.length).expect("a file has at most 2^32 blocks");
            let extent = Extent { logical, physical: run.start, length, unwritten: false };
            logical += length;
            extent
        })
        .collect()
}

/// Extents as entries can have them: adjacent ones together, and none too long. Fails if they do not rise or are too far.
pub(crate) fn normalized(extents: &[Extent], size: u64, block_size: u32) -> Result<Vec<Extent>> {
    let wrong = |why| WriteError::File { size, why };
    let end = size.div_ceil(u64::from(block_size));
    if end > MAX_BLOCKS {
        return Err(wrong("a file has at most 2^32 - 1 blocks"));
    }
    let mut whole: Vec<Extent> = Vec::with_capacity(extents.len());
    let mut after = 0;
    for extent in extents {
        let begin = u64::from(extent.logical);
        if begin < after || extent.length == 0 {
            return Err(wrong("they overlap, or do not rise"));
        }
        after = begin + u64::from(extent.length);
        if after > end {
            return Err(wrong("one lies behind the end of the file"));
        }
        match whole.last_mut() {
            Some(last)
                if u64::from(last.logical) + u64::from(last.length) == begin
                    && last.physical + u64::from(last.length) == extent.physical
                    && last.unwritten == extent.unwritten =>
            {
                last.length += extent.length;
            }
            _ => whole.push(*extent),
        }
    }
    let most = |extent: &Extent| u32::from(if extent.unwritten { MAX_UNWRITTEN } else { MAX_LENGTH });
    if whole.iter().all(|extent| extent.length <= most(extent)) {
        return Ok(whole);
    }
    let pieces = whole.iter().flat_map(|extent| {
        let most = most(extent);
        (0..extent.length).step_by(most as usize).map(move |at| Extent {
            logical: extent.logical + at,
            physical: extent.physical + u64::from(at),
            length: most.min(extent.length - at),
            unwritten: extent.unwritten,
        })
    });
    Ok(pieces.collect())
}

/// An entry of a node, with the logical block that it begins at.
type Entry = (u32, [u8; ENTRY]);

/// The tree of normalized extents: `node` finds a place for each of its blocks and writes it there; their checksums begin
/// with `begin`.
pub(crate) fn build<E>(
    extents: &[Extent],
    begin: u32,
    block_size: u32,
    mut node: impl FnMut(&[u8]) -> std::result::Result<Block, E>,
) -> std::result::Result<Tree, E> {
    let bytes = |entry: &[u8]| <[u8; ENTRY]>::try_from(entry).expect("the size of an entry");
    let mut entries: Vec<Entry> =
        extents.iter().map(|extent| (extent.logical, bytes(extent.entry().as_bytes()))).collect();
    let (mut depth, mut blocks) = (0, 0);
    let in_block = entries_in_block(block_size);
    while entries.len() > usize::from(ROOT_ENTRIES) {
        let mut above: Vec<Entry> = Vec::with_capacity(entries.len().div_ceil(usize::from(in_block)));
        for children in entries.chunks(usize::from(in_block)) {
            let mut block = vec![0; block_size as usize];
            fill(&mut block, children, in_block, depth);
            seal(begin, &mut block);
            let place = node(&block)?;
            above.push((children[0].0, bytes(ExtentIndex::new(children[0].0, place).as_bytes())));
        }
        blocks += above.len() as u64;
        entries = above;
        depth += 1;
    }
    let mut root = [0; 60];
    fill(&mut root, &entries, ROOT_ENTRIES, depth);
    Ok(Tree { root, blocks })
}

fn fill(node: &mut [u8], entries: &[Entry], max: u16, depth: u16) {
    let count = u16::try_from(entries.len()).expect("at most max");
    node[..ENTRY].copy_from_slice(ExtentHeader::new(count, max, depth).as_bytes());
    for (room, (_, entry)) in node[ENTRY..].chunks_exact_mut(ENTRY).zip(entries) {
        room.copy_from_slice(entry);
    }
}
