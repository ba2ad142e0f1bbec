//! One layer on those below it: whiteouts, and paths through links of lower layers.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::entry::{Content, Entry, Node, Sink};
use crate::error::Context;
use crate::plan::{Body, Contents, Data, Gather, NameId, NodeId};
use crate::{Error, Progress, Result};

/// What a whiteout's name starts with.
const WHITEOUT: &[u8] = b".wh.";
/// What hides everything that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What the names of other marks start with, which mean nothing outside of AUFS.
const MARK: &[u8] = b".wh..wh.";
/// How many links a path may lead through, as in the kernel.
const LINKS: u32 = 40;

/// A sink for the entries of a layer.
pub(super) struct Layered<'a, 'b> {
    gather: &'a mut Gather<'b>,
    /// Names that this layer made or changed, which its own whiteouts do not touch wherever they stand in it.
    touched: HashSet<NameId>,
}

impl<'a, 'b> Layered<'a, 'b> {
    pub(super) fn new(gather: &'a mut Gather<'b>) -> Layered<'a, 'b> {
        Layered { gather, touched: HashSet::new() }
    }

    /// The path with every link on the way to its last name followed, inside of the tree. What is not there stays as
    /// it is.
    fn resolve(&self, path: &Path) -> Result<PathBuf> {
        let plan = &self.gather.plan;
        let Some(last) = path.file_name() else { return Ok(path.to_owned()) };
        let mut todo: Vec<Vec<u8>> = parts(path.parent().unwrap_or(Path::new("")).as_os_str().as_bytes());
        // The names so far, and the directories that they lead to, as far as there are any.
        let mut names: Vec<Vec<u8>> = Vec::new();
        let mut nodes: Vec<Option<NodeId>> = vec![Some(plan.root())];
        let mut links = 0;
        while let Some(part) = todo.pop() {
            if part == b".." {
                if names.pop().is_some() {
                    nodes.pop();
                }
                continue;
            }
            let here = nodes.last().copied().flatten();
            let found = here.filter(|node| plan.node(*node).is_directory());
            let found = found.and_then(|node| plan.lookup(node, &part)).map(|name| plan.target(name));
            if let Some(node) = found
                && let Body::Symlink(target) = plan.node(node).body
            {
                links += 1;
                if links > LINKS {
                    let reason = "leads through too many links".to_owned();
                    return Err(Error::Source { path: path.to_owned(), reason });
                }
                let target = plan.text(target);
                if target.starts_with(b"/") {
                    names.clear();
                    nodes.truncate(1);
                }
                todo.extend(parts(target));
                continue;
            }
            names.push(part);
            nodes.push(found);
        }
        let mut resolved = PathBuf::from(OsString::from_vec(names.join(&b'/')));
        resolved.push(last);
        Ok(resolved)
    }

    /// Takes away what lower layers have at a name; what this layer has there stays.
    fn remove(&mut self, name: NameId) {
        // By a list, not by calls: a tree may be deep.
        let mut order = vec![name];
        let mut seen = 0;
        while let Some(&next) = order.get(seen) {
            seen += 1;
            let node = self.gather.plan.target(next);
            if self.gather.plan.node(node).is_directory() {
                order.extend(self.gather.plan.children(node));
            }
        }
        for name in order.into_iter().rev() {
            let node = self.gather.plan.target(name);
            let in_use = self.gather.plan.node(node).is_directory() && self.gather.plan.entries(node) > 0;
            if self.touched.contains(&name) || in_use {
                continue;
            }
            if let Some(data) = self.gather.plan.unlink(name) {
                self.gather.contents.release(&data);
            }
        }
        self.gather.forget();
    }

    /// Hides what lower layers have: a name in a directory, or all of them.
    fn whiteout(&mut self, directory: NodeId, hidden: &[u8]) {
        if hidden == OPAQUE {
            for name in self.gather.plan.children(directory) {
                self.remove(name);
            }
        } else if let Some(name) = self.gather.plan.lookup(directory, &hidden[WHITEOUT.len()..]) {
            self.remove(name);
        }
    }

    /// Notes that this layer has what is at a path, and the directories above it.
    fn touch(&mut self, path: &Path) {
        let plan = &self.gather.plan;
        let mut directory = plan.root();
        for part in path.components() {
            let Some(name) = plan.lookup(directory, part.as_os_str().as_bytes()) else { return };
            self.touched.insert(name);
            directory = plan.target(name);
        }
    }
}

impl Sink for Layered<'_, '_> {
    fn add(&mut self, entry: Entry<'_>, progress: &mut dyn Progress) -> Result<()> {
        let Entry { path, meta, xattrs, node } = entry;
        let path = self.resolve(path)?;
        let name = path.file_name().map(OsStrExt::as_bytes).unwrap_or_default();
        if name.starts_with(WHITEOUT) {
            let odd = name != OPAQUE && name.starts_with(MARK);
            let directory = self.gather.at(path.parent().unwrap_or(Path::new("")));
            let directory = directory.filter(|node| self.gather.plan.node(*node).is_directory());
            if let Some(directory) = directory.filter(|_| !odd) {
                self.whiteout(directory, name);
            }
            return Ok(());
        }
        // What is no directory replaces one of a lower layer with all that is in it.
        if !matches!(node, Node::Directory)
            && let Some(parent) = self.gather.at(path.parent().unwrap_or(Path::new("")))
            && let Some(found) = self.gather.plan.lookup(parent, name)
            && self.gather.plan.node(self.gather.plan.target(found)).is_directory()
        {
            self.remove(found);
        }
        let node = match node {
            Node::HardLink(target) => Node::HardLink(self.resolve(&target)?),
            Node::File { size, content } => Node::File { size, content: &mut *content },
            Node::Directory => Node::Directory,
            Node::Symlink(target) => Node::Symlink(target),
            Node::Device { kind, major, minor } => Node::Device { kind, major, minor },
        };
        self.gather.add(Entry { path: &path, meta, xattrs, node }, progress)?;
        self.touch(&path);
        Ok(())
    }
}

/// The parts of a path, the first one last, without those that mean nothing.
fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    parts.rev().map(<[u8]>::to_vec).collect()
}

/// Reads content and keeps nothing.
struct Nowhere;

impl Contents for Nowhere {
    fn put(&mut self, content: &mut dyn Content, path: &Path, _: &mut dyn Progress) -> Result<Data> {
        let mut buffer = [0; 4096];
        while content.next_extent().at("read", path)?.is_some() {
            while content.read(&mut buffer).at("read", path)? > 0 {}
        }
        Ok(Data::Hole)
    }

    fn release(&mut self, _: &Data) {}

    fn read(&self, _: &Data, _: usize) -> io::Result<Vec<u8>> {
        Ok(Vec::new())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    fn is_full(&self) -> bool {
        false
    }
}

/// Applies two tars as layers, writing nothing; the first ends where the second begins, at the offset that the first two
/// bytes give in blocks of 512. For fuzzing: it must end without a panic whatever it reads.
pub fn fuzz(bytes: &[u8]) {
    use crate::entry::Meta;
    use crate::plan::{Limit, Plan};

    let Some((head, rest)) = bytes.split_first_chunk::<2>() else { return };
    let middle = (usize::from(u16::from_le_bytes(*head)) * 512).min(rest.len());
    let (first, second) = rest.split_at(middle);
    let mut nowhere = Nowhere;
    let limit = Limit { inodes: 10_000, bytes: 1 << 24 };
    let now = crate::Time::default();
    let mut gather = Gather::new(Plan::new(Meta::default(), None), &mut nowhere, None, limit, now);
    for mut layer in [first, second] {
        let mut layered = Layered::new(&mut gather);
        let _ = crate::tar::unpack(&mut layer, "layer", &mut layered, &mut crate::Silent);
    }
    // A name that was taken away is in no directory, and every directory is reached once.
    let directories = gather.plan.directories().count() as u64;
    assert_eq!(directories, gather.plan.counts().directories.max(1));
}
