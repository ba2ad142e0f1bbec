//! Directories: one block as it is, more of them as a tree of hashes whose leaves are sorted by hash.

use zerocopy::IntoBytes;

use super::error::{Result, WriteError};
use super::layout::Layout;
use crate::format::directory::{
    CountLimit, HEADER, HashEntry, MAX_NAME, NODE_COUNT, ROOT_COUNT, ROOT_INFO, RootInfo, TAIL, hash_limit,
    hash_seal, needed, put, seal, stored_record,
};
use crate::format::hash::{Algorithm, Hasher, NameHash};
use crate::format::{FileType, Ino};

/// An entry of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectoryEntry<'a> {
    /// Its name; not `.` or `..`.
    pub name: &'a [u8],
    /// Its inode.
    pub ino: Ino,
    /// What that is.
    pub file_type: FileType,
}

/// The parts of a leaf that stay free for entries to come: one of so many.
const SLACK: usize = 5;
/// `.` and `..` as entries.
const DOTS: usize = needed(1) + needed(2);
/// Bytes of a hash tree's entry.
const HASH_ENTRY: usize = size_of::<HashEntry>();

/// How directories of a filesystem are.
#[derive(Debug, Clone)]
pub(crate) struct Form {
    pub(crate) block_size: usize,
    pub(crate) hasher: Hasher,
    /// The number of the hash, for the tree's root.
    pub(crate) version: u8,
    /// Whether blocks end with a checksum.
    pub(crate) sums: bool,
}

/// A leaf: the entries in it, by their place in hash order, and its least hash with the bit for a collision.
struct Leaf {
    entries: std::ops::Range<usize>,
    hash: u32,
}

/// A directory's blocks before they have places.
pub(crate) struct Plan {
    /// Indices into the entries, sorted by hash; empty for a linear one.
    order: Vec<u32>,
    leaves: Vec<Leaf>,
    /// Nodes of each level between the root and the leaves, the upper one first.
    levels: Vec<usize>,
}

impl Form {
    pub(crate) fn of(layout: &Layout) -> Form {
        let mut seed = [0; 4];
        for (word, bytes) in seed.iter_mut().zip(layout.settings.hash_seed.chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        }
        Form {
            block_size: layout.block_size() as usize,
            // Signed, whatever this machine's characters are: the superblock says so.
            hasher: Hasher { algorithm: Algorithm::HalfMd4, unsigned: false, seed },
            version: 1,
            sums: true,
        }
    }

    /// Bytes of a block that entries may have.
    pub(crate) fn room(&self) -> usize {
        self.block_size - if self.sums { TAIL } else { 0 }
    }

    /// Which blocks a directory with these names has.
    pub(crate) fn plan(&self, names: &[&[u8]]) -> Result<Plan> {
        if let Some(bad) = names.iter().find(|name| !is_name(name)) {
            return Err(WriteError::Name(bad.len()));
        }
        let room = self.room();
        let all: usize = names.iter().map(|name| needed(name.len())).sum();
        if DOTS + all <= room {
            let mut sorted = names.to_vec();
            sorted.sort_unstable();
            if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(twice_error(twice[0]));
            }
            return Ok(Plan { order: Vec::new(), leaves: Vec::new(), levels: Vec::new() });
        }

        let count = u32::try_from(names.len()).map_err(|_| WriteError::DirectorySize(names.len()))?;
        let mut hashes: Vec<(NameHash, u32)> =
            names.iter().zip(0..count).map(|(name, index)| (self.hasher.hash(name), index)).collect();
        hashes.sort_unstable_by(|(one, first), (other, second)| {
            one.cmp(other).then_with(|| names[*first as usize].cmp(names[*second as usize]))
        });
        if let Some(twice) =
            hashes.windows(2).find(|pair| names[pair[0].1 as usize] == names[pair[1].1 as usize])
        {
            return Err(twice_error(names[twice[0].1 as usize]));
        }

        let full = room - room / SLACK;
        let mut leaves: Vec<Leaf> = Vec::with_capacity(all / full + 1);
        let mut used = usize::MAX / 2;
        for (at, (hash, index)) in hashes.iter().enumerate() {
            let size = needed(names[*index as usize].len());
            if used + size <= full {
                used += size;
                leaves.last_mut().expect("begun before").entries.end = at + 1;
            } else {
                let goes_on = at > 0 && hashes[at - 1].0.major == hash.major;
                leaves.push(Leaf { entries: at..at + 1, hash: hash.major | u32::from(goes_on) });
                used = size;
            }
        }
        let order = hashes.into_iter().map(|(_, index)| index).collect();
        let levels = self.levels(leaves.len()).ok_or(WriteError::DirectorySize(names.len()))?;
        Ok(Plan { order, leaves, levels })
    }

    /// Nodes of each level between the root and so many leaves.
    fn levels(&self, leaves: usize) -> Option<Vec<usize>> {
        let (root, node) = (self.limit(ROOT_COUNT), self.limit(NODE_COUNT));
        let mut levels = Vec::new();
        let mut nodes = leaves;
        while nodes > root {
            nodes = nodes.div_ceil(node);
            levels.insert(0, nodes);
        }
        (levels.len() <= 2).then_some(levels)
    }

    #[expect(clippy::cast_possible_truncation, reason = "at most 4096")]
    fn limit(&self, count_offset: usize) -> usize {
        usize::from(hash_limit(self.block_size as u32, count_offset, self.sums))
    }
}

fn twice_error(name: &[u8]) -> WriteError {
    WriteError::Twice(String::from_utf8_lossy(name).into_owned())
}

pub(crate) fn is_name(name: &[u8]) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && !name.contains(&b'/')
        && !name.contains(&0)
        && name != b"."
        && name != b".."
}

impl Plan {
    /// Blocks of the directory.
    pub(crate) fn blocks(&self) -> u64 {
        (1 + self.levels.iter().sum::<usize>() + self.leaves.len()) as u64
    }

    /// Whether it is a tree of hashes.
    pub(crate) fn is_hashed(&self) -> bool {
        !self.leaves.is_empty()
    }

    /// Whether the tree has more levels than there are without the large_dir feature.
    pub(crate) fn is_large(&self) -> bool {
        self.levels.len() > 1
    }

    /// Gives the blocks in their order, each filled.
    pub(crate) fn write(
        &self,
        form: &Form,
        ino: Ino,
        parent: Ino,
        entries: &[DirectoryEntry<'_>],
        begin: u32,
        mut give: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut block = vec![0; form.block_size];
        if !self.is_hashed() {
            let mut leaf = Filling::new(&mut block);
            leaf.add(b".", ino, FileType::Directory);
            leaf.add(b"..", parent, FileType::Directory);
            for entry in entries {
                leaf.add(entry.name, entry.ino, entry.file_type);
            }
            leaf.finish(begin, form.sums);
            return give(&block);
        }

        // Children of each level: (hash, logical block); levels lie behind one another, the leaves last.
        let mut first: usize = 1 + self.levels.iter().sum::<usize>();
        let mut children: Vec<(u32, u32)> =
            self.leaves.iter().map(|leaf| leaf.hash).zip(narrow(first)..).collect();
        let mut nodes: Vec<Vec<(u32, u32)>> = Vec::new();
        for count in self.levels.iter().rev() {
            first -= count;
            let above =
                children.chunks(form.limit(NODE_COUNT)).map(|node| node[0].0).zip(narrow(first)..).collect();
            nodes.push(std::mem::replace(&mut children, above));
        }

        put(&mut block, 0, ino, needed(1), b".", FileType::Directory.code());
        put(&mut block, needed(1), parent, form.block_size - needed(1), b"..", FileType::Directory.code());
        let info = RootInfo {
            reserved: 0.into(),
            hash_version: form.version,
            length: 8,
            indirect_levels: u8::try_from(self.levels.len()).expect("at most two"),
            flags: 0,
        };
        block[ROOT_INFO..ROOT_COUNT].copy_from_slice(info.as_bytes());
        node(&mut block, ROOT_COUNT, form, &children, begin);
        give(&block)?;
        for level in nodes.iter().rev() {
            for children in level.chunks(form.limit(NODE_COUNT)) {
                block.fill(0);
                // A false entry over the whole block.
                block[4..6].copy_from_slice(&stored_record(narrow(form.block_size)).to_le_bytes());
                node(&mut block, NODE_COUNT, form, children, begin);
                give(&block)?;
            }
        }
        for leaf in &self.leaves {
            block.fill(0);
            let mut filling = Filling::new(&mut block);
            for index in &self.order[leaf.entries.clone()] {
                let entry = &entries[*index as usize];
                filling.add(entry.name, entry.ino, entry.file_type);
            }
            filling.finish(begin, form.sums);
            give(&block)?;
        }
        Ok(())
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "blocks of a directory, which its tree has numbers of 32 bits for"
)]
fn narrow(number: usize) -> u32 {
    number as u32
}

/// Fills a node of the tree of hashes.
#[expect(clippy::cast_possible_truncation, reason = "at most what the block has room for")]
fn node(block: &mut [u8], at: usize, form: &Form, children: &[(u32, u32)], begin: u32) {
    for (room, (hash, child)) in block[at..].chunks_exact_mut(HASH_ENTRY).zip(children) {
        room.copy_from_slice(HashEntry { hash: (*hash).into(), block: (*child).into() }.as_bytes());
    }
    // In the place of the first one's hash.
    let numbers = CountLimit { limit: (form.limit(at) as u16).into(), count: (children.len() as u16).into() };
    block[at..at + size_of::<CountLimit>()].copy_from_slice(numbers.as_bytes());
    if form.sums {
        hash_seal(begin, block, at);
    }
}

/// A block of entries that is being filled.
pub(crate) struct Filling<'a> {
    block: &'a mut [u8],
    at: usize,
    last: usize,
}

impl<'a> Filling<'a> {
    /// An empty block; all zeros.
    pub(crate) fn new(block: &'a mut [u8]) -> Filling<'a> {
        Filling { block, at: 0, last: 0 }
    }

    /// Appends an entry.
    pub(crate) fn add(&mut self, name: &[u8], ino: Ino, file_type: FileType) {
        let size = needed(name.len());
        put(self.block, self.at, ino, size, name, file_type.code());
        self.last = self.at;
        self.at += size;
    }

    /// The last entry takes what is left, and the block gets its checksum.
    pub(crate) fn finish(self, begin: u32, sums: bool) {
        let room = self.block.len() - if sums { TAIL } else { 0 } - self.last;
        self.block[self.last + 4..self.last + 6].copy_from_slice(&stored_record(narrow(room)).to_le_bytes());
        if sums {
            seal(begin, self.block);
        }
    }
}

/// As [`blocks`], without a look at hashes: a few more where there is more than one.
pub(crate) fn blocks_at_most<'a>(layout: &Layout, names: impl IntoIterator<Item = &'a [u8]>) -> Option<u64> {
    let form = Form::of(layout);
    let room = form.room();
    let all: usize = names.into_iter().map(|name| needed(name.len())).sum();
    if DOTS + all <= room {
        return Some(1);
    }
    // A leaf is left when the next entry, of any length, finds no room in it.
    let filled = room - room / SLACK - needed(MAX_NAME);
    let leaves = all / filled + 1;
    let levels: usize = form.levels(leaves)?.iter().sum();
    Some((1 + levels + leaves) as u64)
}

/// Blocks of a directory with these names.
pub(crate) fn blocks<'a>(layout: &Layout, names: impl IntoIterator<Item = &'a [u8]>) -> Result<u64> {
    let names: Vec<&[u8]> = names.into_iter().collect();
    Ok(Form::of(layout).plan(&names)?.blocks())
}

const _: () = assert!(HEADER == 8 && DOTS == 24);

#[cfg(test)]
mod tests {
    use super::*;

    fn form(block_size: usize) -> Form {
        Form {
            block_size,
            hasher: Hasher { algorithm: Algorithm::HalfMd4, unsigned: false, seed: [1, 2, 3, 4] },
            version: 1,
            sums: true,
        }
    }

    #[test]
    fn levels_grow_with_the_leaves() {
        let form = form(1024);
        assert_eq!(form.levels(123), Some(vec![]));
        assert_eq!(form.levels(124), Some(vec![1]));
        assert_eq!(form.levels(123 * 126), Some(vec![123]));
        assert_eq!(form.levels(123 * 126 + 1), Some(vec![1, 124]));
        assert_eq!(form.levels(123 * 126 * 126 + 1), None);
    }

    #[test]
    fn a_quick_count_is_enough_and_not_much_more() {
        let settings = super::super::Settings::new(64 << 20);
        let layout = Layout::new(&settings).unwrap();
        for count in [0, 1, 30, 100, 101, 400, 5_000, 70_000] {
            for length in [1, 20, 255] {
                let names: Vec<String> = (0..count).map(|number| format!("{number:0length$}")).collect();
                let names = || names.iter().map(|name| &name.as_bytes()[name.len().saturating_sub(255)..]);
                let exact = blocks(&layout, names()).unwrap();
                let most = blocks_at_most(&layout, names()).unwrap();
                assert!(
                    exact <= most && most <= exact + exact / 2 + 3,
                    "{count} of {length}: {exact}, {most}"
                );
            }
        }
    }

    #[test]
    fn names_that_cannot_be_are_refused() {
        for name in [&b""[..], b".", b"..", b"a/b", b"a\0", &[b'x'; 256]] {
            assert!(matches!(form(4096).plan(&[name]), Err(WriteError::Name(_))), "{name:?}");
        }
        assert!(matches!(form(4096).plan(&[b"a", b"b", b"a"]), Err(WriteError::Twice(_))));
        let names: Vec<String> = (0..1000).map(|number| format!("name{}", number % 999)).collect();
        let names: Vec<&[u8]> = names.iter().map(|name| name.as_bytes()).collect();
        assert!(matches!(form(4096).plan(&names), Err(WriteError::Twice(_))));
        assert_eq!(form(4096).plan(&[&[b'x'; 255]]).unwrap().blocks(), 1);
    }
}
