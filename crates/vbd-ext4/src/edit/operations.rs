//! What can be done: entries made, written, renamed, removed.

use std::collections::HashSet;
use std::io::Read;

use super::directory::Directory;
use super::inodes::Raw;
use super::{EditError, Editor, Result};
use crate::format::directory::MAX_LINKS;
use crate::format::inode::flags;
use crate::format::superblock::ro_compat;
use crate::format::{Attributes, Extent, FileType, Ino, Xattr};
use crate::read::{Error, Links, Place};
use crate::write::WriteError;
use crate::write::directory::is_name;

/// Bytes of content that are taken at once.
const CHUNK: usize = 1 << 20;
/// Bytes of a link's target that fit into the inode, and one more.
const FAST_LINK: usize = 60;
/// Bytes that the kernel takes for a link's target, and one more.
const LINK: usize = 4096;
/// The access ACL.
const ACL: &[u8] = b"system.posix_acl_access";

/// What a new entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum New<'a> {
    /// An empty file.
    File,
    /// An empty directory.
    Directory,
    /// A symbolic link to this.
    Symlink(&'a [u8]),
    /// A character device.
    Character {
        /// Major number, 12 bits.
        major: u32,
        /// Minor number, 20 bits.
        minor: u32,
    },
    /// A block device.
    Block {
        /// Major number, 12 bits.
        major: u32,
        /// Minor number, 20 bits.
        minor: u32,
    },
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
}

impl New<'_> {
    fn kind(self) -> FileType {
        match self {
            New::File => FileType::Regular,
            New::Directory => FileType::Directory,
            New::Symlink(_) => FileType::Symlink,
            New::Character { .. } => FileType::Character,
            New::Block { .. } => FileType::Block,
            New::Fifo => FileType::Fifo,
            New::Socket => FileType::Socket,
        }
    }
}

/// A name in a directory, and what has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Where {
    /// The directory's inode.
    pub directory: Ino,
    /// The name.
    pub name: Vec<u8>,
    /// The inode of that name, where there is one; a symbolic link is not followed.
    pub found: Option<Ino>,
}

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

impl Editor {
    /// The place that a path names: all but its last part has to exist, with links followed inside of the filesystem.
    ///
    /// # Errors
    ///
    /// A directory on the way that is none, and those of reading; a path that ends in nothing, `.` or `..`.
    pub fn locate(&self, path: &[u8]) -> Result<Where> {
        let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
        let path = &path[..end];
        let (above, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&path[..0], path),
        };
        if !is_name(name) {
            return Err(WriteError::Name(name.len()).into());
        }
        let above = self.filesystem.lookup(above, Links::Follow)?;
        if above.file_type() != FileType::Directory {
            return Err(Error::NotDirectory(path.to_vec()).into());
        }
        // Not through `directory`, which refuses those that may not be changed.
        let path = [path, b""].concat();
        let found = match self.filesystem.lookup(&path, Links::Keep) {
            Ok(inode) => Some(inode.number()),
            Err(Error::NotFound(_)) => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Where { directory: above.number(), name: name.to_vec(), found })
    }

    /// What has a name in a directory; nothing where there is none.
    ///
    /// # Errors
    ///
    /// An inode that is no directory, or may not be changed; those of reading.
    pub fn entry(&self, directory: Ino, name: &[u8]) -> Result<Option<crate::read::Inode>> {
        let directory = self.directory(directory)?;
        match self.find_entry(&directory, name)?.filter(|_| is_name(name)) {
            Some(slot) => Ok(Some(self.filesystem.inode(slot.ino)?)),
            None => Ok(None),
        }
    }

    /// Makes a new entry.
    ///
    /// # Errors
    ///
    /// One that exists, what ext4 cannot keep, no room; those of reading.
    pub fn create(
        &mut self,
        directory: Ino,
        name: &[u8],
        new: New<'_>,
        attributes: &Attributes,
        xattrs: &[Xattr],
    ) -> Result<Ino> {
        self.attempt(|editor| editor.make(directory, name, new, attributes, xattrs))
    }

    /// Gives a file new content: all that can be read, with holes for blocks of zeros. It stays the same inode.
    ///
    /// # Errors
    ///
    /// An inode that is no file, no room, those of reading and writing.
    pub fn set_content(&mut self, ino: Ino, content: &mut dyn Read) -> Result<()> {
        self.attempt(|editor| editor.write_content(ino, content))
    }

    /// Gives an inode one more name.
    ///
    /// # Errors
    ///
    /// A name that exists, a directory, too many links; those of reading.
    pub fn link(&mut self, directory: Ino, name: &[u8], ino: Ino) -> Result<()> {
        self.attempt(|editor| {
            let mut raw = editor.load_to_change(ino)?;
            let kind = editor.kind(&raw)?;
            let links = u32::from(raw.fields.links.get()) + 1;
            if kind == FileType::Directory {
                return Err(EditError::Kind { ino, why: "is a directory, which has one name only" });
            }
            if links > MAX_LINKS {
                return Err(WriteError::Links(links).into());
            }
            let mut directory = editor.free_place(directory, name)?;
            editor.is_of_project(&directory.raw, &raw)?;
            raw.fields.links = narrow(links).into();
            raw.touch_inode(editor.now);
            editor.store(raw)?;
            editor.add_entry(&mut directory, name, ino, kind)?;
            editor.changed(directory)
        })
    }

    /// Removes a name; the last one of a file with the file. Directories have to be empty.
    ///
    /// # Errors
    ///
    /// A name that is not there, a directory with entries; those of reading.
    pub fn remove(&mut self, directory: Ino, name: &[u8]) -> Result<()> {
        self.attempt(|editor| editor.unlink(directory, name, false))
    }

    /// Removes a name and all that is below it.
    ///
    /// # Errors
    ///
    /// A name that is not there; those of reading.
    pub fn remove_all(&mut self, directory: Ino, name: &[u8]) -> Result<()> {
        self.attempt(|editor| editor.unlink(directory, name, true))
    }

    /// Renames an entry. What has the new name is replaced, unless it is a directory.
    ///
    /// # Errors
    ///
    /// A name that is not there, a directory in the way, a directory that would go below itself; those of reading.
    pub fn rename(&mut self, from: (Ino, &[u8]), to: (Ino, &[u8])) -> Result<()> {
        self.attempt(|editor| editor.move_entry(from, to))
    }

    /// Sets mode bits, owner and times. An access ACL follows the mode, as with chmod(2).
    ///
    /// # Errors
    ///
    /// Values that an inode cannot hold; those of reading.
    pub fn set_attributes(&mut self, ino: Ino, attributes: &Attributes) -> Result<()> {
        self.attempt(|editor| {
            check(attributes)?;
            let mut raw = editor.load_to_change(ino)?;
            let before = raw.fields.attributes().mode;
            raw.set_attributes(attributes);
            if before & 0o777 != attributes.mode & 0o777 {
                let mut xattrs = editor.filesystem.xattrs(&editor.filesystem.inode(ino)?)?;
                if let Some((_, acl)) = xattrs.iter_mut().find(|(name, _)| name == ACL) {
                    follow_mode(acl, attributes.mode);
                    editor.put_xattrs(&mut raw, &xattrs)?;
                }
            }
            editor.store(raw)
        })
    }

    /// Gives an inode these extended attributes instead of those that it has.
    ///
    /// # Errors
    ///
    /// What ext4 cannot keep, no room; those of reading.
    pub fn set_xattrs(&mut self, ino: Ino, xattrs: &[Xattr]) -> Result<()> {
        self.attempt(|editor| {
            let mut raw = editor.load_to_change(ino)?;
            editor.put_xattrs(&mut raw, xattrs)?;
            raw.touch_inode(editor.now);
            editor.store(raw)
        })
    }

    /// Does something; when it fails in the middle, nothing of this editor can be committed any more.
    pub(super) fn attempt<T>(&mut self, operation: impl FnOnce(&mut Editor) -> Result<T>) -> Result<T> {
        self.usable()?;
        let before = self.filesystem.blocks.stagings();
        let result = operation(self).and_then(|done| self.settle_usage().map(|()| done));
        self.failed = result.is_err() && before != self.filesystem.blocks.stagings();
        result
    }

    pub(super) fn usable(&self) -> Result<()> {
        if self.failed {
            let why = "a change before this one failed in the middle; begin again with what is in the image";
            return Err(EditError::Refused(why.to_owned()));
        }
        Ok(())
    }

    fn kind(&self, raw: &Raw) -> Result<FileType> {
        raw.kind().ok_or_else(|| EditError::corrupt(Place::Inode(raw.ino), "it is of no known kind"))
    }

    /// A directory in which a name is free.
    fn free_place(&self, directory: Ino, name: &[u8]) -> Result<Directory> {
        if !is_name(name) {
            return Err(WriteError::Name(name.len()).into());
        }
        let directory = self.directory(directory)?;
        match self.find_entry(&directory, name)? {
            Some(_) => Err(EditError::Exists(shown(name))),
            None => Ok(directory),
        }
    }

    /// Puts a directory back whose entries changed.
    fn changed(&mut self, directory: Directory) -> Result<()> {
        let mut raw = directory.raw;
        raw.touch(self.now);
        self.store(raw)
    }

    fn make(
        &mut self,
        directory: Ino,
        name: &[u8],
        new: New<'_>,
        attributes: &Attributes,
        xattrs: &[Xattr],
    ) -> Result<Ino> {
        check(attributes)?;
        let kind = new.kind();
        let mut above = self.free_place(directory, name)?;
        let ino = self.allocate_inode(self.group_of(directory), kind)?;
        let mut raw = self.fresh(ino, kind)?;
        raw.set_attributes(attributes);
        self.inherit_project(&above.raw, &mut raw);
        raw.fields.links = if kind == FileType::Directory { 2 } else { 1 }.into();
        match new {
            New::File => self.empty_map(&mut raw)?,
            New::Directory => {
                more_links(self, &mut above.raw)?;
                self.fill_directory(&mut raw, directory)?;
            }
            New::Symlink(target) => self.put_target(&mut raw, target)?,
            New::Character { major, minor } | New::Block { major, minor } => {
                if major >= 1 << 12 || minor >= 1 << 20 {
                    return Err(WriteError::Device { major, minor }.into());
                }
                raw.fields.set_device(major, minor);
            }
            New::Fifo | New::Socket => {}
        }
        if !xattrs.is_empty() {
            self.put_xattrs(&mut raw, xattrs)?;
        }
        self.store(raw)?;
        self.add_entry(&mut above, name, ino, kind)?;
        self.changed(above)?;
        Ok(ino)
    }

    /// The target of a symbolic link: in the inode, or in a block.
    fn put_target(&mut self, raw: &mut Raw, target: &[u8]) -> Result<()> {
        let most = (self.block_size() as usize).min(LINK) - 1;
        if target.is_empty() || target.len() > most || target.contains(&0) {
            return Err(WriteError::Symlink { length: target.len(), most }.into());
        }
        if target.len() < FAST_LINK {
            raw.fields.block[..target.len()].copy_from_slice(target);
        } else {
            let physical = self.allocate_one(self.group_of(raw.ino))?;
            let mut block = target.to_vec();
            block.resize(self.block_size() as usize, 0);
            self.filesystem.blocks.stage(physical, block.into());
            self.empty_map(raw)?;
            self.set_map(raw, &[], &[Extent { logical: 0, physical, length: 1, unwritten: false }])?;
        }
        raw.fields.set_size(target.len() as u64);
        Ok(())
    }

    fn write_content(&mut self, ino: Ino, content: &mut dyn Read) -> Result<()> {
        let mut raw = self.load_to_change(ino)?;
        if self.kind(&raw)? != FileType::Regular {
            return Err(EditError::Kind { ino, why: "is no regular file" });
        }
        self.release_content(&mut raw)?;
        let block_size = self.block_size() as usize;
        let mut near = self.group_of(ino);
        let mut extents: Vec<Extent> = Vec::new();
        let (mut size, mut logical) = (0u64, 0u32);
        let mut chunk = vec![0; CHUNK];
        loop {
            let length = fill(content, &mut chunk).map_err(EditError::Content)?;
            if length == 0 {
                break;
            }
            size += length as u64;
            chunk[length..].fill(0);
            let blocks = length.div_ceil(block_size);
            let used: Vec<usize> = (0..blocks)
                .filter(|at| chunk[at * block_size..][..block_size].iter().any(|byte| *byte != 0))
                .collect();
            let runs = self.allocate(used.len() as u64, near)?;
            let places = runs.iter().flat_map(|run| run.start..run.start + run.length);
            let mut writes = Vec::with_capacity(used.len());
            for (at, physical) in used.iter().zip(places) {
                let number = logical.checked_add(u32::try_from(*at).unwrap_or(u32::MAX));
                let number =
                    number.ok_or(WriteError::File { size, why: "a file has at most 2^32 - 1 blocks" })?;
                match extents.last_mut() {
                    Some(last)
                        if last.logical + last.length == number
                            && last.physical + u64::from(last.length) == physical =>
                    {
                        last.length += 1;
                    }
                    _ => extents.push(Extent { logical: number, physical, length: 1, unwritten: false }),
                }
                writes.push((physical, &chunk[at * block_size..][..block_size]));
            }
            if let Some(run) = runs.last() {
                let geometry = &self.filesystem.geometry;
                let group = (run.start - geometry.first_data_block) / geometry.blocks_per_group;
                near = u32::try_from(group).unwrap_or(0);
            }
            self.write_blocks(writes)?;
            let step = u32::try_from(blocks).expect("a chunk is small");
            logical = logical
                .checked_add(step)
                .ok_or(WriteError::File { size, why: "a file has at most 2^32 - 1 blocks" })?;
        }
        self.set_map(&mut raw, &[], &extents)?;
        raw.fields.set_size(size);
        if size >= 1 << 31 && !self.superblock().has_ro_compat(ro_compat::LARGE_FILE) {
            let superblock = self.superblock_mut();
            superblock.ro_compat = (superblock.ro_compat.get() | ro_compat::LARGE_FILE).into();
        }
        raw.touch(self.now);
        self.store(raw)
    }

    fn unlink(&mut self, directory: Ino, name: &[u8], all: bool) -> Result<()> {
        let mut above = self.directory(directory)?;
        let slot = self.find_entry(&above, name)?.filter(|_| name != b"." && name != b"..");
        let Some(slot) = slot else { return Err(EditError::NotFound(shown(name))) };
        let raw = self.load_to_change(slot.ino)?;
        if !raw.is_directory() {
            self.drop_link(slot.ino)?;
        } else {
            if slot.ino == crate::format::ino::ROOT {
                return Err(EditError::corrupt(Place::Inode(directory), "the root is in it"));
            }
            if !all && !self.is_empty(slot.ino)? {
                return Err(EditError::NotEmpty(shown(name)));
            }
            self.drop_tree(slot.ino)?;
            fewer_links(&mut above.raw);
        }
        self.remove_entry(&above, &slot)?;
        self.changed(above)
    }

    fn is_empty(&self, directory: Ino) -> Result<bool> {
        let inode = self.filesystem.inode(directory)?;
        for entry in self.filesystem.entries(&inode)? {
            if ![&b"."[..], b".."].contains(&&entry?.name[..]) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes one of its names from an inode that is no directory.
    fn drop_link(&mut self, ino: Ino) -> Result<()> {
        let mut raw = self.load_to_change(ino)?;
        let links = raw.fields.links.get();
        if links > 1 {
            raw.fields.links = (links - 1).into();
            raw.touch_inode(self.now);
            return self.store(raw);
        }
        self.drop_inode(raw)
    }

    /// Whether an inode has a map of blocks: not where its 60 bytes are something else.
    pub(super) fn has_map(&self, raw: &Raw) -> Result<bool> {
        Ok(match self.kind(raw)? {
            FileType::Regular | FileType::Directory => true,
            FileType::Symlink => {
                let own = u64::from(raw.fields.xattr_block() != 0) * u64::from(self.block_size() / 512);
                raw.has(flags::EXTENTS) || raw.fields.sectors(self.block_size()) > own
            }
            _ => false,
        })
    }

    /// Frees an inode with all that it has.
    fn drop_inode(&mut self, mut raw: Raw) -> Result<()> {
        if self.has_map(&raw)? {
            self.release_content(&mut raw)?;
        }
        self.release_xattr_block(&mut raw)?;
        self.forget(raw)
    }

    /// Removes a directory with all that is below it.
    fn drop_tree(&mut self, top: Ino) -> Result<()> {
        let mut seen = HashSet::from([top]);
        let mut directories = vec![top];
        let mut next = 0;
        while let Some(directory) = directories.get(next).copied() {
            next += 1;
            let inode = self.filesystem.inode(directory)?;
            let entries = self.filesystem.entries(&inode)?.collect::<std::result::Result<Vec<_>, _>>()?;
            for entry in entries {
                if entry.name == b"." || entry.name == b".." {
                    continue;
                }
                let child = self.filesystem.entry(&entry)?;
                if child.file_type() != FileType::Directory {
                    self.drop_link(child.number())?;
                } else if child.number() == crate::format::ino::ROOT || !seen.insert(child.number()) {
                    return Err(child.twice().into());
                } else {
                    directories.push(child.number());
                }
            }
        }
        for directory in directories {
            let raw = self.load_to_change(directory)?;
            self.drop_inode(raw)?;
        }
        Ok(())
    }

    fn move_entry(&mut self, from: (Ino, &[u8]), to: (Ino, &[u8])) -> Result<()> {
        let (name, new_name) = (from.1, to.1);
        if !is_name(new_name) {
            return Err(WriteError::Name(new_name.len()).into());
        }
        let old = self.directory(from.0)?;
        let slot = self.find_entry(&old, name)?.filter(|_| is_name(name));
        let Some(slot) = slot else { return Err(EditError::NotFound(shown(name))) };
        let mut raw = self.load_to_change(slot.ino)?;
        let kind = self.kind(&raw)?;
        let mut target = self.directory(to.0)?;
        self.is_of_project(&target.raw, &raw)?;
        let replaced = self.find_entry(&target, new_name)?;
        if let Some(replaced) = &replaced {
            if replaced.ino == slot.ino {
                return Ok(());
            }
            if kind == FileType::Directory || self.load_to_change(replaced.ino)?.is_directory() {
                return Err(EditError::Exists(shown(new_name)));
            }
        }
        if kind == FileType::Directory && from.0 != to.0 {
            self.is_not_below(to.0, slot.ino)?;
            more_links(self, &mut target.raw)?;
        }
        match replaced {
            Some(replaced) => {
                self.drop_link(replaced.ino)?;
                self.replace_entry(&target, &replaced, slot.ino, kind)?;
            }
            None => self.add_entry(&mut target, new_name, slot.ino, kind)?,
        }
        self.changed(target)?;
        raw.touch_inode(self.now);
        self.store(raw)?;
        if kind == FileType::Directory && from.0 != to.0 {
            let moved = self.directory(slot.ino)?;
            let up = self.find_entry(&moved, b"..")?;
            let up = up.ok_or_else(|| {
                EditError::corrupt(Place::Inode(slot.ino), "it has no entry for what is above it")
            })?;
            self.replace_entry(&moved, &up, to.0, FileType::Directory)?;
        }
        // Where it was may have changed with the new entry.
        let mut old = self.directory(from.0)?;
        let slot = self.find_entry(&old, name)?.ok_or_else(|| EditError::NotFound(shown(name)))?;
        self.remove_entry(&old, &slot)?;
        if kind == FileType::Directory && from.0 != to.0 {
            fewer_links(&mut old.raw);
        }
        self.changed(old)
    }

    /// Whether a directory is not another one and not below it.
    fn is_not_below(&self, directory: Ino, other: Ino) -> Result<()> {
        let mut seen = HashSet::new();
        let mut at = directory;
        while at != crate::format::ino::ROOT {
            if at == other {
                return Err(EditError::Kind { ino: other, why: "would go below itself" });
            }
            let up = self.find_entry(&self.directory(at)?, b"..")?.filter(|_| seen.insert(at));
            at = up
                .ok_or_else(|| EditError::corrupt(Place::Inode(at), "what is above it cannot be found"))?
                .ino;
        }
        Ok(())
    }
}

/// What the file's inode says of a directory that gets another one in it: a count that is full says 1 from then on.
fn more_links(editor: &Editor, raw: &mut Raw) -> Result<()> {
    let links = u32::from(raw.fields.links.get());
    if links == 1 {
        return Ok(());
    }
    if links < MAX_LINKS {
        raw.fields.links = narrow(links + 1).into();
    } else if editor.superblock().has_ro_compat(ro_compat::DIR_NLINK) {
        raw.fields.links = 1.into();
    } else {
        return Err(WriteError::Links(links + 1).into());
    }
    Ok(())
}

/// The same with one less.
fn fewer_links(raw: &mut Raw) {
    let links = raw.fields.links.get();
    if links > 2 {
        raw.fields.links = (links - 1).into();
    }
}

#[expect(clippy::cast_possible_truncation, reason = "at most 65,000")]
fn narrow(links: u32) -> u16 {
    links as u16
}

/// Reads until the buffer is full or nothing is left.
fn fill(content: &mut dyn Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match content.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

fn check(attributes: &Attributes) -> Result<()> {
    if attributes.mode & !0o7777 != 0 {
        return Err(WriteError::Mode(attributes.mode).into());
    }
    let times = [attributes.atime, attributes.ctime, attributes.mtime, attributes.crtime];
    match times.iter().find(|time| !time.fits()) {
        Some(time) => Err(WriteError::Time(time.seconds).into()),
        None => Ok(()),
    }
}

/// Puts permission bits into an access ACL (POSIX version 2): the owner's, the mask's or else the group's, the others'.
fn follow_mode(acl: &mut [u8], mode: u16) {
    const OWNER: u16 = 1;
    const GROUP: u16 = 4;
    const MASK: u16 = 0x10;
    const OTHERS: u16 = 0x20;
    let Some(list) = acl.get_mut(4..) else { return };
    let tag = |entry: &[u8]| u16::from_le_bytes([entry[0], entry[1]]);
    let has_mask = list.chunks_exact(8).any(|entry| tag(entry) == MASK);
    for entry in list.chunks_exact_mut(8) {
        let bits = match tag(entry) {
            OWNER => mode >> 6,
            MASK => mode >> 3,
            GROUP if !has_mask => mode >> 3,
            OTHERS => mode,
            _ => continue,
        };
        entry[2..4].copy_from_slice(&(bits & 7).to_le_bytes());
    }
}
