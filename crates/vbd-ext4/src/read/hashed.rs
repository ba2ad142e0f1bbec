//! A name found by its hash ("Hash Tree Directories"). Where anything is not as it should be the tree says nothing: the directory
//! is read from front to end then, which needs no tree, and tells what is wrong.

use std::sync::Arc;

use zerocopy::FromBytes;

use super::inode::Inode;
use super::{DirEntry, Filesystem, Place};
use crate::format::FileType;
use crate::format::directory::{
    self, CountLimit, EntryHeader, HEADER, HashEntry, NODE_COUNT, ROOT_COUNT, ROOT_INFO, RootInfo,
};
use crate::format::hash::Hasher;
use crate::format::inode::flags;
use crate::format::superblock::{self, incompat};

/// Bytes of an entry of a node.
const ENTRY: usize = size_of::<HashEntry>();
/// The bits of a child's number that are one.
const CHILD: u32 = 0x0fff_ffff;
/// Levels below the root, with large directories.
const LEVELS: u8 = 2;
/// Leaves that names of one hash are looked for in.
const MOST_LEAVES: usize = 1 << 10;

/// What a tree says of a name.
pub(super) enum Hashed {
    /// The entry.
    Found(DirEntry),
    /// No entry has it.
    Absent,
    /// There is no tree, or it is damaged.
    Unknown,
}

/// A node on the way to a leaf.
struct Node {
    bytes: Arc<[u8]>,
    /// Where its count is.
    at: usize,
    count: usize,
    /// The entry that leads on.
    index: usize,
}

impl Node {
    /// A node, and its entry for a hash.
    fn new(bytes: Arc<[u8]>, at: usize, hash: u32) -> Option<Node> {
        let numbers = CountLimit::read_from_prefix(bytes.get(at..)?).ok()?.0;
        let count = usize::from(numbers.count.get());
        if count == 0 || numbers.count > numbers.limit || at + count * ENTRY > bytes.len() {
            return None;
        }
        let mut node = Node { bytes, at, count, index: 0 };
        // The first one is for all hashes below the second; its own is the count.
        let (mut low, mut high) = (1, count);
        while low < high {
            let middle = low.midpoint(high);
            if node.entry(middle)?.hash.get() <= hash { low = middle + 1 } else { high = middle }
        }
        node.index = low - 1;
        Some(node)
    }

    fn entry(&self, index: usize) -> Option<HashEntry> {
        HashEntry::read_from_prefix(self.bytes.get(self.at + index * ENTRY..)?).ok().map(|(entry, _)| entry)
    }

    fn child(&self) -> Option<u64> {
        Some(u64::from(self.entry(self.index)?.block.get() & CHILD))
    }
}

impl Filesystem {
    /// The entry of that name, as the tree of a hashed directory has it.
    pub(super) fn find_hashed(&self, directory: &Inode, name: &[u8]) -> Hashed {
        self.walk_hashed(directory, name).unwrap_or(Hashed::Unknown)
    }

    fn walk_hashed(&self, directory: &Inode, name: &[u8]) -> Option<Hashed> {
        let other = flags::INLINE_DATA | flags::ENCRYPT | flags::CASEFOLD;
        if !directory.has(flags::INDEX) || directory.has(other) {
            return None;
        }
        let root = self.directory_block(directory, 0)?;
        let info = RootInfo::read_from_prefix(root.get(ROOT_INFO..)?).ok()?.0;
        let superblock = &self.geometry.superblock;
        let unsigned = superblock.flags.get() & superblock::flags::UNSIGNED_HASH != 0;
        let seed = superblock.hash_seed.map(zerocopy::little_endian::U32::get);
        let hash = Hasher::new(info.hash_version, unsigned, seed)?.hash(name).major;
        if info.length != 8 || info.flags & 1 != 0 || info.indirect_levels > LEVELS {
            return None;
        }
        let depth = usize::from(info.indirect_levels) + 1;
        let mut path = vec![Node::new(root, ROOT_COUNT, hash)?];
        for _ in 0..MOST_LEAVES {
            while path.len() < depth {
                let bytes = self.directory_block(directory, path.last()?.child()?)?;
                path.push(Node::new(bytes, NODE_COUNT, hash)?);
            }
            // A node in the place of a leaf has no names, which says nothing.
            let child = path.last()?.child().filter(|child| *child != 0)?;
            let leaf = self.directory_block(directory, child).filter(|leaf| !self.is_one_unused(leaf))?;
            if let Some(entry) = self.find_in_leaf(&leaf, name)? {
                return Some(Hashed::Found(entry));
            }
            // Names of one hash may go on in the next leaf.
            while path.last().is_some_and(|node| node.index + 1 >= node.count) {
                path.pop();
            }
            let Some(node) = path.last_mut() else { return Some(Hashed::Absent) };
            node.index += 1;
            if node.entry(node.index)?.hash.get() != hash | 1 {
                return Some(Hashed::Absent);
            }
        }
        None
    }

    /// Whether a block is one entry that is not in use, as nodes of the tree are.
    fn is_one_unused(&self, block: &[u8]) -> bool {
        EntryHeader::read_from_prefix(block).is_ok_and(|(header, _)| {
            let record = directory::record_length(header.record.get(), self.geometry.block_size);
            header.inode.get() == 0 && record == self.geometry.block_size
        })
    }

    /// Looks for a name in a block of entries; nothing where it is not one of entries.
    fn find_in_leaf(&self, block: &[u8], name: &[u8]) -> Option<Option<DirEntry>> {
        let with_type = self.geometry.superblock.has_incompat(incompat::FILETYPE);
        let mut at = 0;
        while at < block.len() {
            let header = EntryHeader::read_from_prefix(&block[at..]).ok()?.0;
            let record = directory::record_length(header.record.get(), self.geometry.block_size) as usize;
            let length = usize::from(header.name_length);
            let used = header.inode.get() != 0;
            if record < HEADER
                || !record.is_multiple_of(4)
                || record > block.len() - at
                || used && record < directory::needed(length.max(1))
            {
                return None;
            }
            if used && &block[at + HEADER..at + HEADER + length] == name {
                let file_type = FileType::from_code(header.file_type).filter(|_| with_type);
                return Some(Some(DirEntry { name: name.to_vec(), inode: header.inode.get(), file_type }));
            }
            at += record;
        }
        Some(None)
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
