//! Directories: their blocks, and every entry in them.

use std::collections::HashSet;

use zerocopy::FromBytes;

use super::{Checker, Directory};
use crate::format::directory::{self, EntryHeader};
use crate::format::inode::flags;
use crate::format::superblock::{compat, incompat};
use crate::format::{FileType, Ino, ino};
use crate::read::{Error, Place, Result};

/// Problems of one directory after which it is left.
const ENOUGH: u64 = 200;

/// What is kept while a directory is looked at.
struct Walk {
    ino: Ino,
    place: Place,
    names: HashSet<Vec<u8>>,
    entries: u64,
}

impl Checker<'_> {
    pub(super) fn directories(&mut self) -> Result<()> {
        let numbers: Vec<Ino> = self.directories.keys().copied().collect();
        for ino in numbers {
            let Some(found) = self.directories.get_mut(&ino) else { continue };
            let directory = Directory {
                runs: std::mem::take(&mut found.runs),
                flags: found.flags,
                generation: found.generation,
                size: found.size,
                ..Directory::default()
            };
            if directory.flags & flags::INLINE_DATA != 0 {
                self.inline(ino)?;
            } else {
                self.directory(ino, &directory)?;
            }
        }
        Ok(())
    }

    /// A directory whose entries are in the inode, which the reader takes apart.
    fn inline(&mut self, ino: Ino) -> Result<()> {
        let inode = self.filesystem.inode(ino);
        let Some(inode) = self.found(inode)? else { return Ok(()) };
        let entries = self.filesystem.entries(&inode);
        let Some(entries) = self.found(entries)? else { return Ok(()) };
        let entries: Vec<_> = entries.collect();
        let mut walk = Walk { ino, place: Place::Inode(ino), names: HashSet::new(), entries: 0 };
        for entry in entries {
            let Some(entry) = self.found(entry)? else { continue };
            self.entry(&mut walk, &entry.name, entry.inode, None);
        }
        Ok(())
    }

    fn directory(&mut self, ino: Ino, directory: &Directory) -> Result<()> {
        let block_size = u64::from(self.numbers.block_size);
        let place = Place::Inode(ino);
        let before = self.report.count;
        let blocks: u64 = directory.runs.iter().map(|run| run.length).sum();
        let mut at = 0;
        let whole = directory
            .runs
            .iter()
            .all(|run| std::mem::replace(&mut at, run.logical + run.length) == run.logical);
        if !whole || blocks * block_size != directory.size || blocks == 0 {
            self.bad(
                place,
                format!("it is a directory of {} bytes in {blocks} blocks, or with holes", directory.size),
            );
        }
        let hashed =
            directory.flags & flags::INDEX != 0 && self.superblock.has_compat(compat::DIR_INDEX) && whole;
        let mut index = if hashed { self.hash_tree(ino, directory)? } else { None };
        let mut walk = Walk { ino, place, names: HashSet::new(), entries: 0 };
        for run in &directory.runs {
            for number in 0..run.length {
                if self.report.count - before > ENOUGH {
                    self.bad(place, "too much is wrong with this directory to go on");
                    return Ok(());
                }
                let logical = run.logical + number;
                walk.place = Place::Directory { inode: ino, block: logical };
                if index.as_ref().is_some_and(|index| index.is_node(logical)) {
                    continue;
                }
                let block = self.filesystem.block(run.physical + number, walk.place)?;
                let root = hashed && logical == 0;
                let range = index.as_mut().and_then(|index| index.leaf(logical));
                if index.is_some() && logical > 0 && range.is_none() {
                    self.bad(walk.place, "no entry of the hash tree leads to it");
                }
                let names = self.leaf(&mut walk, &block, root, directory.generation)?;
                if let (Some(index), Some((low, high))) = (&index, range) {
                    let outside = names.iter().any(|name| !(low..=high).contains(&index.hash(name)));
                    if outside {
                        self.bad(walk.place, "names in it have hashes that belong to another block");
                    }
                }
            }
        }
        if walk.entries < 2 {
            self.bad(place, "it does not begin with . and ..");
        }
        Ok(())
    }

    /// A block of entries; the names in it.
    fn leaf(&mut self, walk: &mut Walk, block: &[u8], root: bool, generation: u32) -> Result<Vec<Vec<u8>>> {
        let mut end = block.len();
        if let Some(seed) = self.numbers.seed
            && !root
        {
            match directory::tail(block) {
                None => self.bad(walk.place, "it does not end with a checksum"),
                Some(tail) => {
                    end -= directory::TAIL;
                    if tail.checksum.get() != directory::sum(seed.of_inode(walk.ino, generation), block) {
                        self.bad(walk.place, "the checksum is wrong");
                    }
                }
            }
        }
        let mut names = Vec::new();
        let mut at = 0;
        while at < end {
            let Some((header, _)) = block.get(at..).and_then(|rest| EntryHeader::read_from_prefix(rest).ok())
            else {
                self.bad(walk.place, format!("the entry at byte {at} is cut off"));
                break;
            };
            let record = directory::record_length(header.record.get(), self.numbers.block_size) as usize;
            let name = usize::from(header.name_length);
            let least = if header.inode.get() == 0 { directory::HEADER + 4 } else { directory::needed(name) };
            if record < least || !record.is_multiple_of(4) || at + record > end {
                self.bad(walk.place, format!("the entry at byte {at} has {record} bytes"));
                break;
            }
            if header.inode.get() != 0 {
                let name = &block[at + directory::HEADER..at + directory::HEADER + name];
                let kind = self.superblock.has_incompat(incompat::FILETYPE).then_some(header.file_type);
                self.entry(walk, name, header.inode.get(), kind);
                if name != b"." && name != b".." {
                    names.push(name.to_vec());
                }
            } else if walk.entries < 2 {
                self.bad(walk.place, "it does not begin with . and ..");
                walk.entries = 2;
            }
            at += record;
        }
        Ok(names)
    }

    /// An entry, with the kind that it says it leads to, where it says one.
    fn entry(&mut self, walk: &mut Walk, name: &[u8], to: Ino, kind: Option<u8>) {
        let shown = || String::from_utf8_lossy(name).replace(char::is_control, "?");
        walk.entries += 1;
        let (ino, place) = (walk.ino, walk.place);
        match walk.entries {
            1 if name != b"." || to != ino => {
                self.bad(place, format!("the first entry is {:?}, of inode {to}", shown()));
            }
            2 if name != b".." => self.bad(place, format!("the second entry is {:?}", shown())),
            1 | 2 => {}
            _ if name == b"." || name == b".." => {
                self.bad(place, format!("{:?} is in it once more", shown()));
                return;
            }
            _ => {}
        }
        let encrypted = self.directories.get(&ino).is_some_and(|own| own.flags & flags::ENCRYPT != 0);
        if name.is_empty() || !encrypted && (name.contains(&b'/') || name.contains(&0)) {
            self.bad(place, format!("{:?} is no name", shown()));
        }
        if walk.entries > 2 && !walk.names.insert(name.to_vec()) {
            self.bad(place, format!("{:?} is in the directory twice", shown()));
        }
        let own = to < self.first_ino() && to != ino::ROOT || self.is_own(to);
        let is_directory = self.directories.contains_key(&to);
        let Some(found) = self.inode(to).filter(|_| !own) else {
            self.bad(place, format!("{:?} leads to inode {to}, which is not one of a file in use", shown()));
            return;
        };
        found.found = found.found.saturating_add(1);
        let is = found.kind;
        if let Some(kind) = kind
            && is.is_some()
            && is != FileType::from_code(kind)
        {
            self.bad(place, format!("{:?} is said to be of kind {kind}, and inode {to} is not", shown()));
        }
        if walk.entries == 2 && name == b".." {
            if let Some(directory) = self.directories.get_mut(&ino) {
                directory.above = to;
            }
        } else if walk.entries > 2 && is_directory {
            let before = self.directories.get_mut(&to).map_or(0, |child| {
                if child.parent == 0 { std::mem::replace(&mut child.parent, ino) } else { child.parent }
            });
            if before != 0 || to == ino::ROOT {
                self.report_twice(to);
            }
        }
    }

    fn report_twice(&mut self, ino: Ino) {
        let error = Error::corrupt(Place::Inode(ino), "this directory is in the tree more than once");
        // It is no error of the source.
        let _ = self.report.error(error);
    }
}
