//! Directories, read from front to end: the trees of hashed ones look like entries not in use.

use std::collections::HashSet;

use zerocopy::FromBytes;

use super::inode::Inode;
use super::map::Runs;
use super::{Error, Filesystem, Place, Result};
use crate::format::directory::{self, EntryHeader};
use crate::format::inode::flags;
use crate::format::superblock::incompat;
use crate::format::{Block, FileType, Ino, ino};

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// Its name: one byte at least, without a slash and without a zero. `.` and `..` are entries, too.
    pub name: Vec<u8>,
    /// Its inode.
    pub inode: Ino,
    /// What the directory says it is; the inode's word counts.
    pub file_type: Option<FileType>,
}

/// The entries of a directory. Ends after the first error.
pub struct Entries<'a> {
    filesystem: &'a Filesystem,
    inode: &'a Inode,
    runs: Option<Runs<'a>>,
    /// The run that is being read: its next logical and physical block and how many are left.
    run: (u64, u64, u64),
    /// The next block of the directory.
    block: u64,
    blocks: u64,
    /// Where the blocks so far were: of one that is there many times, listings would have no end.
    seen: HashSet<Block>,
    /// Entries of the last block that was read, the next one last.
    ready: Vec<DirEntry>,
    failed: bool,
}

impl Filesystem {
    /// The entries of a directory in the order in which they are in it.
    ///
    /// # Errors
    ///
    /// An inode that is no directory, an encrypted one; further errors come with the entries.
    pub fn entries<'a>(&'a self, inode: &'a Inode) -> Result<Entries<'a>> {
        let place = Place::Inode(inode.number());
        if inode.file_type() != FileType::Directory {
            return Err(Error::corrupt(place, "it is no directory"));
        }
        if inode.has(flags::ENCRYPT) {
            return Err(Error::unsupported(place, "encryption of names"));
        }
        let mut entries = Entries {
            filesystem: self,
            inode,
            runs: None,
            run: (0, 0, 0),
            block: 0,
            blocks: 0,
            seen: HashSet::new(),
            ready: Vec::new(),
            failed: false,
        };
        if inode.has(flags::INLINE_DATA) {
            entries.ready = self.inline_entries(inode)?;
            return Ok(entries);
        }
        let block_size = u64::from(self.geometry.block_size);
        if inode.size() == 0 || !inode.size().is_multiple_of(block_size) {
            return Err(Error::corrupt(place, format!("it is a directory of {} bytes", inode.size())));
        }
        entries.blocks = inode.size() / block_size;
        entries.runs = Some(self.runs(inode, 0, entries.blocks)?);
        Ok(entries)
    }

    /// The inode of an entry.
    ///
    /// # Errors
    ///
    /// One that no entry may lead to, and those of [`Filesystem::inode`].
    pub fn entry(&self, entry: &DirEntry) -> Result<Inode> {
        let first = self.geometry.superblock.first_ino.get().max(ino::FIRST);
        let place = Place::Inode(entry.inode);
        if entry.inode < first && entry.inode != ino::ROOT {
            return Err(Error::corrupt(place, "it is the filesystem's own, and a directory refers to it"));
        }
        let inode = self.inode(entry.inode)?;
        if inode.links() == 0 {
            return Err(Error::corrupt(place, "it was deleted, and a directory refers to it"));
        }
        Ok(inode)
    }

    /// "Inline Directories": the number of the directory above, then entries in the inode and in an xattr.
    fn inline_entries(&self, inode: &Inode) -> Result<Vec<DirEntry>> {
        let place = Place::Directory { inode: inode.number(), block: 0 };
        let content = self.inline(inode)?;
        let in_inode = content.len().min(inode.fields().block.len());
        let (first, second) = content.split_at(in_inode);
        let Some((above, first)) = first.split_first_chunk::<4>() else {
            return Err(Error::corrupt(place, "it is too short"));
        };
        let own = |name: &[u8], inode| DirEntry {
            name: name.to_vec(),
            inode,
            file_type: Some(FileType::Directory),
        };
        let mut entries = vec![own(b".", inode.number()), own(b"..", u32::from_le_bytes(*above))];
        self.parse(first, place, &mut entries)?;
        self.parse(second, place, &mut entries)?;
        entries.reverse();
        Ok(entries)
    }

    /// The entries of one block.
    pub(super) fn parse(&self, bytes: &[u8], place: Place, entries: &mut Vec<DirEntry>) -> Result<()> {
        let with_type = self.geometry.superblock.has_incompat(incompat::FILETYPE);
        let mut rest = bytes;
        while !rest.is_empty() {
            let at = bytes.len() - rest.len();
            let bad = |reason: &str| Error::corrupt(place, format!("the entry at byte {at} {reason}"));
            let header = EntryHeader::read_from_prefix(rest).map_err(|_| bad("is cut off"))?.0;
            let record = directory::record_length(header.record.get(), self.geometry.block_size) as usize;
            // The upper byte of the length is 0 where it is one: no name has more than 255 bytes.
            let length = usize::from(header.name_length);
            let long = !with_type && header.file_type != 0;
            if long
                || record < directory::needed(length.max(1)) && header.inode.get() != 0
                || record < directory::HEADER
                || !record.is_multiple_of(4)
                || record > rest.len()
            {
                return Err(bad(&format!("says it has {record} bytes, and a name of {length}")));
            }
            let (this, after) = rest.split_at(record);
            rest = after;
            if header.inode.get() == 0 {
                continue;
            }
            let name = &this[directory::HEADER..directory::HEADER + length];
            if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
                return Err(bad("has a name that no file can have"));
            }
            let file_type = FileType::from_code(header.file_type).filter(|_| with_type);
            entries.push(DirEntry { name: name.to_vec(), inode: header.inode.get(), file_type });
        }
        Ok(())
    }

    /// Whether a block of a directory has the right checksum.
    pub(super) fn block_is_right(&self, inode: &Inode, number: u64, block: &[u8]) -> bool {
        let Some(seed) = self.geometry.seed.filter(|_| self.verify) else { return true };
        let begin = seed.of_inode(inode.number(), inode.generation());
        if inode.has(flags::INDEX)
            && let Some(offset) = self.hash_offset(number, block)
        {
            let sum = directory::hash_sum(begin, block, offset);
            return sum.is_some() && sum == directory::stored_hash_sum(block, offset);
        }
        directory::tail(block).is_some_and(|tail| tail.checksum.get() == directory::sum(begin, block))
    }

    /// Where a block of a hashed directory has its count, if it is a node of the tree and not a leaf.
    fn hash_offset(&self, number: u64, block: &[u8]) -> Option<usize> {
        if number == 0 {
            return Some(directory::ROOT_COUNT);
        }
        let header = EntryHeader::read_from_prefix(block).ok()?.0;
        let whole = directory::record_length(header.record.get(), self.geometry.block_size);
        (header.inode.get() == 0 && whole == self.geometry.block_size).then_some(directory::NODE_COUNT)
    }
}

impl Entries<'_> {
    /// Reads the next block.
    fn more(&mut self) -> Result<()> {
        let place = Place::Directory { inode: self.inode.number(), block: self.block };
        let (logical, physical, left) = match self.run {
            (_, _, 0) => match self.runs.as_mut().and_then(Iterator::next) {
                Some(run) => {
                    let run = run?;
                    (run.logical, run.physical, if run.unwritten { 0 } else { run.length })
                }
                None => (u64::MAX, 0, 0),
            },
            run => run,
        };
        if logical != self.block || left == 0 {
            return Err(Error::corrupt(place, "it is missing"));
        }
        if !self.seen.insert(physical) {
            return Err(Error::corrupt(place, "it was there before, as another one"));
        }
        self.run = (logical + 1, physical + 1, left - 1);
        let bytes = self.filesystem.blocks.metadata(physical, place)?;
        if !self.filesystem.block_is_right(self.inode, self.block, &bytes) {
            return Err(Error::Checksum(place));
        }
        self.block += 1;
        self.filesystem.parse(&bytes, place, &mut self.ready)?;
        self.ready.reverse();
        Ok(())
    }
}

impl Iterator for Entries<'_> {
    type Item = Result<DirEntry>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() && !self.failed && self.block < self.blocks {
            if let Err(error) = self.more() {
                self.failed = true;
                self.ready.clear();
                return Some(Err(error));
            }
        }
        self.ready.pop().map(Ok)
    }
}
