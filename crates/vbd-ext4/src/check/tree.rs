//! The tree that directories make, and how many names everything has.

use std::collections::BTreeSet;

use super::Checker;
use crate::format::directory::MAX_LINKS;
use crate::format::superblock::ro_compat;
use crate::format::{FileType, Ino, ino};
use crate::read::Place;

impl Checker<'_> {
    pub(super) fn tree(&mut self) {
        self.connected();
        let names = self.superblock.has_ro_compat(ro_compat::DIR_NLINK);
        let wrong: Vec<(Ino, u32, u32)> = self
            .inodes
            .iter()
            .filter(|inode| !inode.own && u32::from(inode.links) != inode.found)
            .filter(|inode| {
                // A directory with too many subdirectories says 1, and goes on to when they have become fewer.
                let uncounted = inode.kind == Some(FileType::Directory) && names && inode.links == 1;
                !uncounted
            })
            .map(|inode| (inode.ino, u32::from(inode.links), inode.found))
            .collect();
        for (ino, links, found) in wrong {
            let reason = match found {
                0 => format!("it is in no directory, and says that it has {links} names"),
                _ if found > MAX_LINKS => {
                    format!("it has {found} names, more than there may be, and says {links}")
                }
                _ => format!("it says that it has {links} names, and has {found}"),
            };
            self.bad(Place::Inode(ino), reason);
        }
    }

    /// Whether every directory is below the root, and its `..` leads to where it is.
    fn connected(&mut self) {
        let (mut reached, mut lost) = (BTreeSet::from([ino::ROOT]), BTreeSet::new());
        let numbers: Vec<Ino> = self.directories.keys().copied().collect();
        for number in numbers {
            let Some(own) = self.directories.get(&number) else { continue };
            let parent = if number == ino::ROOT { ino::ROOT } else { own.parent };
            let orphan = self.orphans.contains(&number);
            if own.above != parent && parent != 0 && own.above != 0 {
                let above = own.above;
                self.bad(
                    Place::Inode(number),
                    format!("its .. leads to inode {above}, and it is in inode {parent}"),
                );
            }
            // From here up, until something known is met, or the path leads to itself.
            let mut path = BTreeSet::new();
            let mut at = number;
            while !reached.contains(&at) && !lost.contains(&at) && path.insert(at) {
                match self.directories.get(&at).map(|own| own.parent).filter(|above| *above != 0) {
                    Some(above) => at = above,
                    None => break,
                }
            }
            if reached.contains(&at) {
                reached.extend(path);
                continue;
            }
            lost.extend(path);
            if !orphan {
                self.bad(Place::Inode(number), "this directory cannot be reached from the root");
            }
        }
    }
}
