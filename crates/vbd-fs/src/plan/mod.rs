//! A tree in memory: every entry of a filesystem that is to be made, and where the content of each file is.
//!
//! An entry costs about 150 bytes and its name, so that a million of them fit anywhere. Content stays where it is (in
//! the source, or in blocks that were placed already), but for small files that tailoring writes.

mod attributes;
mod gather;
mod names;
mod node;
mod root;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use crate::entry::{Counts, Meta, Time, Xattr};
use crate::{Error, Result};

use attributes::Attributes;
pub(crate) use gather::{Contents, Gather, Limit};
use names::Names;
pub(crate) use names::{NameId, Text};
pub(crate) use node::{BLOCK, Body, Data, Directory, Node, NodeId, Origin, Run, Runs, push_run};

/// The tree. A name leads to a node, and a file's node may have many names.
pub(crate) struct Plan {
    nodes: Vec<Node>,
    names: Names,
    attributes: Attributes,
    origins: Vec<Origin>,
    /// No entry is newer than this, where it is given.
    latest: Option<Time>,
}

impl Plan {
    /// A tree with nothing in it but its root, of root's. Times after `latest` become it.
    pub(crate) fn new(root: Meta, latest: Option<Time>) -> Plan {
        let mut plan = Plan {
            nodes: Vec::new(),
            names: Names::default(),
            attributes: Attributes::default(),
            origins: Vec::new(),
            latest,
        };
        let meta = plan.clamp(root);
        plan.nodes.push(Node { meta, links: 1, xattrs: 0, body: Body::Directory(Directory::default()) });
        plan
    }

    /// The root directory.
    pub(crate) fn root(&self) -> NodeId {
        NodeId(0)
    }

    pub(crate) fn node(&self, node: NodeId) -> &Node {
        &self.nodes[node.index()]
    }

    /// A file's size and content.
    pub(crate) fn file_mut(&mut self, node: NodeId) -> Option<(&mut u64, &mut Data)> {
        match &mut self.nodes[node.index()].body {
            Body::File { size, data } => Some((size, data)),
            _ => None,
        }
    }

    /// How many nodes there are, those without a name included.
    pub(crate) fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Bytes of names, targets and attributes.
    pub(crate) fn bytes(&self) -> usize {
        self.names.bytes() + self.attributes.bytes
    }

    /// Sets what belongs to an entry besides its content.
    pub(crate) fn set(&mut self, node: NodeId, meta: Meta, xattrs: &[Xattr]) {
        let meta = self.clamp(meta);
        let xattrs = self.attributes.id(xattrs);
        let node = &mut self.nodes[node.index()];
        (node.meta, node.xattrs) = (meta, xattrs);
    }

    pub(crate) fn xattrs(&self, node: NodeId) -> &[Xattr] {
        self.attributes.get(self.node(node).xattrs)
    }

    /// Adds an attribute, or replaces the one of that name.
    pub(crate) fn add_xattr(&mut self, node: NodeId, xattr: Xattr) {
        let mut all = self.xattrs(node).to_vec();
        all.retain(|(name, _)| *name != xattr.0);
        all.push(xattr);
        all.sort();
        self.nodes[node.index()].xattrs = self.attributes.id(&all);
    }

    /// The name in a directory.
    pub(crate) fn lookup(&self, directory: NodeId, name: &[u8]) -> Option<NameId> {
        let Body::Directory(found) = &self.node(directory).body else { return None };
        self.names.find(directory, found.first, name)
    }

    /// What a name leads to.
    pub(crate) fn target(&self, name: NameId) -> NodeId {
        self.names.get(name).node
    }

    /// The bytes of a name.
    pub(crate) fn name(&self, name: NameId) -> &[u8] {
        self.names.text(self.names.get(name).text)
    }

    /// The directory that a name is in.
    pub(crate) fn parent(&self, name: NameId) -> NodeId {
        self.names.get(name).parent
    }

    /// A link's target.
    pub(crate) fn text(&self, text: Text) -> &[u8] {
        self.names.text(text)
    }

    /// Where a file of the source was found.
    pub(crate) fn origin(&self, origin: u32) -> &Origin {
        &self.origins[origin as usize]
    }

    /// The path of a name from the root, also of one that was removed.
    pub(crate) fn path(&self, name: NameId) -> PathBuf {
        PathBuf::from(OsString::from_vec(self.names.path(name, |node| self.own_name(node))))
    }

    /// The path of a directory from the root.
    pub(crate) fn directory_path(&self, directory: NodeId) -> PathBuf {
        self.own_name(directory).map_or_else(PathBuf::new, |name| self.path(name))
    }

    fn own_name(&self, directory: NodeId) -> Option<NameId> {
        match &self.node(directory).body {
            Body::Directory(directory) => directory.own,
            _ => None,
        }
    }

    /// A name of a node that has one; slow, for what rarely happens.
    pub(crate) fn any_name(&self, node: NodeId) -> Option<NameId> {
        self.names.all().find(|&name| self.target(name) == node)
    }

    /// Makes an entry of a name that is not there yet.
    ///
    /// # Errors
    ///
    /// When there are more than 4,294,967,294 entries, or names of more than 4 GiB.
    pub(crate) fn add(
        &mut self,
        directory: NodeId,
        name: &[u8],
        meta: Meta,
        xattrs: &[Xattr],
        body: Body,
    ) -> Result<(NameId, NodeId)> {
        let node = NodeId::new(self.nodes.len()).ok_or_else(too_many)?;
        let xattrs = self.attributes.id(xattrs);
        let meta = self.clamp(meta);
        let is_directory = matches!(body, Body::Directory(_));
        self.nodes.push(Node { meta, links: 0, xattrs, body });
        let name = self.link(directory, name, node)?;
        if is_directory && let Body::Directory(directory) = &mut self.nodes[node.index()].body {
            directory.own = Some(name);
        }
        Ok((name, node))
    }

    /// Gives a node one more name, which is not there yet.
    ///
    /// # Errors
    ///
    /// As [`Plan::add`].
    pub(crate) fn link(&mut self, directory: NodeId, name: &[u8], node: NodeId) -> Result<NameId> {
        let Body::Directory(parent) = &self.nodes[directory.index()].body else {
            return Err(Error::Invalid("a name in what is no directory".to_owned()));
        };
        let id = self.names.add(directory, name, node, parent.first).ok_or_else(too_many)?;
        let names = &self.names;
        if let Body::Directory(parent) = &mut self.nodes[directory.index()].body {
            let before = |first: NameId| name < names.text(names.get(first).text);
            parent.sorted = parent.first.is_none_or(|first| parent.sorted && before(first));
            parent.first = Some(id);
            parent.entries += 1;
        }
        self.nodes[node.index()].links += 1;
        Ok(id)
    }

    /// A text for a link's target.
    ///
    /// # Errors
    ///
    /// As [`Plan::add`].
    pub(crate) fn add_text(&mut self, text: &[u8]) -> Result<Text> {
        self.names.add_text(text).ok_or_else(too_many)
    }

    /// Notes where a file of the source was found.
    ///
    /// # Errors
    ///
    /// As [`Plan::add`].
    pub(crate) fn add_origin(&mut self, origin: Origin) -> Result<u32> {
        let number = u32::try_from(self.origins.len()).map_err(|_| too_many())?;
        self.origins.push(origin);
        Ok(number)
    }

    /// Takes a name away. Where it was a file's last, its content is returned, for it may have blocks.
    /// A directory must be empty.
    pub(crate) fn unlink(&mut self, name: NameId) -> Option<Data> {
        let (directory, target) = (self.parent(name), self.target(name));
        self.names.remove(name);
        if let Body::Directory(parent) = &mut self.nodes[directory.index()].body {
            parent.entries -= 1;
        }
        let node = &mut self.nodes[target.index()];
        node.links -= 1;
        match &mut node.body {
            Body::File { data, .. } if node.links == 0 => Some(std::mem::replace(data, Data::Hole)),
            _ => None,
        }
    }

    /// How many names a directory has.
    pub(crate) fn entries(&self, directory: NodeId) -> u32 {
        match &self.node(directory).body {
            Body::Directory(directory) => directory.entries,
            _ => 0,
        }
    }

    /// The names in a directory, ordered by their bytes.
    pub(crate) fn children(&self, directory: NodeId) -> Vec<NameId> {
        let Body::Directory(found) = &self.node(directory).body else { return Vec::new() };
        let mut all = Vec::with_capacity(found.entries as usize);
        all.extend(self.names.chain(found.first).filter(|&name| self.names.is_alive(name)));
        if !found.sorted {
            // Stable, for that makes use of what is in order.
            all.sort_by(|&a, &b| self.name(a).cmp(self.name(b)));
        }
        all
    }

    /// Puts the names of every directory in order, so that it is not done again each time that they are asked for.
    pub(crate) fn sort(&mut self) {
        for node in (0..self.nodes.len()).filter_map(NodeId::new) {
            if !matches!(&self.node(node).body, Body::Directory(directory) if !directory.sorted) {
                continue;
            }
            let first = self.names.relink(&self.children(node));
            if let Body::Directory(directory) = &mut self.nodes[node.index()].body {
                (directory.first, directory.sorted) = (first, true);
            }
        }
    }

    /// Every directory from the root on, each before those in it, in the order of their names.
    pub(crate) fn directories(&self) -> Directories<'_> {
        Directories { plan: self, todo: vec![self.root()] }
    }

    /// What is in the tree.
    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for node in self.nodes.iter().filter(|node| node.links > 0) {
            match &node.body {
                Body::Directory(_) => counts.directories += 1,
                Body::File { size, data } => {
                    counts.files += 1;
                    counts.hard_links += u64::from(node.links - 1);
                    counts.bytes += self.content(*size, data);
                }
                Body::Symlink(_) => counts.symlinks += 1,
                Body::Device { .. } => counts.special += 1,
            }
            if matches!(node.body, Body::Symlink(_) | Body::Device { .. }) {
                counts.hard_links += u64::from(node.links - 1);
            }
        }
        counts
    }

    /// Bytes of a file that are no hole, as far as that is known.
    pub(crate) fn content(&self, size: u64, data: &Data) -> u64 {
        match data {
            Data::Hole => 0,
            Data::Bytes(bytes) => bytes.len() as u64,
            Data::Reserved(_) => size,
            Data::Origin(origin) => self.origin(*origin).stored.min(size),
            Data::Placed(_) | Data::Spooled(_) => {
                let runs = data.runs().iter();
                runs.map(|run| (run.end() * BLOCK).min(size).saturating_sub(u64::from(run.logical) * BLOCK))
                    .sum()
            }
        }
    }

    fn clamp(&self, mut meta: Meta) -> Meta {
        if let Some(latest) = self.latest {
            meta.mtime = meta.mtime.min(latest);
        }
        meta
    }
}

/// See [`Plan::directories`].
pub(crate) struct Directories<'a> {
    plan: &'a Plan,
    todo: Vec<NodeId>,
}

impl Iterator for Directories<'_> {
    type Item = (NodeId, Vec<NameId>);

    fn next(&mut self) -> Option<Self::Item> {
        let directory = self.todo.pop()?;
        let children = self.plan.children(directory);
        let below = children.iter().rev().map(|&name| self.plan.target(name));
        self.todo.extend(below.filter(|&node| self.plan.node(node).is_directory()));
        Some((directory, children))
    }
}

fn too_many() -> Error {
    Error::Invalid("the source has more entries, or longer names, than a filesystem can hold".to_owned())
}

#[cfg(test)]
mod tests;
