//! Directories changed in place: an entry goes where its hash says; a full leaf is split, and a directory whose tree of
//! hashes is full is written anew ("Hash Tree Directories").

use std::sync::Arc;

use zerocopy::FromBytes;

use super::entries::{self, Found};
use super::inodes::Raw;
use super::map::Mapped;
use super::{EditError, Editor, Result};
use crate::format::directory::{
    self, CountLimit, HashEntry, NODE_COUNT, ROOT_COUNT, ROOT_INFO, RootInfo, hash_seal, hash_sum, needed,
    seal, stored_hash_sum,
};
use crate::format::hash::{Hasher, NameHash};
use crate::format::inode::flags;
use crate::format::superblock::{self, incompat};
use crate::format::{Block, Extent, FileType, Ino, ino};
use crate::read::Place;
use crate::write::directory::Filling;
use crate::write::{DirectoryEntry, Run};

/// Bytes of an entry of a node.
const HASH_ENTRY: usize = size_of::<HashEntry>();
/// The bits of a child's number that are one.
const CHILD: u32 = 0x0fff_ffff;

/// Where an entry was found.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    /// Which block of the directory.
    logical: u64,
    at: usize,
    pub(super) ino: Ino,
}

/// A node of the tree of hashes on the way to a leaf.
struct Step {
    logical: u64,
    /// Where its count is.
    at: usize,
    bytes: Arc<[u8]>,
    count: usize,
    limit: usize,
    /// The entry that leads on.
    index: usize,
}

impl Step {
    fn entry(&self, index: usize) -> HashEntry {
        let at = self.at + index * HASH_ENTRY;
        HashEntry::read_from_bytes(&self.bytes[at..at + HASH_ENTRY]).expect("checked when it was read")
    }

    fn child(&self) -> u64 {
        u64::from(self.entry(self.index).block.get() & CHILD)
    }
}

/// A directory that is being changed.
pub(super) struct Directory {
    pub(super) raw: Raw,
    mapped: Mapped,
}

impl Directory {
    fn place(&self, logical: u64) -> Place {
        Place::Directory { inode: self.raw.ino, block: logical }
    }

    /// Where a block of it is on the disk.
    fn physical(&self, logical: u64) -> Result<Block> {
        let extents = &self.mapped.extents;
        let after = extents.partition_point(|extent| u64::from(extent.logical) <= logical);
        after
            .checked_sub(1)
            .map(|number| &extents[number])
            .filter(|extent| {
                logical < u64::from(extent.logical) + u64::from(extent.length) && !extent.unwritten
            })
            .map(|extent| extent.physical + (logical - u64::from(extent.logical)))
            .ok_or_else(|| EditError::corrupt(self.place(logical), "it is missing"))
    }

    pub(super) fn is_hashed(&self) -> bool {
        self.raw.has(flags::INDEX)
    }
}

impl Editor {
    /// A directory, to change it.
    pub(super) fn directory(&self, ino: Ino) -> Result<Directory> {
        self.directory_of(self.load_to_change(ino)?)
    }

    /// A directory, whatever says that it is not to be changed.
    pub(super) fn any_directory(&self, ino: Ino) -> Result<Directory> {
        self.directory_of(self.load(ino)?)
    }

    fn directory_of(&self, raw: Raw) -> Result<Directory> {
        if !raw.is_directory() {
            return Err(EditError::Kind { ino: raw.ino, why: "is no directory" });
        }
        let mapped = self.mapped(&raw)?;
        let directory = Directory { raw, mapped };
        let size = directory.raw.fields.size();
        if size == 0
            || !size.is_multiple_of(self.block_size().into())
            || self.blocks_in(&directory) > u64::from(CHILD)
        {
            return Err(EditError::corrupt(directory.place(0), format!("it is a directory of {size} bytes")));
        }
        Ok(directory)
    }

    fn blocks_in(&self, directory: &Directory) -> u64 {
        directory.raw.fields.size() / u64::from(self.block_size())
    }

    /// What the checksums of a directory begin with.
    pub(super) fn begin(&self, raw: &Raw) -> Option<u32> {
        self.filesystem.geometry.seed.map(|seed| seed.of_inode(raw.ino, raw.fields.generation.get()))
    }

    /// Bytes of a block that entries may have.
    fn room(&self) -> usize {
        let tail = if self.filesystem.geometry.seed.is_some() { directory::TAIL } else { 0 };
        self.block_size() as usize - tail
    }

    fn block_of(&self, directory: &Directory, logical: u64) -> Result<Arc<[u8]>> {
        Ok(self.filesystem.blocks.metadata(directory.physical(logical)?, directory.place(logical))?)
    }

    /// A block of entries, its checksum verified.
    fn leaf(&self, directory: &Directory, logical: u64) -> Result<Arc<[u8]>> {
        let bytes = self.block_of(directory, logical)?;
        if let Some(begin) = self.begin(&directory.raw) {
            let node = directory.is_hashed() && self.is_node(logical, &bytes);
            let right = node
                || directory::tail(&bytes)
                    .is_some_and(|tail| tail.checksum.get() == directory::sum(begin, &bytes));
            if !right {
                return Err(EditError::Read(crate::read::Error::Checksum(directory.place(logical))));
            }
        }
        Ok(bytes)
    }

    /// Whether a block of a hashed directory is one of the tree's.
    pub(super) fn is_node(&self, logical: u64, bytes: &[u8]) -> bool {
        let record = u16::from_le_bytes([bytes[4], bytes[5]]);
        logical == 0
            || bytes[..4] == [0; 4]
                && directory::record_length(record, self.block_size()) == self.block_size()
    }

    /// Puts a block of entries back.
    fn put_leaf(&mut self, directory: &Directory, logical: u64, mut bytes: Vec<u8>) -> Result<()> {
        self.seal_leaf(directory, logical, &mut bytes);
        let physical = directory.physical(logical)?;
        self.filesystem.blocks.stage(physical, bytes.into());
        Ok(())
    }

    /// Changes a block of entries where it is.
    fn change_leaf(
        &mut self,
        directory: &Directory,
        logical: u64,
        change: impl FnOnce(&mut [u8], Place) -> Result<()>,
    ) -> Result<()> {
        let (physical, place) = (directory.physical(logical)?, directory.place(logical));
        let begin = self.begin(&directory.raw);
        let bytes = self.filesystem.blocks.change(physical, place)?;
        change(bytes, place)?;
        seal_entries(begin, directory, logical, bytes);
        Ok(())
    }

    fn seal_leaf(&self, directory: &Directory, logical: u64, bytes: &mut [u8]) {
        seal_entries(self.begin(&directory.raw), directory, logical, bytes);
    }

    /// A node of the tree.
    fn step(&self, directory: &Directory, logical: u64, hash: u32) -> Result<Step> {
        let place = directory.place(logical);
        let bytes = self.block_of(directory, logical)?;
        let at = if logical == 0 { ROOT_COUNT } else { NODE_COUNT };
        if let Some(begin) = self.begin(&directory.raw) {
            let sum = hash_sum(begin, &bytes, at);
            if sum.is_none() || sum != stored_hash_sum(&bytes, at) {
                return Err(EditError::Read(crate::read::Error::Checksum(place)));
            }
        }
        let numbers = CountLimit::read_from_prefix(&bytes[at..]).expect("a block has 1 KiB").0;
        let (count, limit) = (usize::from(numbers.count.get()), usize::from(numbers.limit.get()));
        if count == 0 || count > limit || at + limit * HASH_ENTRY > bytes.len() {
            return Err(EditError::corrupt(place, format!("it says it has {count} of {limit} hashes")));
        }
        let mut step = Step { logical, at, bytes, count, limit, index: 0 };
        // The first one is for all hashes below the second.
        let (mut low, mut high) = (1, count);
        while low < high {
            let middle = low.midpoint(high);
            if step.entry(middle).hash.get() <= hash { low = middle + 1 } else { high = middle }
        }
        step.index = low - 1;
        Ok(step)
    }

    /// The hash that a directory's tree is made with, and its levels between root and leaves.
    fn tree_info(&self, directory: &Directory) -> Result<(Hasher, usize)> {
        let bytes = self.block_of(directory, 0)?;
        let info = RootInfo::read_from_prefix(&bytes[ROOT_INFO..]).expect("a block has 1 KiB").0;
        let superblock = self.superblock();
        let unsigned = superblock.flags.get() & superblock::flags::UNSIGNED_HASH != 0;
        let seed = superblock.hash_seed.map(zerocopy::little_endian::U32::get);
        let hasher = Hasher::new(info.hash_version, unsigned, seed);
        match hasher.filter(|_| info.length == 8 && info.flags & 1 == 0 && info.indirect_levels <= 2) {
            Some(hasher) => Ok((hasher, info.indirect_levels.into())),
            None => Err(EditError::corrupt(directory.place(0), "its tree of hashes is of no known kind")),
        }
    }

    /// The way to the first leaf that may have a name.
    fn walk(&self, directory: &Directory, hash: u32, levels: usize) -> Result<Vec<Step>> {
        let mut path: Vec<Step> = Vec::with_capacity(levels + 1);
        let mut logical = 0;
        for _ in 0..=levels {
            let step = self.step(directory, logical, hash)?;
            logical = step.child();
            // No node twice: the number of levels is small, so a loop ends all the same.
            path.push(step);
        }
        Ok(path)
    }

    /// Goes to the next leaf, if names with this hash go on there.
    fn next_leaf(&self, directory: &Directory, path: &mut Vec<Step>, hash: u32) -> Result<bool> {
        let levels = path.len();
        while path.last().is_some_and(|step| step.index + 1 >= step.count) {
            path.pop();
        }
        let Some(step) = path.last_mut() else { return Ok(false) };
        step.index += 1;
        let first = step.entry(step.index).hash.get();
        if first != hash | 1 {
            return Ok(false);
        }
        while path.len() < levels {
            let child = path.last().map_or(0, Step::child);
            let mut step = self.step(directory, child, 0)?;
            step.index = 0;
            path.push(step);
        }
        Ok(true)
    }

    /// Looks for a name.
    pub(super) fn find_entry(&self, directory: &Directory, name: &[u8]) -> Result<Option<Slot>> {
        let search = |logical: u64| -> Result<Option<Slot>> {
            let bytes = self.leaf(directory, logical)?;
            let found = entries::find(&bytes, name, directory.place(logical))?;
            Ok(found.map(|(at, ino)| Slot { logical, at, ino }))
        };
        if name == b".." {
            return search(0);
        }
        if !directory.is_hashed() {
            for logical in 0..self.blocks_in(directory) {
                if let Some(slot) = search(logical)? {
                    return Ok(Some(slot));
                }
            }
            return Ok(None);
        }
        let (hasher, levels) = self.tree_info(directory)?;
        let hash = hasher.hash(name).major;
        let mut path = self.walk(directory, hash, levels)?;
        // No more leaves than there are blocks, whatever the tree says.
        for _ in 0..self.blocks_in(directory) {
            if let Some(slot) = search(path.last().map_or(0, Step::child))? {
                return Ok(Some(slot));
            }
            if !self.next_leaf(directory, &mut path, hash)? {
                break;
            }
        }
        Ok(None)
    }

    /// Adds an entry; none of that name is there.
    pub(super) fn add_entry(
        &mut self,
        directory: &mut Directory,
        name: &[u8],
        ino: Ino,
        kind: FileType,
    ) -> Result<()> {
        if directory.is_hashed() {
            return self.add_hashed(directory, name, ino, kind);
        }
        let (blocks, room) = (self.blocks_in(directory), self.room());
        for logical in 0..blocks {
            if !entries::has_room(&self.leaf(directory, logical)?, room, name, directory.place(logical))? {
                continue;
            }
            return self.change_leaf(directory, logical, |bytes, place| {
                entries::add(bytes, room, name, ino, kind.code(), place).map(drop)
            });
        }
        if blocks == 1 && self.hashes() {
            return self.rebuild(directory, name, ino, kind);
        }
        let logical = self.append(directory)?;
        let mut bytes = vec![0; self.block_size() as usize];
        let mut filling = Filling::new(&mut bytes);
        filling.add(name, ino, kind);
        let begin = self.begin(&directory.raw);
        filling.finish(begin.unwrap_or(0), begin.is_some());
        self.put_leaf(directory, logical, bytes)
    }

    /// Takes an entry away.
    pub(super) fn remove_entry(&mut self, directory: &Directory, slot: &Slot) -> Result<()> {
        self.change_leaf(directory, slot.logical, |bytes, place| entries::remove(bytes, slot.at, place))
    }

    /// Has an entry lead to another inode.
    pub(super) fn replace_entry(
        &mut self,
        directory: &Directory,
        slot: &Slot,
        ino: Ino,
        kind: FileType,
    ) -> Result<()> {
        self.change_leaf(directory, slot.logical, |bytes, _| {
            entries::replace(bytes, slot.at, ino, kind.code());
            Ok(())
        })
    }

    /// Adds a block at the end; its number in the directory.
    fn append(&mut self, directory: &mut Directory) -> Result<u64> {
        let logical = self.blocks_in(directory);
        let number = u32::try_from(logical).expect("checked when it was opened");
        let physical = self.allocate_one(self.group_of(directory.raw.ino))?;
        directory.mapped.extents.push(Extent { logical: number, physical, length: 1, unwritten: false });
        let nodes = std::mem::take(&mut directory.mapped.nodes);
        self.set_map(&mut directory.raw, &nodes, &directory.mapped.extents)?;
        directory.raw.fields.set_size((logical + 1) * u64::from(self.block_size()));
        directory.mapped = self.mapped(&directory.raw)?;
        Ok(logical)
    }

    /// Adds an entry to a hashed directory.
    fn add_hashed(&mut self, directory: &mut Directory, name: &[u8], ino: Ino, kind: FileType) -> Result<()> {
        loop {
            let (hasher, levels) = self.tree_info(directory)?;
            let path = self.walk(directory, hasher.hash(name).major, levels)?;
            let logical = path.last().map_or(0, Step::child);
            let bytes = self.leaf(directory, logical)?;
            let (place, room) = (directory.place(logical), self.room());
            if logical == 0 || self.begin(&directory.raw).is_some() && self.is_node(logical, &bytes) {
                return Err(EditError::corrupt(
                    place,
                    "the tree of hashes has a node in the place of a leaf",
                ));
            }
            if entries::has_room(&bytes, room, name, place)? {
                // It is changed where it is, unless somebody else looks at it.
                drop(bytes);
                return self.change_leaf(directory, logical, |bytes, place| {
                    entries::add(bytes, room, name, ino, kind.code(), place).map(drop)
                });
            }
            match path.iter().rposition(|step| step.count < step.limit) {
                Some(last) if last + 1 == path.len() => {
                    if self.split_leaf(directory, hasher, &path[last], name, ino, kind)? {
                        return Ok(());
                    }
                    break;
                }
                Some(last) => self.split_node(directory, &path[last], &path[last + 1])?,
                None if levels < self.most_levels() => self.add_level(directory, &path[0])?,
                None => break,
            }
        }
        self.rebuild(directory, name, ino, kind)
    }

    /// Levels that a tree can have between root and leaves.
    fn most_levels(&self) -> usize {
        let large = self.superblock().has_incompat(incompat::LARGEDIR);
        usize::from(if large { directory::MAX_INDIRECT_LARGE } else { directory::MAX_INDIRECT })
    }

    /// Puts a node of the tree back, with so many entries.
    fn put_node(
        &mut self,
        directory: &Directory,
        logical: u64,
        at: usize,
        mut bytes: Vec<u8>,
        count: usize,
    ) -> Result<()> {
        let count = u16::try_from(count).expect("a block has fewer");
        bytes[at + 2..at + 4].copy_from_slice(&count.to_le_bytes());
        if let Some(begin) = self.begin(&directory.raw) {
            hash_seal(begin, &mut bytes, at);
        }
        let physical = directory.physical(logical)?;
        self.filesystem.blocks.stage(physical, bytes.into());
        Ok(())
    }

    /// Adds a child behind the one that a step leads to; there is room for it.
    fn add_child(&mut self, directory: &Directory, step: &Step, hash: u32, child: u64) -> Result<()> {
        let mut bytes = step.bytes.to_vec();
        let from = step.at + (step.index + 1) * HASH_ENTRY;
        bytes.copy_within(from..step.at + step.count * HASH_ENTRY, from + HASH_ENTRY);
        bytes[from..from + 4].copy_from_slice(&hash.to_le_bytes());
        let child = u32::try_from(child).expect("checked when it was opened");
        bytes[from + 4..from + 8].copy_from_slice(&child.to_le_bytes());
        self.put_node(directory, step.logical, step.at, bytes, step.count + 1)
    }

    /// A new node at the end of the directory, with these entries; its number.
    fn new_node(&mut self, directory: &mut Directory, entries: &[u8]) -> Result<u64> {
        let logical = self.append(directory)?;
        let mut bytes = vec![0; self.block_size() as usize];
        // A false entry over the whole block.
        bytes[4..6].copy_from_slice(&directory::stored_record(self.block_size()).to_le_bytes());
        bytes[NODE_COUNT..NODE_COUNT + entries.len()].copy_from_slice(entries);
        let sums = self.filesystem.geometry.seed.is_some();
        let limit = directory::hash_limit(self.block_size(), NODE_COUNT, sums);
        bytes[NODE_COUNT..NODE_COUNT + 2].copy_from_slice(&limit.to_le_bytes());
        self.put_node(directory, logical, NODE_COUNT, bytes, entries.len() / HASH_ENTRY)?;
        Ok(logical)
    }

    /// Makes two nodes of a full one below a node with room.
    fn split_node(&mut self, directory: &mut Directory, parent: &Step, full: &Step) -> Result<()> {
        let half = full.count / 2;
        let hash = full.entry(half).hash.get();
        let entries = &full.bytes[full.at + half * HASH_ENTRY..full.at + full.count * HASH_ENTRY];
        let second = self.new_node(directory, entries)?;
        self.put_node(directory, full.logical, full.at, full.bytes.to_vec(), half)?;
        self.add_child(directory, parent, hash, second)
    }

    /// Puts a level between a full root and what is below it.
    fn add_level(&mut self, directory: &mut Directory, root: &Step) -> Result<()> {
        let entries = &root.bytes[root.at..root.at + root.count * HASH_ENTRY];
        let only = self.new_node(directory, entries)?;
        let mut bytes = root.bytes.to_vec();
        let levels = ROOT_INFO + std::mem::offset_of!(RootInfo, indirect_levels);
        bytes[levels] += 1;
        let child = u32::try_from(only).expect("checked when it was opened");
        bytes[root.at + 4..root.at + 8].copy_from_slice(&child.to_le_bytes());
        self.put_node(directory, 0, root.at, bytes, 1)
    }

    /// Makes two leaves of the one that a node with room leads to, and adds the entry to one of them, if all have room then.
    fn split_leaf(
        &mut self,
        directory: &mut Directory,
        hasher: Hasher,
        parent: &Step,
        name: &[u8],
        ino: Ino,
        kind: FileType,
    ) -> Result<bool> {
        let logical = parent.child();
        let bytes = self.leaf(directory, logical)?;
        let all = entries::entries(&bytes, directory.place(logical)).collect::<Result<Vec<_>>>()?;
        let new = Found { at: 0, record: 0, ino, name, code: kind.code() };
        let mut all: Vec<(NameHash, Found<'_>)> = all
            .into_iter()
            .filter(|entry| entry.ino != 0)
            .chain([new])
            .map(|entry| (hasher.hash(entry.name), entry))
            .collect();
        all.sort_by(|(one, first), (other, second)| one.cmp(other).then_with(|| first.name.cmp(second.name)));

        let sizes: Vec<usize> = all.iter().map(|(_, entry)| needed(entry.name.len())).collect();
        let (total, room) = (sizes.iter().sum::<usize>(), self.room());
        // As even as it can be.
        let mut below = 0;
        let halves = (1..all.len()).filter_map(|middle| {
            below += sizes[middle - 1];
            (below <= room && total - below <= room).then_some((below.abs_diff(total - below), middle))
        });
        let Some((_, middle)) = halves.min() else { return Ok(false) };
        let goes_on = all[middle - 1].0.major == all[middle].0.major;
        let hash = all[middle].0.major | u32::from(goes_on);

        let second = self.append(directory)?;
        self.add_child(directory, parent, hash, second)?;
        for (logical, entries) in [(logical, &all[..middle]), (second, &all[middle..])] {
            let mut block = vec![0; self.block_size() as usize];
            fill(&mut block, room, entries.iter().map(|(_, entry)| entry));
            self.put_leaf(directory, logical, block)?;
        }
        Ok(true)
    }

    /// Writes a directory anew, with one entry more, hashed.
    fn rebuild(&mut self, directory: &mut Directory, name: &[u8], ino: Ino, kind: FileType) -> Result<()> {
        let mut above = ino::ROOT;
        let mut all: Vec<(Vec<u8>, Ino, FileType)> = vec![(name.to_vec(), ino, kind)];
        for logical in 0..self.blocks_in(directory) {
            let bytes = self.leaf(directory, logical)?;
            for entry in entries::entries(&bytes, directory.place(logical)) {
                let entry = entry?;
                match entry.name {
                    _ if entry.ino == 0 => {}
                    b"." => {}
                    b".." => above = entry.ino,
                    _ => {
                        let kind = match FileType::from_code(entry.code) {
                            Some(kind) => kind,
                            None => self.filesystem.inode(entry.ino)?.file_type(),
                        };
                        all.push((entry.name.to_vec(), entry.ino, kind));
                    }
                }
            }
        }
        let form = self.form()?;
        let names: Vec<&[u8]> = all.iter().map(|(name, ..)| &name[..]).collect();
        let plan = form.plan(&names)?;
        if plan.is_large() && !self.superblock().has_incompat(incompat::LARGEDIR) {
            return Err(crate::write::WriteError::DirectorySize(names.len()).into());
        }
        let runs = self.allocate(plan.blocks(), self.group_of(directory.raw.ino))?;
        let list: Vec<DirectoryEntry<'_>> = all
            .iter()
            .map(|(name, ino, kind)| DirectoryEntry { name, ino: *ino, file_type: *kind })
            .collect();
        let begin = self.begin(&directory.raw).unwrap_or(0);
        let mut places = runs.iter().flat_map(|run| run.start..run.start + run.length);
        let blocks = &mut self.filesystem.blocks;
        plan.write(&form, directory.raw.ino, above, &list, begin, |bytes| {
            blocks.stage(places.next().expect("as many as planned"), bytes.into());
            Ok(())
        })?;
        let old = std::mem::take(&mut directory.mapped);
        for extent in &old.extents {
            self.release(Run::new(extent.physical, extent.length.into()))?;
        }
        self.set_map(&mut directory.raw, &old.nodes, &crate::write::tree::extents(&runs))?;
        directory.raw.set_flag(flags::INDEX, plan.is_hashed());
        directory.raw.fields.set_size(plan.blocks() * u64::from(self.block_size()));
        directory.mapped = self.mapped(&directory.raw)?;
        Ok(())
    }

    /// The first block of a new directory, and a map with it.
    pub(super) fn fill_directory(&mut self, raw: &mut Raw, above: Ino) -> Result<()> {
        let form = self.form()?;
        let place = self.allocate_one(self.group_of(raw.ino))?;
        let begin = self.begin(raw).unwrap_or(0);
        let blocks = &mut self.filesystem.blocks;
        form.plan(&[])?.write(&form, raw.ino, above, &[], begin, |bytes| {
            blocks.stage(place, bytes.into());
            Ok(())
        })?;
        self.empty_map(raw)?;
        self.set_map(raw, &[], &[Extent { logical: 0, physical: place, length: 1, unwritten: false }])?;
        raw.fields.set_size(self.block_size().into());
        Ok(())
    }
}

/// Makes the checksum of a block of entries.
fn seal_entries(begin: Option<u32>, directory: &Directory, logical: u64, bytes: &mut [u8]) {
    let Some(begin) = begin else { return };
    if directory.is_hashed() && logical == 0 {
        // The entries `.` and `..`, before the root of the tree, whose checksum is another one.
        hash_seal(begin, bytes, ROOT_COUNT);
    } else {
        seal(begin, bytes);
    }
}

/// Fills a block with entries, the last of which takes all that is left up to `room`.
fn fill<'a>(block: &mut [u8], room: usize, entries: impl Iterator<Item = &'a Found<'a>>) {
    let (mut at, mut last) = (0, 0);
    for entry in entries {
        let size = needed(entry.name.len());
        directory::put(block, at, entry.ino, size, entry.name, entry.code);
        last = at;
        at += size;
    }
    let left = u32::try_from(room - last).expect("a block has at most 64 KiB");
    block[last + 4..last + 6].copy_from_slice(&directory::stored_record(left).to_le_bytes());
}
