//! Paths.

use super::hashed::Hashed;
use super::inode::Inode;
use super::{Error, Filesystem, Result};
use crate::format::{FileType, Ino, ino};

/// How many symbolic links a path may lead through, as in the kernel.
const MAX_LINKS: u32 = 40;
/// Bytes that a path may have, the targets of its links included.
const MAX_PATH: usize = 1 << 16;

/// What is done with a path whose last part is a symbolic link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// Its target is what is meant.
    Follow,
    /// The link itself is meant.
    Keep,
}

impl Filesystem {
    /// The root directory.
    ///
    /// # Errors
    ///
    /// One that is damaged or is no directory.
    pub fn root(&self) -> Result<Inode> {
        let root = self.inode(ino::ROOT)?;
        if root.file_type() != FileType::Directory {
            return Err(Error::corrupt(super::Place::Inode(ino::ROOT), "the root is no directory"));
        }
        Ok(root)
    }

    /// What a path leads to. It begins at the root whether or not it begins with a slash, `..` does not lead out of the
    /// root, and links are followed inside.
    ///
    /// # Errors
    ///
    /// A path to nothing, through something that is no directory or through too many links; those of reading.
    pub fn lookup(&self, path: &[u8], links: Links) -> Result<Inode> {
        let mut at = vec![self.root()?];
        let mut followed = 0;
        // What is left of the path, the next part last.
        let mut left: Vec<Vec<u8>> = Vec::new();
        let mut length = path.len();
        push(&mut left, path);
        while let Some(part) = left.pop() {
            let directory = at.last().ok_or_else(|| Error::NotFound(path.to_vec()))?;
            if directory.file_type() != FileType::Directory {
                return Err(Error::NotDirectory(path.to_vec()));
            }
            match &part[..] {
                b"" | b"." => continue,
                b".." => {
                    if at.len() > 1 {
                        at.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let found = self.find(directory, &part)?.ok_or_else(|| Error::NotFound(path.to_vec()))?;
            if found.file_type() != FileType::Symlink || links == Links::Keep && left.is_empty() {
                at.push(found);
                continue;
            }
            let target = self.read_link(&found)?;
            (followed, length) = (followed + 1, length + target.len());
            if followed > MAX_LINKS || length > MAX_PATH {
                return Err(Error::Links(path.to_vec()));
            }
            if target.starts_with(b"/") {
                at.truncate(1);
            }
            push(&mut left, &target);
        }
        at.pop().ok_or_else(|| Error::NotFound(path.to_vec()))
    }

    /// The entry of that name.
    fn find(&self, directory: &Inode, name: &[u8]) -> Result<Option<Inode>> {
        match self.find_hashed(directory, name) {
            Hashed::Found(entry) => return self.entry(&entry).map(Some),
            Hashed::Absent => return Ok(None),
            Hashed::Unknown => {}
        }
        for entry in self.entries(directory)? {
            let entry = entry?;
            if entry.name == name {
                return self.entry(&entry).map(Some);
            }
        }
        Ok(None)
    }

    /// The number of the inode that a path leads to; for those who only want to know whether it is there.
    ///
    /// # Errors
    ///
    /// Those of [`Filesystem::lookup`], but for a path to nothing.
    pub fn number_of(&self, path: &[u8]) -> Result<Option<Ino>> {
        match self.lookup(path, Links::Follow) {
            Ok(inode) => Ok(Some(inode.number())),
            Err(Error::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Puts the parts of a path before what is left. A slash at the end is an empty part: it asks for a directory.
fn push(left: &mut Vec<Vec<u8>>, path: &[u8]) {
    left.extend(path.rsplit(|&byte| byte == b'/').map(<[u8]>::to_vec));
}
