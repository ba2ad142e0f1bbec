//! Reading out of the root filesystem that was made.

use std::fs::File;
use std::io::{self, Read};

use vbd_ext4::format::FileType;
use vbd_ext4::read::{Error as ReadError, Filesystem, Inode, Links, Options, Part};

use crate::{Error, Result};

/// A tree that is in an image, for whoever wants files of it. Paths are absolute, and links in them stay in the tree.
pub(crate) struct Tree {
    filesystem: Filesystem,
}

fn failed(what: &str) -> impl Fn(ReadError) -> Error + '_ {
    move |e| Error::io(format!("cannot read {what} in the new filesystem"), io::Error::other(e))
}

impl Tree {
    /// The tree in the ext2, ext3 or ext4 of `size` bytes from `start` on.
    ///
    /// # Errors
    ///
    /// Those of reading.
    pub(crate) fn open(image: &File, start: u64, size: u64) -> Result<Tree> {
        let file = image.try_clone().map_err(|e| Error::io("cannot open the image again", e))?;
        let part = Part::new(file, start, size);
        Ok(Tree { filesystem: Filesystem::open(part, Options::default()).map_err(failed("the superblock"))? })
    }

    fn find(&self, path: &str) -> Result<Option<Inode>> {
        match self.filesystem.lookup(path.as_bytes(), Links::Follow) {
            Ok(inode) => Ok(Some(inode)),
            Err(ReadError::NotFound(_) | ReadError::NotDirectory(_) | ReadError::Links(_)) => Ok(None),
            Err(e) => Err(failed(path)(e)),
        }
    }

    /// The names in a directory that are text, in their order; none if there is no such directory.
    ///
    /// # Errors
    ///
    /// Those of reading.
    pub(crate) fn list(&self, directory: &str) -> Result<Vec<String>> {
        let found = self.find(directory)?.filter(|inode| inode.file_type() == FileType::Directory);
        let Some(inode) = found else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        for entry in self.filesystem.entries(&inode).map_err(failed(directory))? {
            let name = String::from_utf8(entry.map_err(failed(directory))?.name);
            names.extend(name.ok().filter(|name| name != "." && name != ".."));
        }
        names.sort();
        Ok(names)
    }

    /// A file's content; nothing if there is no such file.
    ///
    /// # Errors
    ///
    /// Those of reading.
    pub(crate) fn open_file(&self, path: &str) -> Result<Option<impl Read + '_>> {
        let found = self.find(path)?.filter(|inode| inode.file_type() == FileType::Regular);
        Ok(found.map(|inode| Content { filesystem: &self.filesystem, inode, offset: 0 }))
    }
}

struct Content<'a> {
    filesystem: &'a Filesystem,
    inode: Inode,
    offset: u64,
}

impl Read for Content<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.filesystem.read_at(&self.inode, self.offset, buffer).map_err(io::Error::other)?;
        self.offset += read as u64;
        Ok(read)
    }
}
