//! Names and the directories they are in: one table for all, and one run of bytes.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU32;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

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

/// How many names are looked at on the way to others before an index of all is made: a tree that is read from a directory
/// is hardly ever asked for names, and the index would take more time than anything else that is done in memory.
/// Tests are to see both ways.
const WALK: usize = if cfg!(test) { 30 } else { 1 << 16 };

#[derive(Default)]
pub(super) struct Names {
    all: Vec<Name>,
    bytes: Vec<u8>,
    /// Finds a name by its directory and bytes; made when it is worth it.
    index: OnceLock<Index>,
    walked: AtomicUsize,
}

/// Names by the hashes of their directories and bytes, which are kept: a table that grows needs them again.
#[derive(Default)]
struct Index {
    table: HashTable<(u32, NameId)>,
    hasher: RandomState,
}

impl Index {
    fn hash(&self, parent: NodeId, name: &[u8]) -> u32 {
        let hash = self.hasher.hash_one((parent, name));
        #[expect(clippy::cast_possible_truncation, reason = "both halves go into it")]
        let folded = (hash ^ hash >> 32) as u32;
        folded
    }

    fn insert(&mut self, hash: u32, name: NameId) {
        self.table.insert_unique(spread(hash), (hash, name), |(hash, _)| spread(*hash));
    }
}

/// The table looks at the highest and the lowest bits of 64.
fn spread(hash: u32) -> u64 {
    u64::from(hash) << 32 | u64::from(hash)
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
        if let Some(index) = self.index.get_mut() {
            index.insert(index.hash(parent, name), id);
        }
        Some(id)
    }

    /// The name in a directory whose chain begins with `first`.
    pub(super) fn find(&self, parent: NodeId, first: Option<NameId>, name: &[u8]) -> Option<NameId> {
        if self.index.get().is_none() {
            let left = WALK.saturating_sub(self.walked.load(Ordering::Relaxed));
            let mut walked = 0;
            let found = self.chain(first).take(left).find(|&id| {
                walked += 1;
                self.is_alive(id) && self.text(self.get(id).text) == name
            });
            self.walked.fetch_add(walked, Ordering::Relaxed);
            if found.is_some() || walked < left {
                return found;
            }
        }
        let index = self.index.get_or_init(|| self.indexed());
        let same = |(_, id): &(u32, NameId)| {
            let found = self.get(*id);
            found.parent == parent && self.text(found.text) == name
        };
        index.table.find(spread(index.hash(parent, name)), same).map(|(_, id)| *id)
    }

    fn indexed(&self) -> Index {
        let mut index = Index { table: HashTable::with_capacity(self.all.len()), hasher: RandomState::new() };
        for id in self.all() {
            let name = self.get(id);
            index.insert(index.hash(name.parent, self.text(name.text)), id);
        }
        index
    }

    /// A directory's names from one on, those that were removed included.
    pub(super) fn chain(&self, first: Option<NameId>) -> impl Iterator<Item = NameId> {
        std::iter::successors(first, |name| self.get(*name).next)
    }

    /// Puts names into a chain, in their order; returns the first.
    pub(super) fn relink(&mut self, names: &[NameId]) -> Option<NameId> {
        let mut next = None;
        for &name in names.iter().rev() {
            self.all[name.index()].next = next;
            next = Some(name);
        }
        next
    }

    /// The name is found no more, and leads nowhere; it stays in its directory's chain.
    pub(super) fn remove(&mut self, name: NameId) {
        let Names { all, bytes, index, .. } = self;
        let found = &mut all[name.index()];
        if let Some(index) = index.get_mut() {
            let text = &bytes[found.text.start as usize..][..found.text.length as usize];
            let hash = spread(index.hash(found.parent, text));
            if let Ok(entry) = index.table.find_entry(hash, |(_, id)| *id == name) {
                entry.remove();
            }
        }
        found.node = NodeId::NONE;
    }

    pub(super) fn is_alive(&self, name: NameId) -> bool {
        self.get(name).node != NodeId::NONE
    }

    /// Bytes of all names and targets.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = NameId> {
        (0..self.all.len()).filter_map(NameId::new).filter(|&name| self.is_alive(name))
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
