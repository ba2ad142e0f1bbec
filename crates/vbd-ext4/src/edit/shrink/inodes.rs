//! Inodes of groups that go, which get other numbers: with all checksums that begin with them, and all names that lead to them.

use std::collections::{BTreeMap, HashMap};

use super::super::inodes::Raw;
use super::super::map::Mapped;
use super::super::{EditError, Editor, Result};
use super::Plan;
use crate::format::directory::{NODE_COUNT, ROOT_COUNT, hash_seal, seal};
use crate::format::{FileType, Ino};
use crate::read::Place;

/// The names that lead to an inode: in which directories, by their old numbers.
type Names = BTreeMap<Ino, Vec<(Ino, Vec<u8>)>>;

impl Editor {
    /// Moves all inodes.
    pub(super) fn move_inodes(
        &mut self,
        plan: &Plan,
        progress: &mut dyn FnMut(u32, u32) -> bool,
    ) -> Result<()> {
        if self.inodes_behind(plan)? == 0 {
            return Ok(());
        }
        let names = self.names_of(plan)?;
        let mut moved: HashMap<Ino, Ino> = HashMap::new();
        for group in plan.groups..plan.old.groups {
            for ino in self.inodes_in_use(group)? {
                self.attempt(|editor| editor.move_inode(ino, &names, &mut moved))?;
                self.pace()?;
            }
            if !progress(plan.old.groups, plan.old.groups) {
                self.commit()?;
                return Err(EditError::Interrupted);
            }
        }
        self.commit()
    }

    /// Looks through all directories for names of inodes that move.
    fn names_of(&self, plan: &Plan) -> Result<Names> {
        let mut names = Names::new();
        for group in 0..plan.old.groups {
            for ino in self.inodes_in_use(group)? {
                if !self.load_any(ino)?.is_directory() {
                    continue;
                }
                let inode = self.filesystem.inode(ino)?;
                for entry in self.filesystem.entries(&inode)? {
                    let entry = entry?;
                    if entry.inode > plan.inodes() && entry.name != b"." && entry.name != b".." {
                        names.entry(entry.inode).or_default().push((ino, entry.name));
                    }
                }
            }
        }
        Ok(names)
    }

    fn move_inode(&mut self, old: Ino, names: &Names, moved: &mut HashMap<Ino, Ino>) -> Result<()> {
        let raw = self.load(old)?;
        let corrupt = |reason: &str| EditError::corrupt(Place::Inode(old), reason);
        let kind = raw.kind().ok_or_else(|| corrupt("it is of no known kind"))?;
        let names = names.get(&old).ok_or_else(|| corrupt("it is in use, and has no name"))?;
        let new = self.allocate_inode(self.group_of(old), kind)?;
        let mut copy = raw.clone();
        copy.ino = new;
        if self.has_map(&raw)? {
            let mapped = self.mapped(&raw)?;
            if kind == FileType::Directory {
                self.move_directory(&raw, &copy, &mapped)?;
            }
            if !mapped.nodes.is_empty() {
                self.set_map(&mut copy, &mapped.nodes, &mapped.extents)?;
            }
        }
        self.store(copy)?;
        for (directory, name) in names {
            let directory = moved.get(directory).unwrap_or(directory);
            // Where it is in itself is not for anybody to know any more.
            let directory = self.any_directory(*directory)?;
            let slot = self.find_entry(&directory, name)?.filter(|slot| slot.ino == old);
            let slot = slot.ok_or_else(|| corrupt("a name of it cannot be found again"))?;
            self.replace_entry(&directory, &slot, new, kind)?;
        }
        moved.insert(old, new);
        self.forget(raw)
    }

    /// The blocks of a directory become those of another number, and directories in it lead back to that.
    fn move_directory(&mut self, old: &Raw, new: &Raw, mapped: &Mapped) -> Result<()> {
        let place = Place::Inode(old.ino);
        let directory = self.any_directory(old.ino)?;
        let (begin, hashed) = (self.begin(new), directory.is_hashed());
        let mut children = Vec::new();
        {
            let inode = self.filesystem.inode(old.ino)?;
            for entry in self.filesystem.entries(&inode)? {
                let entry = entry?;
                let own = entry.name == b"." || entry.name == b"..";
                if !own && self.filesystem.inode(entry.inode)?.file_type() == FileType::Directory {
                    children.push(entry.inode);
                }
            }
        }
        for extent in &mapped.extents {
            for (logical, physical) in
                (u64::from(extent.logical)..).zip(extent.physical..).take(extent.length as usize)
            {
                let bytes = self.filesystem.blocks.metadata(physical, place)?;
                let node = hashed && self.is_node(logical, &bytes);
                drop(bytes);
                if begin.is_none() && logical > 0 {
                    continue;
                }
                let bytes = self.filesystem.blocks.change(physical, place)?;
                if logical == 0 {
                    // The entry `.` is the first.
                    bytes[..4].copy_from_slice(&new.ino.to_le_bytes());
                }
                match begin {
                    Some(begin) if node => {
                        let at = if logical == 0 { ROOT_COUNT } else { NODE_COUNT };
                        hash_seal(begin, bytes, at);
                    }
                    Some(begin) => seal(begin, bytes),
                    None => {}
                }
            }
        }
        for child in children {
            let child = self.any_directory(child)?;
            let up = self.find_entry(&child, b"..")?;
            let up = up.ok_or_else(|| EditError::corrupt(place, "a directory in it does not lead back"))?;
            self.replace_entry(&child, &up, new.ino, FileType::Directory)?;
        }
        Ok(())
    }
}
