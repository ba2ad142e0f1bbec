//! Squashfs 4.0 as a source: every kind of entry, with its attributes, holes and further names, in each of the
//! compressions that mksquashfs has. The format: Documentation/filesystems/squashfs.rst in the kernel's sources, and
//! "Squashfs Binary Format" by the authors of squashfs-tools-ng.
//!
//! Everything in an image is hostile until checked: what is kept in memory of it has a limit, and no directory is
//! entered twice.

mod block;
mod content;
mod directory;
mod inode;
mod lzo;
mod metadata;
mod superblock;
mod xattr;

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::archive::{about, damaged};
use crate::entry::{Entry, Node, Sink};
use crate::tar::clean_path;
use crate::{Error, Progress};

use content::{FileData, Fragments};
use inode::{Body, Inode, Reference};
use metadata::{Metadata, Table};
use superblock::Superblock;
use xattr::Xattrs;

pub use content::fuzz;

/// More names of files with several are no honest image's.
const NAMES: usize = 4 << 20;

/// Whether it starts as an image does, those of big-endian machines included, which are then refused by name.
pub(crate) fn is_squashfs(start: &[u8]) -> bool {
    start.starts_with(b"hsqs") || start.starts_with(b"sqsh")
}

/// Bytes that are read here and there.
pub(crate) trait ReadAt {
    /// Reads exactly so many bytes.
    fn exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// How many there are.
    fn length(&self) -> u64;
}

/// A part of a file.
pub(crate) struct Part {
    pub(crate) file: File,
    pub(crate) start: u64,
    pub(crate) length: u64,
}

impl ReadAt for Part {
    fn exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let at = self.start.checked_add(offset).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.file.read_exact_at(buffer, at)
    }

    fn length(&self) -> u64 {
        self.length
    }
}

impl ReadAt for &[u8] {
    fn exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let from = usize::try_from(offset).ok().and_then(|offset| self.get(offset..));
        let bytes = from.and_then(|from| from.get(..buffer.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }

    fn length(&self) -> u64 {
        self.len() as u64
    }
}

/// Reads bytes of the image, which must all be there.
fn read(source: &dyn ReadAt, offset: u64, length: usize) -> Result<Vec<u8>, String> {
    let end = offset.checked_add(length as u64).filter(|&end| end <= source.length());
    if end.is_none() {
        return Err(format!("is cut off or damaged: it says that there is something at byte {offset}"));
    }
    let mut bytes = vec![0; length];
    source.exact_at(&mut bytes, offset).map_err(|e| format!("cannot be read at byte {offset}: {e}"))?;
    Ok(bytes)
}

/// Sends the entries of an image to `sink`, each directory's own before those in it, ordered by their names.
///
/// # Errors
///
/// An image that is damaged, hostile or of another version; the entry that cannot be taken, by its name.
pub(crate) fn unpack(
    source: &dyn ReadAt,
    archive: &str,
    sink: &mut dyn Sink,
    progress: &mut dyn Progress,
) -> crate::Result<()> {
    let image = Image::open(source).map_err(|reason| damaged(archive, Path::new(""), reason))?;
    let walk = Walk {
        image,
        archive,
        entered: HashSet::new(),
        linked: HashMap::new(),
        fragments: Fragments::default(),
    };
    walk.run(sink, progress)
}

/// An image whose tables were found.
struct Image<'a> {
    source: &'a dyn ReadAt,
    superblock: Superblock,
    inodes: Metadata<'a>,
    directories: Metadata<'a>,
    /// Users and groups.
    ids: Table<'a>,
    fragments: Option<Table<'a>>,
    xattrs: Option<Xattrs<'a>>,
}

impl<'a> Image<'a> {
    fn open(source: &'a dyn ReadAt) -> Result<Image<'a>, String> {
        let superblock = Superblock::parse(&read(source, 0, superblock::SIZE)?, source.length())?;
        let compression = superblock.compression;
        let part = |start, end| Metadata::new(source, compression, start, end);
        let fragments = superblock
            .fragments
            .map(|(start, count)| Table::new(source, compression, start, count.into(), content::FRAGMENT));
        let xattrs = superblock.xattrs.map(|start| Xattrs::open(source, compression, start));
        Ok(Image {
            source,
            inodes: part(superblock.inodes, superblock.directories),
            directories: part(superblock.directories, superblock.directories_end),
            ids: Table::new(source, compression, superblock.ids.0, superblock.ids.1.into(), 4)?,
            fragments: fragments.transpose()?,
            xattrs: xattrs.transpose()?,
            superblock,
        })
    }
}

struct Walk<'a> {
    image: Image<'a>,
    archive: &'a str,
    /// Directories that were entered.
    entered: HashSet<Reference>,
    /// The first name of each file that has several.
    linked: HashMap<Reference, PathBuf>,
    fragments: Fragments,
}

impl Walk<'_> {
    fn run(mut self, sink: &mut dyn Sink, progress: &mut dyn Progress) -> crate::Result<()> {
        let mut todo = vec![(PathBuf::new(), self.image.superblock.root)];
        // Each byte of the directories' table is in one directory: more is a listing that is read again and again.
        let mut listed = 0;
        while let Some((path, reference)) = todo.pop() {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            let bad = |reason: String| damaged(self.archive, &path, reason);
            let inode = self.inode(reference).map_err(bad)?;
            let Body::Directory(listing) = &inode.body else {
                if path.as_os_str().is_empty() {
                    return Err(bad("has a root that is no directory".to_owned()));
                }
                self.entry(&path, reference, inode, sink, progress)?;
                continue;
            };
            if !self.entered.insert(reference) {
                return Err(bad("is a directory that is in another one already".to_owned()));
            }
            let xattrs = self.xattrs(&path, &inode)?;
            let own = Entry { path: &path, meta: inode.meta, xattrs: &xattrs, node: Node::Directory };
            self.add(own, sink, progress)?;
            let bad = |reason: String| damaged(self.archive, &path, reason);
            listed += u64::from(listing.size);
            if listed > self.image.directories.most() {
                return Err(bad("is one of more directories than there is room for".to_owned()));
            }
            let entries = directory::list(&mut self.image.directories, listing).map_err(bad)?;
            let below = entries.into_iter().rev().map(|(name, reference)| {
                let plain = !name.contains(&b'/') && name != b"." && name != b"..";
                let mut whole = path.clone().into_os_string().into_vec();
                if !whole.is_empty() {
                    whole.push(b'/');
                }
                whole.extend_from_slice(&name);
                let shown = PathBuf::from(OsString::from_vec(whole.clone()));
                let clean = clean_path(&whole).and_then(|clean| match plain && !name.is_empty() {
                    true => Ok(clean),
                    false => Err("has a name that no directory can have".to_owned()),
                });
                clean.map(|clean| (clean, reference)).map_err(|reason| damaged(self.archive, &shown, reason))
            });
            let below: Vec<(PathBuf, Reference)> = below.collect::<crate::Result<_>>()?;
            todo.extend(below);
        }
        Ok(())
    }

    fn inode(&mut self, reference: Reference) -> Result<Inode, String> {
        let Image { inodes, ids, superblock, .. } = &mut self.image;
        Inode::read(inodes, ids, superblock, reference)
    }

    /// Sends what is no directory.
    fn entry(
        &mut self,
        path: &Path,
        reference: Reference,
        inode: Inode,
        sink: &mut dyn Sink,
        progress: &mut dyn Progress,
    ) -> crate::Result<()> {
        let (meta, xattrs) = (inode.meta, self.xattrs(path, &inode)?);
        let entry = |node| Entry { path, meta, xattrs: &xattrs, node };
        if inode.links > 1 {
            if let Some(first) = self.linked.get(&reference) {
                let node = Node::HardLink(first.clone());
                return self.add(entry(node), sink, progress);
            }
            if self.linked.len() >= NAMES {
                let reason = format!("is one of more than {NAMES} files with several names");
                return Err(damaged(self.archive, path, reason));
            }
            self.linked.insert(reference, path.to_owned());
        }
        match &inode.body {
            Body::Directory(_) => self.add(entry(Node::Directory), sink, progress),
            Body::Symlink(target) => {
                let target = PathBuf::from(OsString::from_vec(target.clone()));
                self.add(Entry { path, meta, xattrs: &xattrs, node: Node::Symlink(&target) }, sink, progress)
            }
            Body::Device { kind, major, minor } => {
                let node = Node::Device { kind: *kind, major: *major, minor: *minor };
                self.add(entry(node), sink, progress)
            }
            Body::File(file) => {
                let mut data = FileData::new(&mut self.image, &mut self.fragments, file);
                let node = Node::File { size: file.size, content: &mut data };
                let added = sink.add(Entry { path, meta, xattrs: &xattrs, node }, progress);
                match data.failure.take() {
                    Some(reason) => Err(damaged(self.archive, path, reason)),
                    None => added.map_err(|e| about(e, self.archive, path)),
                }
            }
        }
    }

    fn add(&self, entry: Entry<'_>, sink: &mut dyn Sink, progress: &mut dyn Progress) -> crate::Result<()> {
        let path = entry.path;
        sink.add(entry, progress).map_err(|e| about(e, self.archive, path))
    }

    fn xattrs(&mut self, path: &Path, inode: &Inode) -> crate::Result<Vec<crate::entry::Xattr>> {
        let xattrs = self.image.xattrs.as_mut();
        let found = match (inode.xattrs, xattrs) {
            (Some(number), Some(xattrs)) => xattrs.get(number),
            (Some(_), None) => Err("has attributes, of which there is no table".to_owned()),
            (None, _) => Ok(Vec::new()),
        };
        found.map_err(|reason| damaged(self.archive, path, reason))
    }
}
