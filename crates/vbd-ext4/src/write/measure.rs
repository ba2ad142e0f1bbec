//! How much room things take, before they are written.

use super::directory;
use super::error::Result;
use super::layout::Layout;
use super::run::Run;
use super::xattrs;
use crate::format::Xattr;
use crate::format::extent::{self, MAX_LENGTH, ROOT_ENTRIES};

/// Blocks of a directory with these names (without `.` and `..`) in a filesystem like this, the blocks of its own extent tree
/// included when it lies in one piece.
pub fn directory_blocks<'a>(layout: &Layout, names: impl IntoIterator<Item = &'a [u8]>) -> Result<u64> {
    let blocks = directory::blocks(layout, names)?;
    Ok(blocks + extent_blocks(layout, blocks.div_ceil(u64::from(MAX_LENGTH))))
}

/// As [`directory_blocks`], quickly, and perhaps some more; nothing where it cannot be told.
pub fn directory_blocks_at_most<'a>(
    layout: &Layout,
    names: impl IntoIterator<Item = &'a [u8]>,
) -> Option<u64> {
    let blocks = directory::blocks_at_most(layout, names)?;
    Some(blocks + extent_blocks(layout, blocks.div_ceil(u64::from(MAX_LENGTH))))
}

/// Blocks of an extent tree with so many extents, each of at most 32768 blocks.
pub fn extent_blocks(layout: &Layout, extents: u64) -> u64 {
    tree_blocks(extents, layout.block_size())
}

/// Blocks that an entry with these attributes has for them: 0 where they fit into its inode, else 1, which entries with the
/// same ones may share. Fails where they cannot be kept.
pub fn xattr_blocks(layout: &Layout, xattrs: &[Xattr]) -> Result<u64> {
    Ok(u64::from(xattrs::split(xattrs, layout.block_size())?.needs_block()))
}

/// Extents that runs become.
pub(crate) fn pieces(runs: &[Run]) -> u64 {
    runs.iter().map(|run| run.length.div_ceil(u64::from(MAX_LENGTH))).sum()
}

/// Blocks of an extent tree.
pub(crate) fn tree_blocks(extents: u64, block_size: u32) -> u64 {
    let in_block = u64::from(extent::entries_in_block(block_size));
    let (mut nodes, mut all) = (extents, 0);
    while nodes > u64::from(ROOT_ENTRIES) {
        nodes = nodes.div_ceil(in_block);
        all += nodes;
    }
    all
}
