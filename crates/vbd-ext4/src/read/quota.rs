//! Quota files.

use super::inode::Inode;
use super::{Error, Filesystem, Place, Result};
use crate::format::quota::{Entry, Kind, PAGE, Pages, Tree, TreeError};

/// A quota file that is read.
struct File<'a> {
    filesystem: &'a Filesystem,
    inode: Inode,
}

enum Failure {
    Tree(TreeError),
    Read(Error),
}

impl From<TreeError> for Failure {
    fn from(error: TreeError) -> Failure {
        Failure::Tree(error)
    }
}

impl Pages for File<'_> {
    type Error = Failure;

    fn count(&self) -> u32 {
        u32::try_from(self.inode.size().div_ceil(PAGE as u64)).unwrap_or(u32::MAX)
    }

    fn page(&self, number: u32) -> std::result::Result<[u8; PAGE], Failure> {
        let mut page = [0; PAGE];
        let at = u64::from(number) * PAGE as u64;
        self.filesystem.read_at(&self.inode, at, &mut page).map_err(Failure::Read)?;
        Ok(page)
    }
}

impl Filesystem {
    /// What the quota file of a kind counts, by number; nothing where the filesystem has none.
    ///
    /// # Errors
    ///
    /// A damaged file, and those of reading.
    pub fn quotas(&self, kind: Kind) -> Result<Vec<Entry>> {
        let number = self.superblock().quota_inum(kind);
        if number == 0 {
            return Ok(Vec::new());
        }
        let file = File { filesystem: self, inode: self.inode(number)? };
        let mut entries = Vec::new();
        let walked =
            Tree::open(&file, kind).and_then(|tree| tree.walk(&file, &mut |entry| entries.push(*entry)));
        match walked {
            Ok(()) => Ok(entries),
            Err(Failure::Read(error)) => Err(error),
            Err(Failure::Tree(error)) => Err(Error::corrupt(Place::Quota(kind), error.to_string())),
        }
    }
}
