//! Names and the directories they are in: one table for all, and one run of bytes.

use std::hash::BuildHasher;
use std::hash::RandomState;
use std::num::NonZeroU32;

use hashbrown::HashTable;

use super::node::NodeId;

/// A name's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct NameId(NonZeroU32);

impl NameId {
    fn new(index: usize) -> Option<NameId> {
        u32::try_from(index).ok()?.checked_add(1).and_then(NonZeroU32::new).map(NameId)
    }

    fn index(self) -> usize {
        self.0.get() as usize - 1
    }
}

/// A piece of the run of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Text {
    start: u32,
    length: u32,
}

/// A name in a directory.
pub(super) struct Name {
    pub(super) parent: NodeId,
    pub(super) node: NodeId,
    /// The directory's chain goes on there.
    pub(super) next: Option<NameId>,
    pub(super) text: Text,
}

#[derive(Default)]
pub(super) struct Names {
    all: Vec<Name>,
    /// Finds a name by its directory and bytes.
    index: HashTable<NameId>,
    bytes: Vec<u8>,
    hasher: RandomState,
}

impl Names {
    pub(super) fn get(&self, name: NameId) -> &Name {
        &self.all[name.index()]
    }

    pub(super) fn text(&self, text: Text) -> &[u8] {
        &self.bytes[text.start as usize..][..text.length as usize]
    }

    pub(super) fn add_text(&mut self, text: &[u8]) -> Option<Text> {
        let start = u32::try_from(self.bytes.len()).ok()?;
        let length = u32::try_from(text.len()).ok()?;
        start.checked_add(length)?;
        self.bytes.extend_from_slice(text);
        Some(Text { start, length })
    }

    /// Adds a name; nothing where a number has no more room.
    pub(super) fn add(
        &mut self,
        parent: NodeId,
        name: &[u8],
        node: NodeId,
        next: Option<NameId>,
    ) -> Option<NameId> {
        let id = NameId::new(self.all.len())?;
        let text = self.add_text(name)?;
        self.all.push(Name { parent, node, next, text });
        let (all, bytes, hasher) = (&self.all, &self.bytes, &self.hasher);
        let hash_of = |id: &NameId| {
            let name = &all[id.index()];
            hasher.hash_one((name.parent, &bytes[name.text.start as usize..][..name.text.length as usize]))
        };
        self.index.insert_unique(hash_of(&id), id, hash_of);
        Some(id)
    }

    pub(super) fn find(&self, parent: NodeId, name: &[u8]) -> Option<NameId> {
        let hash = self.hasher.hash_one((parent, name));
        let same = |id: &NameId| {
            let found = self.get(*id);
            found.parent == parent && self.text(found.text) == name
        };
        self.index.find(hash, same).copied()
    }

    /// The name is found no more, and leads nowhere; it stays in its directory's chain.
    pub(super) fn remove(&mut self, name: NameId) {
        let found = self.get(name);
        let hash = self.hasher.hash_one((found.parent, self.text(found.text)));
        if let Ok(entry) = self.index.find_entry(hash, |&id| id == name) {
            entry.remove();
        }
        self.all[name.index()].node = NodeId::NONE;
    }

    pub(super) fn is_alive(&self, name: NameId) -> bool {
        self.get(name).node != NodeId::NONE
    }

    /// Bytes of all names and targets.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = NameId> {
        self.index.iter().copied()
    }

    /// The path of a name; `own` tells a directory's own name.
    pub(super) fn path(&self, name: NameId, own: impl Fn(NodeId) -> Option<NameId>) -> Vec<u8> {
        let mut parts = vec![name];
        while let Some(above) = own(self.get(parts[parts.len() - 1]).parent) {
            parts.push(above);
        }
        let parts: Vec<&[u8]> = parts.iter().rev().map(|&part| self.text(self.get(part).text)).collect();
        parts.join(&b'/')
    }
}
