//! How much room a plan takes in a filesystem.

use vbd_ext4::write::{Layout, measure};

use super::failed;
use crate::Result;
use crate::entry::Xattr;
use crate::meter::Room;
use crate::plan::{BLOCK, Body, Data, NameId, NodeId, Plan};

/// Longer targets of links have a block of their own.
const FAST_LINK: usize = 59;
/// Bytes in an inode for extended attributes: 256, less 128 of fields, 32 more of them, the number before the attributes
/// and the zeros at their end.
const XATTR_SPACE: usize = 256 - 128 - 32 - 4 - 4;

/// What a plan takes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Needs {
    /// Inodes, directories, and what else is no content. The root has its inode already.
    pub(super) own: Room,
    /// Blocks of content: where it is not placed yet, what the source stores, of which zeros will take nothing.
    pub(super) content: u64,
    /// What of that is not placed yet.
    pub(super) waiting: u64,
}

/// Counts what a plan takes in a filesystem like `layout`.
///
/// # Errors
///
/// A directory that no filesystem can have.
pub(super) fn of(plan: &Plan, layout: &Layout) -> Result<Needs> {
    count(plan, layout, |directory, children| {
        let names = children.iter().map(|&name| plan.name(name));
        let blocks = measure::directory_blocks(layout, names);
        blocks.map_err(|e| failed(&plan.directory_path(directory), e))
    })
}

/// Whether a plan has room for certain, by a quick look: where this says no, it may have.
pub(super) fn is_ample(plan: &Plan, layout: &Layout) -> bool {
    let needs = count(plan, layout, |_, children| {
        let names = children.iter().map(|&name| plan.name(name));
        Ok(measure::directory_blocks_at_most(layout, names).unwrap_or(u64::MAX / 2))
    });
    needs.is_ok_and(|needs| {
        needs.own.blocks.saturating_add(needs.content) <= layout.free_blocks()
            && needs.own.inodes <= layout.free_inodes()
    })
}

fn count(
    plan: &Plan,
    layout: &Layout,
    directory_blocks: impl Fn(NodeId, &[NameId]) -> Result<u64>,
) -> Result<Needs> {
    let mut needs = Needs::default();
    let mut seen = vec![false; plan.nodes()];
    for (directory, children) in plan.directories() {
        let blocks = directory_blocks(directory, &children)?;
        needs.own.blocks = needs.own.blocks.saturating_add(blocks);
        needs.own.blocks += xattr_blocks(plan.xattrs(directory));
        for name in children {
            let node = plan.target(name);
            if !std::mem::replace(&mut seen[node.index()], true) {
                needs.own.inodes += 1;
                node_blocks(plan, layout, node, &mut needs);
            }
        }
    }
    Ok(needs)
}

fn node_blocks(plan: &Plan, layout: &Layout, node: NodeId, needs: &mut Needs) {
    needs.own.blocks += match &plan.node(node).body {
        // Counted with its names.
        Body::Directory(_) => return,
        Body::Symlink(target) => u64::from(plan.text(*target).len() > FAST_LINK),
        Body::Device { .. } => 0,
        Body::File { size, data: Data::Reserved(_) } => {
            let blocks = size.div_ceil(BLOCK);
            blocks + measure::extent_blocks(layout, 1 + blocks / 16384)
        }
        Body::File { size, data } => {
            let blocks = match data {
                Data::Origin(origin) => plan.origin(*origin).stored.min(*size).div_ceil(BLOCK),
                Data::Bytes(bytes) => (bytes.len() as u64).div_ceil(BLOCK),
                Data::Hole | Data::Reserved(_) => 0,
                Data::Placed(runs) | Data::Spooled(runs) => {
                    runs.as_slice().iter().map(|run| u64::from(run.count)).sum()
                }
            };
            needs.content += blocks;
            needs.waiting += if matches!(data, Data::Placed(_)) { 0 } else { blocks };
            // A run is cut where a group's own blocks are in its way.
            let extents = data.runs().len().max(1) as u64 + blocks / 16384;
            measure::extent_blocks(layout, extents)
        }
    };
    needs.own.blocks += xattr_blocks(plan.xattrs(node));
}

/// One for attributes that do not fit into the inode, as if nobody had the same.
fn xattr_blocks(xattrs: &[Xattr]) -> u64 {
    let one = |(name, value): &Xattr| {
        let short = name.len().saturating_sub(5);
        16 + short.next_multiple_of(4) + value.len().next_multiple_of(4)
    };
    u64::from(xattrs.iter().map(one).sum::<usize>() > XATTR_SPACE)
}
