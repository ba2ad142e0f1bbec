//! How a plan is filled: entries in the order that a source has them, and the changes of tailoring.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Body, Data, Directory, NodeId, Plan};
use crate::entry::{Content, Entry, Meta, Node, Sink, Time};
use crate::fill::Base;
use crate::{Error, Progress, Result};

/// Keeps the content of files that come but once.
pub(crate) trait Contents {
    /// Reads content to its end and keeps what is not zeros. Beyond what there is room for it is counted only.
    fn put(&mut self, content: &mut dyn Content, path: &Path, progress: &mut dyn Progress) -> Result<Data>;
    /// Content that was kept is of no use any more.
    fn release(&mut self, data: &Data);
    /// What was kept, up to `size` bytes.
    fn read(&self, data: &Data, size: usize) -> io::Result<Vec<u8>>;
    /// What was kept can be read.
    fn flush(&mut self) -> Result<()>;
    /// Whether there was more than there is room for.
    fn is_full(&self) -> bool;
}

/// What a plan may grow to before entries are counted only, so that an endless source takes no more than could be used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit {
    pub(crate) inodes: u64,
    /// For names and attributes.
    pub(crate) bytes: u64,
}

/// A plan that is being filled.
pub(crate) struct Gather<'a> {
    pub(crate) plan: Plan,
    pub(crate) contents: &'a mut dyn Contents,
    /// Where files that are not read yet are.
    pub(crate) source: Option<&'a Base>,
    limit: Limit,
    /// Inodes beyond the limit, and their blocks but for content.
    pub(crate) beyond: (u64, u64),
    /// When what the source leaves out was made.
    now: Time,
    /// The directory of the latest entry, to spare the way to it.
    latest: Option<(PathBuf, NodeId)>,
}

impl<'a> Gather<'a> {
    pub(crate) fn new(
        plan: Plan,
        contents: &'a mut dyn Contents,
        source: Option<&'a Base>,
        limit: Limit,
        now: Time,
    ) -> Gather<'a> {
        Gather { plan, contents, source, limit, beyond: (0, 0), now, latest: None }
    }

    /// A directory may be gone: the way to the next entry is looked for anew.
    pub(crate) fn forget(&mut self) {
        self.latest = None;
    }

    /// The node at a path, by its own names and through no link.
    pub(crate) fn at(&self, path: &Path) -> Option<NodeId> {
        path.components().try_fold(self.plan.root(), |directory, name| {
            let found = self.plan.lookup(directory, name.as_os_str().as_bytes())?;
            Some(self.plan.target(found))
        })
    }

    fn over(&self) -> bool {
        self.beyond != (0, 0)
            || self.plan.nodes() as u64 > self.limit.inodes.saturating_add(1)
            || self.plan.bytes() as u64 > self.limit.bytes
    }

    /// The directory of `path`, made where it is missing and `make` says so.
    fn parent(&mut self, path: &Path, make: bool) -> Result<NodeId> {
        let wanted = path.parent().unwrap_or(Path::new(""));
        if let Some((latest, directory)) = &self.latest
            && latest == wanted
        {
            return Ok(*directory);
        }
        let mut directory = self.plan.root();
        for name in wanted.components() {
            let name = name.as_os_str();
            let next = match self.plan.lookup(directory, name.as_bytes()) {
                Some(found) => self.plan.target(found),
                None if make => {
                    let meta = Meta { mode: 0o755, uid: 0, gid: 0, mtime: self.now };
                    let body = Body::Directory(Directory::default());
                    self.plan.add(directory, name.as_bytes(), meta, &[], body)?.1
                }
                None => return Err(no_entry(path)),
            };
            if !self.plan.node(next).is_directory() {
                let reason = format!("leads through {}, which is no directory", Path::new(name).display());
                return Err(Error::Source { path: path.to_owned(), reason });
            }
            directory = next;
        }
        self.latest = Some((wanted.to_owned(), directory));
        Ok(directory)
    }

    /// Takes away what has the name, but for a directory that has something in it.
    pub(super) fn make_way(&mut self, directory: NodeId, name: &[u8], path: &Path) -> Result<()> {
        let Some(found) = self.plan.lookup(directory, name) else { return Ok(()) };
        if self.plan.entries(self.plan.target(found)) > 0 {
            let error = io::Error::from_raw_os_error(libc::ENOTEMPTY);
            return Err(Error::io(format!("cannot replace {}", path.display()), error));
        }
        self.latest = None;
        if let Some(data) = self.plan.unlink(found) {
            self.contents.release(&data);
        }
        Ok(())
    }

    /// Makes a file in the root that has blocks from its start to its end: `start`, and zeros. One of that name gives way.
    ///
    /// # Errors
    ///
    /// When a directory with something in it has the name.
    pub(crate) fn reserve(&mut self, name: &str, meta: Meta, size: u64, start: &[u8]) -> Result<()> {
        let root = self.plan.root();
        self.make_way(root, name.as_bytes(), Path::new(name))?;
        let body = Body::File { size, data: Data::Reserved(start.into()) };
        self.plan.add(root, name.as_bytes(), meta, &[], body)?;
        Ok(())
    }

    /// Counts an entry that is not kept.
    fn count(&mut self, entry: Entry<'_>, progress: &mut dyn Progress) -> Result<()> {
        let Entry { path, node, xattrs, .. } = entry;
        let blocks = match node {
            Node::HardLink(_) => return Ok(()),
            Node::Directory => 1,
            Node::Symlink(target) => u64::from(target.as_os_str().len() >= 60),
            Node::Device { .. } => 0,
            Node::File { content, .. } => {
                let data = self.contents.put(content, path, progress)?;
                self.contents.release(&data);
                0
            }
        };
        self.beyond.0 += 1;
        self.beyond.1 += blocks + u64::from(!xattrs.is_empty());
        Ok(())
    }
}

impl Sink for Gather<'_> {
    fn add(&mut self, entry: Entry<'_>, progress: &mut dyn Progress) -> Result<()> {
        if progress.cancelled() {
            return Err(Error::Interrupted);
        }
        if self.over() {
            return self.count(entry, progress);
        }
        let Entry { path, meta, xattrs, node } = entry;
        let Some(name) = path.file_name() else {
            if !matches!(node, Node::Directory) {
                let reason = "the root of a tree must be a directory".to_owned();
                return Err(Error::Source { path: PathBuf::from("."), reason });
            }
            self.plan.set(self.plan.root(), meta, xattrs);
            return Ok(());
        };
        let name = name.as_bytes();
        let directory = self.parent(path, true)?;
        let body = match node {
            Node::Directory => {
                if let Some(found) = self.plan.lookup(directory, name)
                    && self.plan.node(self.plan.target(found)).is_directory()
                {
                    self.plan.set(self.plan.target(found), meta, xattrs);
                    return Ok(());
                }
                Body::Directory(Directory::default())
            }
            Node::HardLink(target) => {
                if target == path {
                    return Ok(());
                }
                let from = self.parent(&target, false)?;
                let found = target.file_name().and_then(|name| self.plan.lookup(from, name.as_bytes()));
                let found = self.plan.target(found.ok_or_else(|| no_entry(path))?);
                if self.plan.node(found).is_directory() {
                    let reason = format!("links to {}, which is a directory", target.display());
                    return Err(Error::Source { path: path.to_owned(), reason });
                }
                if self.plan.lookup(directory, name).is_some_and(|name| self.plan.target(name) == found) {
                    return Ok(());
                }
                self.make_way(directory, name, path)?;
                self.plan.link(directory, name, found)?;
                return Ok(());
            }
            Node::File { size, content } => {
                let data = self.contents.put(content, path, progress)?;
                Body::File { size, data }
            }
            Node::Symlink(target) => Body::Symlink(self.plan.add_text(target.as_os_str().as_bytes())?),
            Node::Device { kind, major, minor } => Body::Device { kind, major, minor },
        };
        self.make_way(directory, name, path)?;
        self.plan.add(directory, name, meta, xattrs, body)?;
        Ok(())
    }
}

/// An entry, or what it links to, is not there.
fn no_entry(path: &Path) -> Error {
    let error = io::Error::from_raw_os_error(libc::ENOENT);
    Error::io(format!("cannot make {}", path.display()), error)
}
