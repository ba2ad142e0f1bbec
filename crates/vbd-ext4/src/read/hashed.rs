//! A name found by its hash ("Hash Tree Directories"). Whatever is not as it should be leaves the name unfound: the directory
//! is read from front to end then, which needs no tree, and tells what is wrong.

use std::sync::Arc;

use zerocopy::FromBytes;

use super::inode::Inode;
use super::{DirEntry, Filesystem, Place};
use crate::format::directory::{CountLimit, HashEntry, NODE_COUNT, ROOT_COUNT, ROOT_INFO, RootInfo};
use crate::format::hash::Hasher;
use crate::format::inode::flags;
use crate::format::superblock;

/// Bytes of an entry of a node.
const ENTRY: usize = size_of::<HashEntry>();
/// The bits of a child's number that are one.
const CHILD: u32 = 0x0fff_ffff;
/// Levels below the root, with large directories.
const LEVELS: u8 = 2;

impl Filesystem {
    /// The entry of that name, where the tree of a hashed directory leads to it.
    pub(super) fn find_hashed(&self, directory: &Inode, name: &[u8]) -> Option<DirEntry> {
        let other = flags::INLINE_DATA | flags::ENCRYPT | flags::CASEFOLD;
        if !directory.has(flags::INDEX) || directory.has(other) {
            return None;
        }
        let mut block = self.directory_block(directory, 0)?;
        let info = RootInfo::read_from_prefix(block.get(ROOT_INFO..)?).ok()?.0;
        let superblock = &self.geometry.superblock;
        let unsigned = superblock.flags.get() & superblock::flags::UNSIGNED_HASH != 0;
        let seed = superblock.hash_seed.map(zerocopy::little_endian::U32::get);
        let hash = Hasher::new(info.hash_version, unsigned, seed)?.hash(name).major;
        if info.length != 8 || info.flags & 1 != 0 || info.indirect_levels > LEVELS {
            return None;
        }
        let mut children = children(&block, ROOT_COUNT, hash)?;
        for _ in 0..info.indirect_levels {
            block = self.directory_block(directory, *children.first()?)?;
            children = self::children(&block, NODE_COUNT, hash)?;
        }
        // Names of one hash may go on in the next leaf of the same node.
        children.into_iter().find_map(|child| {
            let leaf = self.directory_block(directory, child)?;
            let mut entries = Vec::new();
            self.parse(&leaf, Place::Directory { inode: directory.number(), block: child }, &mut entries)
                .ok()?;
            entries.into_iter().find(|entry| entry.name == name)
        })
    }

    /// A block of a directory that is there and has the right checksum.
    fn directory_block(&self, directory: &Inode, number: u64) -> Option<Arc<[u8]>> {
        let run = self.runs(directory, number, number + 1).ok()?.next()?.ok()?;
        let distance =
            number.checked_sub(run.logical).filter(|distance| *distance < run.length && !run.unwritten)?;
        let place = Place::Directory { inode: directory.number(), block: number };
        let bytes = self.blocks.metadata(run.physical + distance, place).ok()?;
        self.block_is_right(directory, number, &bytes).then_some(bytes)
    }
}

/// The child of a node that is for a hash, and those after it that the same hash goes on in.
fn children(block: &[u8], at: usize, hash: u32) -> Option<Vec<u64>> {
    let numbers = CountLimit::read_from_prefix(block.get(at..)?).ok()?.0;
    let count = usize::from(numbers.count.get());
    let entries = block.get(at..at + count * ENTRY).filter(|_| numbers.count <= numbers.limit)?;
    let entry = |index: usize| HashEntry::read_from_bytes(&entries[index * ENTRY..][..ENTRY]).ok();
    // The first one is for all hashes below the second; its own is the count.
    let (mut low, mut high) = (1, count);
    while low < high {
        let middle = low.midpoint(high);
        if entry(middle)?.hash.get() <= hash { low = middle + 1 } else { high = middle }
    }
    let more =
        (low..count).take_while(|&index| entry(index).is_some_and(|entry| entry.hash.get() == hash | 1));
    let all = std::iter::once(low - 1).chain(more).filter(|&index| index < count);
    Some(all.filter_map(entry).map(|entry| u64::from(entry.block.get() & CHILD)).collect())
}
