//! The writer: blocks and inode numbers are given out, inodes and directories written.

use std::fs::File;

use zerocopy::IntoBytes;

use super::directory::{DirectoryEntry, Filling, Form};
use super::error::{Result, WriteError};
use super::finish::{self, Summary};
use super::inodes::Inodes;
use super::layout::{INODE_SIZE, Layout};
use super::run::Run;
use super::space::Space;
use super::target::Target;
use super::tree::{self, Tree};
use super::xattrs;
use crate::format::directory::MAX_LINKS;
use crate::format::inode::flags;
use crate::format::{Attributes, Block, Extent, FileType, Ino, Inode, Seed, Xattr, ino};

/// The name of the directory for what e2fsck finds.
const LOST_AND_FOUND: &[u8] = b"lost+found";

/// An inode that is no directory.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    /// Mode bits, owner, times.
    pub attributes: Attributes,
    /// Extended attributes; ACLs in the form of the kernel's interface.
    pub xattrs: &'a [Xattr],
    /// Names that it has, at most 65000.
    pub links: u32,
    /// What it is.
    pub body: Body<'a>,
}

/// What an inode is.
#[derive(Debug, Clone, Copy)]
pub enum Body<'a> {
    /// A regular file.
    File {
        /// Bytes.
        size: u64,
        /// Where its data is, in rising order and of any length; what is between them reads as zeros.
        extents: &'a [Extent],
    },
    /// A symbolic link to this target.
    Symlink(&'a [u8]),
    /// A character device.
    Character {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    Block {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
}

/// A directory.
#[derive(Debug, Clone, Copy)]
pub struct Directory<'a> {
    /// The directory that it is in; the root is in itself.
    pub parent: Ino,
    /// Mode bits, owner, times.
    pub attributes: Attributes,
    /// Extended attributes; ACLs in the form of the kernel's interface.
    pub xattrs: &'a [Xattr],
    /// What is in it, without `.` and `..`. A small directory keeps the order.
    pub entries: &'a [DirectoryEntry<'a>],
}

/// The journal's inode, its blocks with those of its tree, and where its first one is.
#[derive(Debug, Clone)]
pub(crate) struct Journal {
    pub(crate) inode: Inode,
    pub(crate) blocks: u64,
    pub(crate) place: Block,
}

/// Of an inode what was found good.
pub(crate) struct Prepared {
    attributes: Attributes,
    xattrs: xattrs::Split,
}

/// Writes a filesystem.
#[derive(Debug)]
pub struct Writer {
    pub(crate) layout: Layout,
    pub(crate) seed: Seed,
    pub(crate) space: Space,
    pub(crate) target: Target,
    pub(crate) inodes: Inodes,
    pub(crate) blocks_of_xattrs: xattrs::Blocks,
    pub(crate) journal: Option<Journal>,
    pub(crate) orphans: Vec<Extent>,
    /// A directory has a tree of three levels (large_dir).
    pub(crate) large_directories: bool,
    form: Form,
    /// Kept for `lost+found` until the root is there.
    lost_and_found: Vec<Run>,
}

impl Writer {
    /// Begins a filesystem at an offset of a file, in bytes. The range must read as zeros; a shorter file is made longer.
    pub fn new(layout: Layout, file: File, offset: u64) -> Result<Writer> {
        let seed = layout.settings.checksums.seed();
        let mut space = Space::new(&layout);
        let journal = space.allocate(u64::from(layout.journal_blocks))?;
        let orphans =
            if layout.has_orphan_file() { space.allocate(super::layout::ORPHAN_BLOCKS)? } else { Vec::new() };
        let lost_and_found = space.allocate(layout.lost_and_found_blocks())?;
        let mut writer = Writer {
            target: Target::new(file, offset, layout.bytes(), layout.block_size())?,
            inodes: Inodes::new(&layout, seed),
            blocks_of_xattrs: xattrs::Blocks::new(seed, layout.block_size()),
            form: Form::of(&layout),
            orphans: tree::extents(&orphans),
            large_directories: false,
            layout,
            seed,
            space,
            journal: None,
            lost_and_found,
        };
        writer.begin_journal(&journal)?;
        Ok(writer)
    }

    /// Makes the journal's inode at once: its tree takes blocks that nobody else is to count on.
    fn begin_journal(&mut self, runs: &[Run]) -> Result<()> {
        if let Some(first) = runs.first() {
            let size = u64::from(self.layout.journal_blocks) * u64::from(self.layout.block_size());
            let mut inode = Inode { links: 1.into(), ..Inode::default() };
            inode.set_size(size);
            let extents = tree::normalized(&tree::extents(runs), size, self.layout.block_size())?;
            let blocks = self.set_extents(ino::JOURNAL, &mut inode, &extents)?;
            self.journal = Some(Journal { inode, blocks, place: first.start });
        }
        Ok(())
    }

    /// Where everything is.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Blocks not yet given out.
    pub fn free_blocks(&self) -> u64 {
        self.space.free()
    }

    /// Where a block begins in the file, in bytes.
    pub fn position(&self, block: Block) -> u64 {
        self.target.position(block)
    }

    /// Whether the blocks given out last may hold what somebody wrote to them who gave them back.
    pub fn gives_again(&self) -> bool {
        self.space.gives_again()
    }

    /// Gives out blocks, the next that are free; those that came back when no others are left.
    pub fn allocate(&mut self, blocks: u64) -> Result<Vec<Run>> {
        self.space.allocate(blocks)
    }

    /// Takes blocks back that [`Writer::allocate`] gave and nothing uses.
    pub fn release(&mut self, run: Run) {
        self.space.release(run);
    }

    /// Gives out an inode number. One that is never written stays free.
    pub fn reserve_inode(&mut self) -> Result<Ino> {
        self.inodes.reserve()
    }

    /// Writes an inode that is no directory. Memory is least when numbers come roughly in rising order.
    ///
    /// # Errors
    /// What is refused leaves nothing behind; after [`WriteError::NoBlocks`] and [`WriteError::Io`] the filesystem is of no use.
    pub fn put(&mut self, ino: Ino, node: &Node<'_>) -> Result<()> {
        if node.links == 0 || node.links > MAX_LINKS {
            return Err(WriteError::Links(node.links));
        }
        let prepared = self.prepare(ino, &node.attributes, node.xattrs)?;
        let links = u16::try_from(node.links).expect("looked at above");
        let mut inode = Inode { links: links.into(), ..Inode::default() };
        let mut blocks = 0;
        let kind = match node.body {
            Body::File { size, extents } => {
                let own = self.layout.first..self.layout.blocks;
                let inside = |extent: &Extent| {
                    own.contains(&extent.physical) && extent.physical + u64::from(extent.length) <= own.end
                };
                if !extents.iter().all(inside) {
                    return Err(WriteError::File { size, why: "one lies outside of the filesystem" });
                }
                let extents = tree::normalized(extents, size, self.layout.block_size())?;
                blocks = self.set_extents(ino, &mut inode, &extents)?;
                inode.set_size(size);
                FileType::Regular
            }
            Body::Symlink(target) => {
                blocks = self.set_symlink(ino, &mut inode, target)?;
                FileType::Symlink
            }
            Body::Character { major, minor } | Body::Block { major, minor } => {
                if major >= 1 << 12 || minor >= 1 << 20 {
                    return Err(WriteError::Device { major, minor });
                }
                inode.set_device(major, minor);
                if matches!(node.body, Body::Character { .. }) {
                    FileType::Character
                } else {
                    FileType::Block
                }
            }
            Body::Fifo => FileType::Fifo,
            Body::Socket => FileType::Socket,
        };
        self.put_inode(ino, inode, kind, prepared, blocks)
    }

    /// Writes a directory. The root gets `lost+found` on top, unless an entry has that name.
    ///
    /// # Errors
    /// As with [`Writer::put`].
    pub fn put_directory(&mut self, ino: Ino, directory: &Directory<'_>) -> Result<()> {
        let prepared = self.prepare(ino, &directory.attributes, directory.xattrs)?;
        let mut all;
        let mut entries = directory.entries;
        let own = entries.iter().find(|entry| ino == ino::ROOT && entry.name == LOST_AND_FOUND);
        if own.is_some_and(|entry| entry.file_type != FileType::Directory) {
            return Err(WriteError::LostAndFound);
        }
        if ino == ino::ROOT && own.is_none() {
            all = entries.to_vec();
            all.push(DirectoryEntry {
                name: LOST_AND_FOUND,
                ino: ino::FIRST,
                file_type: FileType::Directory,
            });
            entries = &all;
        }
        let names: Vec<&[u8]> = entries.iter().map(|entry| entry.name).collect();
        let plan = self.form.plan(&names)?;
        if own.is_some() {
            for run in std::mem::take(&mut self.lost_and_found) {
                self.space.release(run);
            }
        } else if ino == ino::ROOT {
            self.put_lost_and_found()?;
        }

        let runs = self.space.allocate(plan.blocks())?;
        let mut inode = Inode::default();
        if plan.is_hashed() {
            inode.flags = flags::INDEX.into();
            self.large_directories |= plan.is_large();
        }
        let mut places = runs.iter().flat_map(|run| run.start..run.end());
        let target = &mut self.target;
        plan.write(&self.form, ino, directory.parent, entries, self.seed.of_inode(ino, 0), |bytes| {
            target.write(places.next().expect("as many as the plan has"), bytes)
        })?;
        let children = entries.iter().filter(|entry| entry.file_type == FileType::Directory).count();
        self.put_directory_inode(ino, inode, &runs, children, prepared)
    }

    /// Writes all that is left, with this UUID.
    pub fn finish(self, uuid: [u8; 16]) -> Result<Summary> {
        finish::finish(self, uuid)
    }

    fn put_directory_inode(
        &mut self,
        ino: Ino,
        mut inode: Inode,
        runs: &[Run],
        children: usize,
        prepared: Prepared,
    ) -> Result<()> {
        let block_size = self.layout.block_size();
        let size = runs.iter().map(|run| run.length).sum::<u64>() * u64::from(block_size);
        let extents = tree::normalized(&tree::extents(runs), size, block_size)?;
        let blocks = self.set_extents(ino, &mut inode, &extents)?;
        inode.set_size(size);
        // Each child's `..`, its own `.` and its name; more than can be counted is 1 (dir_nlink).
        let links = u16::try_from(children + 2).ok().filter(|links| u32::from(*links) < MAX_LINKS);
        inode.links = links.unwrap_or(1).into();
        self.put_inode(ino, inode, FileType::Directory, prepared, blocks)
    }

    fn put_lost_and_found(&mut self) -> Result<()> {
        let runs = std::mem::take(&mut self.lost_and_found);
        let begin = self.seed.of_inode(ino::FIRST, 0);
        for (number, place) in runs.iter().flat_map(|run| run.start..run.end()).enumerate() {
            let mut block = vec![0; self.layout.block_size() as usize];
            let mut filling = Filling::new(&mut block);
            if number == 0 {
                filling.add(b".", ino::FIRST, FileType::Directory);
                filling.add(b"..", ino::ROOT, FileType::Directory);
            }
            filling.finish(begin, true);
            self.target.write(place, &block)?;
        }
        let prepared = self.own(ino::FIRST, 0o700)?;
        self.put_directory_inode(ino::FIRST, Inode::default(), &runs, 0, prepared)
    }

    fn set_symlink(&mut self, ino: Ino, inode: &mut Inode, target: &[u8]) -> Result<u64> {
        let most = self.layout.block_size() as usize - 1;
        if target.is_empty() || target.len() > most || target.contains(&0) {
            return Err(WriteError::Symlink { length: target.len(), most });
        }
        inode.set_size(target.len() as u64);
        if target.len() < inode.block.len() {
            inode.block[..target.len()].copy_from_slice(target);
            return Ok(0);
        }
        let runs = self.space.allocate(1)?;
        let mut block = vec![0; self.layout.block_size() as usize];
        block[..target.len()].copy_from_slice(target);
        self.target.write(runs[0].start, &block)?;
        self.set_extents(ino, inode, &tree::extents(&runs))
    }

    /// Gives an inode these extents, normalized; the blocks that it has then, those of the tree included.
    pub(crate) fn set_extents(&mut self, ino: Ino, inode: &mut Inode, extents: &[Extent]) -> Result<u64> {
        let begin = self.seed.of_inode(ino, inode.generation.get());
        let block_size = self.layout.block_size();
        let Tree { root, blocks } = tree::build(extents, begin, block_size, |block| {
            let place = self.space.one()?;
            self.target.write(place, block)?;
            Ok::<_, super::error::WriteError>(place)
        })?;
        inode.block = root;
        inode.flags = (inode.flags.get() | flags::EXTENTS).into();
        Ok(blocks + extents.iter().map(|extent| u64::from(extent.length)).sum::<u64>())
    }

    /// Looks at all of an inode that can be refused, before anything is taken for it.
    fn prepare(&self, ino: Ino, attributes: &Attributes, xattrs: &[Xattr]) -> Result<Prepared> {
        self.inodes.is_to_come(ino)?;
        if attributes.mode & !0o7777 != 0 {
            return Err(WriteError::Mode(attributes.mode));
        }
        let Attributes { atime, ctime, mtime, crtime, .. } = *attributes;
        if let Some(bad) = [atime, ctime, mtime, crtime].iter().find(|time| !time.fits()) {
            return Err(WriteError::Time(bad.seconds));
        }
        Ok(Prepared { attributes: *attributes, xattrs: xattrs::split(xattrs, self.layout.block_size())? })
    }

    /// An inode of the filesystem's own: root's, made when the filesystem was.
    pub(crate) fn own(&self, ino: Ino, mode: u16) -> Result<Prepared> {
        let time = self.layout.settings.time;
        let attributes =
            Attributes { mode, uid: 0, gid: 0, atime: time, ctime: time, mtime: time, crtime: time };
        self.prepare(ino, &attributes, &[])
    }

    /// Puts an inode into its table; `blocks` are those of its content and tree.
    pub(crate) fn put_inode(
        &mut self,
        ino: Ino,
        mut inode: Inode,
        kind: FileType,
        prepared: Prepared,
        blocks: u64,
    ) -> Result<()> {
        inode.mode = kind.mode().into();
        inode.set_attributes(&prepared.attributes);
        let mut bytes = [0; INODE_SIZE as usize];
        prepared.xattrs.put_into(&mut bytes);
        let place = self.blocks_of_xattrs.place(prepared.xattrs, &mut self.space, &mut self.target)?;
        inode.set_xattr_block(place.unwrap_or(0));
        inode.set_blocks(blocks + u64::from(place.is_some()), self.layout.block_size());
        bytes[..size_of::<Inode>()].copy_from_slice(inode.as_bytes());
        self.inodes.put(ino, bytes, kind == FileType::Directory, &self.layout, &mut self.target)
    }
}
