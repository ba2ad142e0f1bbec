//! Hash trees of directories ("Hash Tree Directories").

use std::collections::{HashMap, HashSet};

use zerocopy::FromBytes;

use super::{Checker, Directory};
use crate::format::directory::{self, CountLimit, HashEntry, RootInfo};
use crate::format::hash::Hasher;
use crate::format::inode::flags;
use crate::format::superblock::{flags as superblock_flags, incompat};
use crate::format::{Block, Ino};
use crate::read::{Place, Result};

/// What a tree says of a directory's blocks.
pub(super) struct Index {
    hasher: Hasher,
    nodes: HashSet<u64>,
    leaves: HashMap<u64, (u32, u32)>,
}

impl Index {
    /// Whether a block is a node of the tree, the root apart.
    pub(super) fn is_node(&self, logical: u64) -> bool {
        self.nodes.contains(&logical)
    }

    /// The hashes that names in a block may have.
    pub(super) fn leaf(&mut self, logical: u64) -> Option<(u32, u32)> {
        self.leaves.get(&logical).copied()
    }

    pub(super) fn hash(&self, name: &[u8]) -> u32 {
        self.hasher.hash(name).major
    }
}

/// A node that is looked at.
struct Node {
    logical: u64,
    count_at: usize,
    levels: u8,
    low: u32,
    high: u32,
}

impl Checker<'_> {
    /// The tree of a directory. Nothing: it has one that cannot be looked at, which was said where it is wrong.
    pub(super) fn hash_tree(&mut self, ino: Ino, own: &Directory) -> Result<Option<Index>> {
        let place = Place::Directory { inode: ino, block: 0 };
        let Some(first) = physical(own, 0) else { return Ok(None) };
        let block = self.filesystem.block(first, place)?;
        let info = RootInfo::read_from_prefix(&block[directory::ROOT_INFO..]).map(|(info, _)| info);
        let Ok(info) = info else { return Ok(None) };
        let most = match self.superblock.has_incompat(incompat::LARGEDIR) {
            true => directory::MAX_INDIRECT_LARGE,
            false => directory::MAX_INDIRECT,
        };
        if info.reserved.get() != 0 || info.length != 8 || info.indirect_levels > most || info.flags & 1 != 0
        {
            self.bad(place, "it does not begin as the root of a hash tree does");
            return Ok(None);
        }
        let unsigned = self.superblock.flags.get() & superblock_flags::UNSIGNED_HASH != 0;
        let folded = own.flags & flags::CASEFOLD != 0;
        let hasher =
            Hasher::new(info.hash_version, unsigned, self.superblock.hash_seed.map(|word| word.get()));
        let Some(hasher) = hasher.filter(|_| !folded) else {
            if info.hash_version != 6 && !folded {
                self.bad(place, format!("its names are hashed in the unknown way {}", info.hash_version));
            }
            return Ok(None);
        };
        let mut index = Index { hasher, nodes: HashSet::new(), leaves: HashMap::new() };
        let levels = info.indirect_levels;
        let root = Node { logical: 0, count_at: directory::ROOT_COUNT, levels, low: 0, high: u32::MAX };
        self.hash_node(ino, own, &root, &mut index)?;
        Ok(Some(index))
    }

    fn hash_node(&mut self, ino: Ino, own: &Directory, node: &Node, index: &mut Index) -> Result<()> {
        let place = Place::Directory { inode: ino, block: node.logical };
        let Some(physical) = physical(own, node.logical) else { return Ok(()) };
        let block = self.filesystem.block(physical, place)?;
        let with_sums = self.has_sums();
        if let Some(seed) = self.numbers.seed {
            let sum = directory::hash_sum(seed.of_inode(ino, own.generation), &block, node.count_at);
            if sum.is_none() || sum != directory::stored_hash_sum(&block, node.count_at) {
                self.bad(place, "the checksum of the hash tree is wrong");
            }
        }
        if node.logical != 0 {
            // To those who do not know the tree it is one entry that is not in use.
            let record = u16::from_le_bytes([block[4], block[5]]);
            let unused = block[..4] == [0; 4]
                && directory::record_length(record, self.numbers.block_size) == self.numbers.block_size;
            if !unused {
                self.bad(place, "it is a node of the hash tree, and has entries");
            }
        }
        let Ok((counts, _)) = CountLimit::read_from_prefix(&block[node.count_at..]) else { return Ok(()) };
        let (count, limit) = (counts.count.get(), counts.limit.get());
        if limit != directory::hash_limit(self.numbers.block_size, node.count_at, with_sums)
            || count == 0
            || count > limit
        {
            self.bad(place, format!("it says that it has {count} entries of {limit}"));
            return Ok(());
        }
        let entry = |number: u16| {
            let at = node.count_at + usize::from(number) * size_of::<HashEntry>();
            HashEntry::read_from_bytes(&block[at..at + size_of::<HashEntry>()])
                .map(|e| (e.hash.get(), e.block.get()))
        };
        // The first entry's hash is the node's own; its place has the counts.
        let mut low = node.low;
        for number in 0..count {
            let Ok((_, child)) = entry(number) else { return Ok(()) };
            let next = if number + 1 < count {
                entry(number + 1).map_or(u32::MAX, |(hash, _)| hash)
            } else {
                node.high
            };
            if next < low {
                self.bad(place, format!("entry {number} of the hash tree is out of order"));
            }
            // An odd hash says that names with the even one are in both.
            let high = if next == u32::MAX {
                next
            } else if next & 1 != 0 {
                next & !1
            } else {
                next.saturating_sub(1)
            };
            // The upper bits of the number are kept for something else.
            let child = u64::from(child & 0x0fff_ffff);
            let exists = child > 0 && self::physical(own, child).is_some();
            if !exists || index.nodes.contains(&child) || index.leaves.contains_key(&child) {
                self.bad(place, format!("entry {number} leads to block {child}, which cannot be"));
            } else if node.levels == 0 {
                index.leaves.insert(child, (low & !1, high));
            } else {
                index.nodes.insert(child);
                let below = Node {
                    logical: child,
                    count_at: directory::NODE_COUNT,
                    levels: node.levels - 1,
                    low,
                    high: next,
                };
                self.hash_node(ino, own, &below, index)?;
            }
            low = next;
        }
        Ok(())
    }
}

/// Where a block of a directory is.
fn physical(own: &Directory, logical: u64) -> Option<Block> {
    let at = own.runs.partition_point(|run| run.logical <= logical).checked_sub(1)?;
    let run = own.runs[at];
    (logical < run.logical + run.length).then(|| run.physical + (logical - run.logical))
}
