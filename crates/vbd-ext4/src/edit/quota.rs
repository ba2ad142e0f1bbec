//! Quotas: what owners, groups and projects use, kept right with every change; and the projects of new entries.
//!
//! Whatever changes an inode goes through one place, where the difference in what it counts for is noted. At the end of an
//! operation the differences go into the quota files, as changed blocks of metadata like all others.

use std::collections::BTreeMap;

use super::inodes::Raw;
use super::map::Mapped;
use super::{EditError, Editor, Result};
use crate::format::inode::{Inode, flags};
use crate::format::quota::{Entry, Kind, PAGE, Pages, PagesMut, Tree, TreeError};
use crate::format::superblock::ro_compat;
use crate::format::{Block, Extent, Ino};
use crate::read::Place;

/// Differences that are not in the quota files yet: bytes and inodes, by whose they are.
#[derive(Debug, Default)]
pub(super) struct Usage(BTreeMap<(Kind, u32), (i64, i64)>);

impl Usage {
    /// An inode became another one.
    pub(super) fn replace(&mut self, old: &[u8], new: &[u8], block_size: u32) {
        for (bytes, sign) in [(old, -1), (new, 1)] {
            let fields = Inode::read(bytes);
            if fields.links.get() == 0 || fields.flags.get() & flags::EA_INODE != 0 {
                continue;
            }
            let space = i64::try_from(fields.sectors(block_size).saturating_mul(512)).unwrap_or(i64::MAX);
            let ids = [
                (Kind::User, fields.uid()),
                (Kind::Group, fields.gid()),
                (Kind::Project, fields.project.get()),
            ];
            for key in ids {
                let change = self.0.entry(key).or_default();
                change.0 = change.0.saturating_add(sign * space);
                change.1 = change.1.saturating_add(sign);
            }
        }
    }
}

/// Whether new entries of a directory are of its project.
fn hands_on(directory: &Raw) -> bool {
    directory.has(flags::PROJECT_INHERIT)
}

impl Editor {
    /// Whether an inode counts for those whose it is: not those of the filesystem itself.
    pub(super) fn counts_usage(&self, ino: Ino) -> bool {
        self.superblock().has_ro_compat(ro_compat::QUOTA) && !self.is_own(ino)
    }

    /// A new entry is of the project that its directory hands on, and does so itself where it is a directory.
    pub(super) fn inherit_project(&self, directory: &Raw, raw: &mut Raw) {
        if !self.superblock().has_ro_compat(ro_compat::PROJECT) || !hands_on(directory) {
            return;
        }
        raw.set_project(directory.fields.project.get());
        if raw.is_directory() {
            raw.set_flag(flags::PROJECT_INHERIT, true);
        }
    }

    /// What is in a directory that hands on its project is of that project: the kernel refuses others, too.
    pub(super) fn is_of_project(&self, directory: &Raw, raw: &Raw) -> Result<()> {
        if self.superblock().has_ro_compat(ro_compat::PROJECT)
            && hands_on(directory)
            && directory.fields.project != raw.fields.project
        {
            let why = "is of another project than the directory that it would get a name in; copy it instead";
            return Err(EditError::Kind { ino: raw.ino, why });
        }
        Ok(())
    }

    /// Puts what changed into the quota files.
    pub(super) fn settle_usage(&mut self) -> Result<()> {
        let changes = std::mem::take(&mut self.usage.0);
        for kind in Kind::ALL {
            let ino = self.superblock().quota_inum(kind);
            let mut changes = changes
                .iter()
                .filter(|((of, _), change)| *of == kind && **change != (0, 0))
                .map(|((_, id), (space, inodes))| (*id, *space, *inodes))
                .peekable();
            if ino == 0 || changes.peek().is_none() {
                continue;
            }
            let failed = |failure: Failure| match failure {
                Failure::Tree(error) => EditError::corrupt(Place::Quota(kind), error.to_string()),
                Failure::Edit(error) => error,
            };
            let mut file = File::open(self, ino)?;
            let mut tree = Tree::open(&file, kind).map_err(failed)?;
            for (id, space, inodes) in changes {
                let mut entry = tree.find(&file, id).map_err(failed)?.unwrap_or_else(|| Entry::new(id));
                entry.add(space, inodes);
                tree.set(&mut file, entry).map_err(failed)?;
            }
            file.close()?;
        }
        Ok(())
    }
}

/// What can go wrong with a quota file.
#[derive(Debug)]
enum Failure {
    Tree(TreeError),
    Edit(EditError),
}

impl From<TreeError> for Failure {
    fn from(error: TreeError) -> Failure {
        Failure::Tree(error)
    }
}

impl From<EditError> for Failure {
    fn from(error: EditError) -> Failure {
        Failure::Edit(error)
    }
}

impl From<crate::read::Error> for Failure {
    fn from(error: crate::read::Error) -> Failure {
        Failure::Edit(error.into())
    }
}

/// A quota file that is being changed.
struct File<'a> {
    editor: &'a mut Editor,
    raw: Raw,
    mapped: Mapped,
    /// Whether it became longer.
    longer: bool,
}

impl<'a> File<'a> {
    fn open(editor: &'a mut Editor, ino: Ino) -> Result<File<'a>> {
        let raw = editor.load(ino)?;
        let mapped = editor.mapped(&raw)?;
        Ok(File { editor, raw, mapped, longer: false })
    }

    /// The block with a page, where there is one, and where in it the page is.
    fn place(&self, number: u32) -> (u32, Option<Block>, usize) {
        let size = u64::from(self.editor.block_size());
        let at = u64::from(number) * PAGE as u64;
        // A page's number has 32 bits, and a block has a page or more.
        let logical = u32::try_from(at / size).unwrap_or(u32::MAX);
        let extents = &self.mapped.extents;
        let after = extents.partition_point(|extent| extent.logical <= logical);
        let block = after.checked_sub(1).map(|number| extents[number]).filter(|extent| {
            u64::from(logical) < u64::from(extent.logical) + u64::from(extent.length) && !extent.unwritten
        });
        let block = block.map(|extent| extent.physical + u64::from(logical - extent.logical));
        (logical, block, usize::try_from(at % size).unwrap_or(0))
    }

    fn named(&self) -> Place {
        Place::Inode(self.raw.ino)
    }

    /// Puts the inode back where that changed.
    fn close(self) -> Result<()> {
        if self.longer { self.editor.store(self.raw) } else { Ok(()) }
    }
}

impl Pages for File<'_> {
    type Error = Failure;

    fn count(&self) -> u32 {
        u32::try_from(self.raw.fields.size().div_ceil(PAGE as u64)).unwrap_or(u32::MAX)
    }

    fn page(&self, number: u32) -> std::result::Result<[u8; PAGE], Failure> {
        let mut page = [0; PAGE];
        if let (_, Some(block), at) = self.place(number) {
            let bytes = self.editor.filesystem.blocks.metadata(block, self.named())?;
            page.copy_from_slice(&bytes[at..at + PAGE]);
        }
        Ok(page)
    }
}

impl PagesMut for File<'_> {
    fn put(&mut self, number: u32, page: &[u8; PAGE]) -> std::result::Result<(), Failure> {
        let (logical, block, at) = self.place(number);
        let block = match block {
            Some(block) => block,
            None => {
                let covered = self.mapped.extents.iter().any(|extent| {
                    (extent.logical..extent.logical.saturating_add(extent.length)).contains(&logical)
                });
                if covered {
                    let reason = format!("its block {logical} was never written");
                    return Err(EditError::corrupt(self.named(), reason).into());
                }
                let block = self.editor.allocate_one(self.editor.group_of(self.raw.ino))?;
                let bytes = vec![0; self.editor.block_size() as usize];
                self.editor.filesystem.blocks.stage(block, bytes.into());
                let new = Extent { logical, physical: block, length: 1, unwritten: false };
                let after = self.mapped.extents.partition_point(|extent| extent.logical <= logical);
                self.mapped.extents.insert(after, new);
                let nodes = std::mem::take(&mut self.mapped.nodes);
                self.editor.set_map(&mut self.raw, &nodes, &self.mapped.extents)?;
                self.mapped = self.editor.mapped(&self.raw)?;
                self.longer = true;
                block
            }
        };
        let end = (u64::from(number) + 1) * PAGE as u64;
        if end > self.raw.fields.size() {
            self.raw.fields.set_size(end);
            self.longer = true;
        }
        let place = self.named();
        self.editor.filesystem.blocks.change(block, place)?[at..at + PAGE].copy_from_slice(page);
        Ok(())
    }
}
