//! A filesystem read back: every entry, attribute and byte, against the plan that it was made from.
//!
//! The reader shares no code with the writer but the structures on the disk. What content was when it was placed, sums
//! tell that were taken then; content that is shared with the source is compared with the source.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vbd_ext4::format::{FileType, Ino};
use vbd_ext4::read::{self, Filesystem, Inode, Options, Part};

use super::base::Base;
use super::blocks::{PIECE, Piece, SIZE};
use super::emit;
use crate::plan::{BLOCK, Body, NodeId, Plan};
use crate::{Error, Progress, Result};

/// A sum over blocks and their places in a file.
pub(super) fn sum(mut sum: u32, bytes: &[u8], pieces: &[Piece]) -> u32 {
    let blocks = pieces.iter().flat_map(|piece| piece.logical..piece.logical + piece.count);
    for (block, data) in blocks.zip(bytes.chunks(SIZE)) {
        sum = crc32c::crc32c_append(sum, &block.to_le_bytes());
        sum = crc32c::crc32c_append(sum, data);
    }
    sum
}

/// What is compared.
pub(super) struct Verify<'a> {
    pub(super) plan: &'a Plan,
    /// By the first block of each file whose content was copied.
    pub(super) sums: &'a HashMap<u64, u32>,
    pub(super) base: Option<&'a Base>,
}

impl Verify<'_> {
    /// Reads the filesystem of `size` bytes at `offset`.
    ///
    /// # Errors
    ///
    /// The first entry that is not what it should be; damage.
    pub(super) fn run(&self, image: File, offset: u64, size: u64, progress: &mut dyn Progress) -> Result<()> {
        let root = Path::new("");
        let filesystem = Filesystem::open(Part::new(image, offset, size), Options::default());
        let filesystem = filesystem.map_err(|e| damaged(root, &e))?;
        let mut numbers: Vec<Ino> = vec![0; self.plan.nodes()];
        let number = filesystem.root().map_err(|e| damaged(root, &e))?.number();
        numbers[self.plan.root().index()] = number;
        for (directory, children) in self.plan.directories() {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            let path = self.plan.directory_path(directory);
            let inode = filesystem.inode(numbers[directory.index()]).map_err(|e| damaged(&path, &e))?;
            self.entry(&filesystem, &inode, directory, &path)?;
            let mut found = HashMap::new();
            for entry in filesystem.entries(&inode).map_err(|e| damaged(&path, &e))? {
                let entry = entry.map_err(|e| damaged(&path, &e))?;
                found.insert(entry.name, entry.inode);
            }
            for name in children {
                let node = self.plan.target(name);
                let path = self.plan.path(name);
                let Some(number) = found.remove(self.plan.name(name)) else {
                    return Err(wrong(&path, "it is missing".to_owned()));
                };
                let known = std::mem::replace(&mut numbers[node.index()], number);
                if known != 0 && known != number {
                    return Err(wrong(&path, "it is not the same file as under its other name".to_owned()));
                }
                // Directories come by themselves.
                if known == 0 && !self.plan.node(node).is_directory() {
                    let inode = filesystem.inode(number).map_err(|e| damaged(&path, &e))?;
                    self.entry(&filesystem, &inode, node, &path)?;
                    self.content(&filesystem, &inode, node, &path, progress)?;
                }
            }
            let ours = [&b"."[..], b"..", b"lost+found"];
            if let Some(more) = found.keys().find(|name| !ours.contains(&name.as_slice())) {
                let name = String::from_utf8_lossy(more).into_owned();
                return Err(wrong(&path.join(name), "it was not to be there".to_owned()));
            }
        }
        Ok(())
    }

    /// Everything about an entry but a file's content.
    fn entry(&self, filesystem: &Filesystem, inode: &Inode, node: NodeId, path: &Path) -> Result<()> {
        let wanted = self.plan.node(node);
        let differs = |what: &str| Err(wrong(path, format!("its {what} is another")));
        if inode.file_type() != emit::file_type(&wanted.body) {
            return differs("type");
        }
        if inode.attributes() != emit::attributes(&wanted.meta) {
            return differs("owner, mode or time");
        }
        let mut xattrs = emit::xattrs(self.plan, node);
        xattrs.sort();
        if filesystem.xattrs(inode).map_err(|e| damaged(path, &e))? != xattrs {
            return differs("set of extended attributes");
        }
        let links = inode.file_type() == FileType::Directory || u32::from(inode.links()) == wanted.links;
        let same = match &wanted.body {
            Body::Directory(_) => true,
            Body::File { size, .. } => inode.size() == *size,
            Body::Symlink(target) => {
                filesystem.read_link(inode).map_err(|e| damaged(path, &e))? == self.plan.text(*target)
            }
            Body::Device { major, minor, .. } => {
                inode.device().is_none_or(|device| device == (*major, *minor))
            }
        };
        if links && same { Ok(()) } else { differs("number of names, size, target or device") }
    }

    fn content(
        &self,
        filesystem: &Filesystem,
        inode: &Inode,
        node: NodeId,
        path: &Path,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let Body::File { size, data } = &self.plan.node(node).body else { return Ok(()) };
        let known = data.runs().first().map(|run| self.sums.get(&run.block).copied());
        let source = match (known, self.base) {
            (Some(None), Some(base)) => Some(
                base.open_file(path).map_err(|e| wrong(path, format!("the source cannot be read: {e}")))?,
            ),
            _ => None,
        };
        let (mut all, mut buffer, mut other) = (0, Vec::new(), Vec::new());
        for range in filesystem.data(inode, 0).map_err(|e| damaged(path, &e))? {
            let range = range.map_err(|e| damaged(path, &e))?;
            let mut at = range.start - range.start % BLOCK;
            while at < range.end.min(*size) {
                if progress.cancelled() {
                    return Err(Error::Interrupted);
                }
                let length =
                    usize::try_from(range.end - at).unwrap_or(PIECE).next_multiple_of(SIZE).min(PIECE);
                buffer.clear();
                buffer.resize(length, 0);
                read_whole(filesystem, inode, at, &mut buffer).map_err(|e| damaged(path, &e))?;
                let logical = super::blocks::block_number(at / BLOCK).unwrap_or(u32::MAX);
                let count = u32::try_from(length / SIZE).unwrap_or(0);
                all = sum(all, &buffer, &[Piece { logical, count }]);
                if let Some(source) = &source {
                    other.clear();
                    other.resize(length, 0);
                    let end = usize::try_from(size - at).unwrap_or(length).min(length);
                    let read = source.read_exact_at(&mut other[..end], at);
                    if read.is_err() || other != buffer {
                        return Err(wrong(path, "its content is another than the source's".to_owned()));
                    }
                }
                at += length as u64;
                progress.advance(length as u64);
            }
        }
        // One that is all zeros has no blocks, and its sum is that of nothing.
        if source.is_none() && all != known.flatten().unwrap_or(0) {
            return Err(wrong(path, "its content is another".to_owned()));
        }
        Ok(())
    }
}

/// Reads up to the end of the file; what is after it stays zero.
fn read_whole(filesystem: &Filesystem, inode: &Inode, start: u64, buffer: &mut [u8]) -> read::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match filesystem.read_at(inode, start + filled as u64, &mut buffer[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(())
}

fn wrong(path: &Path, reason: String) -> Error {
    Error::Verify { path: emit::shown(path), reason }
}

fn damaged(path: &Path, error: &read::Error) -> Error {
    let path: PathBuf = emit::shown(path);
    Error::Verify { path, reason: error.to_string() }
}
