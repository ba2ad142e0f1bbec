//! The tree in a quota file: a number looked up, put in, all of them listed.

use std::collections::HashSet;

use zerocopy::{FromBytes, IntoBytes};

use super::{Entry, Header, IN_LEAF, Kind, LeafHeader, PAGE, VERSION};

/// The page of the root.
const ROOT: u32 = 1;
/// Levels of nodes; the last one names leaves.
const DEPTH: u32 = 4;
/// Bytes of a reference in a node.
const REFERENCE: usize = 4;

type Page = [u8; PAGE];

/// What is wrong with a quota file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// It begins with another number.
    #[error("it begins with {0:#x}, which no file of its kind does")]
    Magic(u32),
    /// Its version is another one.
    #[error("it has the version {0}, not 1 (vfsv1)")]
    Version(u32),
    /// It says it has more pages than it has, or fewer than one with a root.
    #[error("it says it has {said} pages, of {there}")]
    Size {
        /// What it says.
        said: u32,
        /// How many there are.
        there: u32,
    },
    /// A page leads to one that is not there, or was there before.
    #[error("page {from} of it leads to page {to}, which cannot be")]
    Reference {
        /// The one that leads.
        from: u32,
        /// Where it leads to.
        to: u32,
    },
    /// The tree leads to a leaf that does not have the number.
    #[error("the number {id} is not in page {page} of it, where its tree leads to")]
    Missing {
        /// The number.
        id: u32,
        /// The leaf.
        page: u32,
    },
    /// A leaf that says it has room has none.
    #[error("page {0} of it has no room, and is in the list of those that have some")]
    Full(u32),
}

/// The pages of a quota file.
pub trait Pages {
    /// What can go wrong.
    type Error: From<TreeError>;

    /// How many there are.
    fn count(&self) -> u32;

    /// One of them, zeros where nothing is.
    ///
    /// # Errors
    ///
    /// Those of reading.
    fn page(&self, number: u32) -> Result<[u8; PAGE], Self::Error>;
}

/// Pages that can be changed.
pub trait PagesMut: Pages {
    /// Puts a page into its place; one behind the last makes the file longer.
    ///
    /// # Errors
    ///
    /// Those of writing.
    fn put(&mut self, number: u32, page: &[u8; PAGE]) -> Result<(), Self::Error>;
}

/// The tree of a file.
#[derive(Debug, Clone, Copy)]
pub struct Tree {
    header: Header,
}

fn reference(page: &Page, index: usize) -> u32 {
    let bytes = &page[index * REFERENCE..(index + 1) * REFERENCE];
    u32::from_le_bytes(bytes.try_into().expect("four bytes"))
}

/// The byte of a number that a level goes by.
fn index(id: u32, depth: u32) -> usize {
    (id >> (8 * (DEPTH - 1 - depth)) & 0xff) as usize
}

fn place(slot: usize) -> std::ops::Range<usize> {
    let at = size_of::<LeafHeader>() + slot * size_of::<Entry>();
    at..at + size_of::<Entry>()
}

fn entry(page: &Page, slot: usize) -> Entry {
    Entry::read_from_bytes(&page[place(slot)]).expect("the size is its own")
}

fn leaf_header(page: &Page) -> LeafHeader {
    LeafHeader::read_from_prefix(page).expect("a page has 1 KiB").0
}

fn set_leaf_header(page: &mut Page, header: LeafHeader) {
    page[..size_of::<LeafHeader>()].copy_from_slice(header.as_bytes());
}

/// Where in a leaf a number is.
fn slot(page: &Page, id: u32) -> Option<usize> {
    (0..IN_LEAF).find(|slot| {
        let entry = entry(page, *slot);
        entry.id.get() == id && entry != Entry::default()
    })
}

impl Tree {
    /// Looks at a file's header.
    ///
    /// # Errors
    ///
    /// One of another kind or version, or without the pages that it says it has; those of reading.
    pub fn open<P: Pages>(pages: &P, kind: Kind) -> Result<Tree, P::Error> {
        let page = pages.page(0)?;
        let header = Header::read_from_prefix(&page).expect("a page has 1 KiB").0;
        if header.magic.get() != kind.magic() {
            return Err(TreeError::Magic(header.magic.get()).into());
        }
        if header.version.get() != VERSION {
            return Err(TreeError::Version(header.version.get()).into());
        }
        let tree = Tree { header };
        let (said, there) = (header.pages.get(), pages.count());
        // A file without any number may have no root yet.
        if said <= ROOT || said > there.max(ROOT + 1) {
            return Err(TreeError::Size { said, there }.into());
        }
        Ok(tree)
    }

    /// A page that another one leads to.
    fn follow<P: Pages>(&self, pages: &P, from: u32, to: u32) -> Result<Page, P::Error> {
        if to <= ROOT || to >= self.header.pages.get() {
            return Err(TreeError::Reference { from, to }.into());
        }
        pages.page(to)
    }

    /// The leaf and the place in it of a number.
    fn leaf_of<P: Pages>(&self, pages: &P, id: u32) -> Result<Option<(u32, Page, usize)>, P::Error> {
        let (mut number, mut page) = (ROOT, pages.page(ROOT)?);
        for depth in 0..DEPTH {
            let next = reference(&page, index(id, depth));
            if next == 0 {
                return Ok(None);
            }
            page = self.follow(pages, number, next)?;
            number = next;
        }
        match slot(&page, id) {
            Some(slot) => Ok(Some((number, page, slot))),
            None => Err(TreeError::Missing { id, page: number }.into()),
        }
    }

    /// What is counted of a number.
    ///
    /// # Errors
    ///
    /// A damaged tree; those of reading.
    pub fn find<P: Pages>(&self, pages: &P, id: u32) -> Result<Option<Entry>, P::Error> {
        Ok(self.leaf_of(pages, id)?.map(|(_, page, slot)| entry(&page, slot)))
    }

    /// Gives out all entries, by their numbers.
    ///
    /// # Errors
    ///
    /// A damaged tree; those of reading.
    pub fn walk<P: Pages>(&self, pages: &P, give: &mut dyn FnMut(&Entry)) -> Result<(), P::Error> {
        let mut seen = HashSet::new();
        self.walk_node(pages, (ROOT, 0, 0), &pages.page(ROOT)?, &mut seen, give)
    }

    fn walk_node<P: Pages>(
        &self,
        pages: &P,
        (number, depth, begin): (u32, u32, u32),
        page: &Page,
        seen: &mut HashSet<u32>,
        give: &mut dyn FnMut(&Entry),
    ) -> Result<(), P::Error> {
        for (index, low) in (0..PAGE / REFERENCE).zip(0u32..) {
            let to = reference(page, index);
            if to == 0 {
                continue;
            }
            let below = self.follow(pages, number, to)?;
            let id = begin << 8 | low;
            if depth + 1 == DEPTH {
                let slot = slot(&below, id).ok_or(TreeError::Missing { id, page: to })?;
                give(&entry(&below, slot));
            } else if seen.insert(to) {
                self.walk_node(pages, (to, depth + 1, id), &below, seen, give)?;
            } else {
                return Err(TreeError::Reference { from: number, to }.into());
            }
        }
        Ok(())
    }

    /// Puts an entry in the place of the one with its number, or into the tree where there is none.
    ///
    /// # Errors
    ///
    /// A damaged tree; those of reading and writing.
    pub fn set<P: PagesMut>(&mut self, pages: &mut P, new: Entry) -> Result<(), P::Error> {
        let new = new.stored();
        if let Some((number, mut page, slot)) = self.leaf_of(pages, new.id.get())? {
            page[place(slot)].copy_from_slice(new.as_bytes());
            return pages.put(number, &page);
        }
        let before = self.header;
        let leaf = self.insert(pages, &new)?;
        // From below up, so that what leads somewhere leads to something.
        let (id, mut child) = (new.id.get(), leaf);
        let mut path = vec![(ROOT, pages.page(ROOT)?)];
        for depth in 0..DEPTH - 1 {
            let (number, page) = path.last().expect("begun with the root");
            let next = reference(page, index(id, depth));
            if next == 0 {
                break;
            }
            let below = self.follow(pages, *number, next)?;
            path.push((next, below));
        }
        let there = u32::try_from(path.len()).unwrap_or(DEPTH);
        for depth in (there..DEPTH).rev() {
            let (number, mut page) = (self.take_page(pages)?, [0; PAGE]);
            let at = index(id, depth) * REFERENCE;
            page[at..at + REFERENCE].copy_from_slice(&child.to_le_bytes());
            pages.put(number, &page)?;
            child = number;
        }
        let (number, mut page) = path.pop().expect("begun with the root");
        let at = index(id, there - 1) * REFERENCE;
        page[at..at + REFERENCE].copy_from_slice(&child.to_le_bytes());
        pages.put(number, &page)?;
        if self.header != before {
            let mut page = pages.page(0)?;
            page[..size_of::<Header>()].copy_from_slice(self.header.as_bytes());
            pages.put(0, &page)?;
        }
        Ok(())
    }

    /// Puts an entry into a leaf with room; which one.
    fn insert<P: PagesMut>(&mut self, pages: &mut P, new: &Entry) -> Result<u32, P::Error> {
        let listed = self.header.free_leaf.get();
        let (number, mut page) = match listed {
            0 => (self.take_page(pages)?, [0; PAGE]),
            listed => (listed, self.follow(pages, 0, listed)?),
        };
        let free = (0..IN_LEAF).find(|slot| entry(&page, *slot) == Entry::default());
        let free = free.ok_or(TreeError::Full(number))?;
        page[place(free)].copy_from_slice(new.as_bytes());
        let used = (0..IN_LEAF).filter(|slot| entry(&page, *slot) != Entry::default()).count();
        let mut header = leaf_header(&page);
        header.entries = u16::try_from(used).expect("at most 14").into();
        if used == IN_LEAF {
            // The first of the list, which ends to have room.
            let next = header.next.get();
            if next != 0 {
                let mut after = self.follow(pages, number, next)?;
                let mut header = leaf_header(&after);
                header.previous = 0.into();
                set_leaf_header(&mut after, header);
                if next == number {
                    return Err(TreeError::Reference { from: number, to: next }.into());
                }
                pages.put(next, &after)?;
            }
            (header.next, header.previous) = (0.into(), 0.into());
            self.header.free_leaf = next.into();
        } else {
            self.header.free_leaf = number.into();
        }
        set_leaf_header(&mut page, header);
        pages.put(number, &page)?;
        Ok(number)
    }

    /// Takes a page for something new: a free one, or one at the end.
    fn take_page<P: PagesMut>(&mut self, pages: &mut P) -> Result<u32, P::Error> {
        match self.header.free_page.get() {
            0 => {
                let number = self.header.pages.get();
                let after = number.checked_add(1).ok_or(TreeError::Size { said: number, there: number })?;
                self.header.pages = after.into();
                pages.put(number, &[0; PAGE])?;
                Ok(number)
            }
            free => {
                let page = self.follow(pages, 0, free)?;
                let next = leaf_header(&page).next.get();
                if next == free {
                    return Err(TreeError::Reference { from: free, to: next }.into());
                }
                self.header.free_page = next.into();
                Ok(free)
            }
        }
    }
}

/// A file in memory.
pub(super) struct Memory(pub(super) Vec<u8>);

impl Pages for Memory {
    type Error = TreeError;

    fn count(&self) -> u32 {
        u32::try_from(self.0.len() / PAGE).unwrap_or(u32::MAX)
    }

    fn page(&self, number: u32) -> Result<Page, TreeError> {
        let at = number as usize * PAGE;
        let mut page = [0; PAGE];
        if let Some(bytes) = self.0.get(at..at + PAGE) {
            page.copy_from_slice(bytes);
        }
        Ok(page)
    }
}

impl PagesMut for Memory {
    fn put(&mut self, number: u32, page: &Page) -> Result<(), TreeError> {
        let at = number as usize * PAGE;
        if self.0.len() < at + PAGE {
            self.0.resize(at + PAGE, 0);
        }
        self.0[at..at + PAGE].copy_from_slice(page);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn empty(kind: Kind) -> Memory {
        let header = Header {
            magic: kind.magic().into(),
            version: VERSION.into(),
            space_grace: 7.into(),
            inode_grace: 7.into(),
            flags: 0.into(),
            pages: 2.into(),
            free_page: 0.into(),
            free_leaf: 0.into(),
        };
        let mut bytes = vec![0; PAGE];
        bytes[..size_of::<Header>()].copy_from_slice(header.as_bytes());
        Memory(bytes)
    }

    fn listed(pages: &Memory, tree: &Tree) -> Vec<Entry> {
        let mut all = Vec::new();
        tree.walk(pages, &mut |entry| all.push(*entry)).unwrap();
        all
    }

    proptest! {
        /// Numbers put in and counted are those of a map in memory, in their order.
        #[test]
        fn what_was_put_in_is_found(
            changes in proptest::collection::vec(
                (prop_oneof![0u32..40, any::<u32>(), (0u32..20).prop_map(|n| n << 24 | n)], 0i64..1 << 40, 0i64..9),
                1..200,
            ),
        ) {
            let mut pages = empty(Kind::Group);
            let mut tree = Tree::open(&pages, Kind::Group).unwrap();
            let mut model: BTreeMap<u32, (i64, i64)> = BTreeMap::new();
            for (id, space, inodes) in changes {
                let mut entry = tree.find(&pages, id).unwrap().unwrap_or_else(|| Entry::new(id));
                entry.add(space, inodes);
                tree.set(&mut pages, entry).unwrap();
                let known = model.entry(id).or_default();
                *known = (known.0 + space, known.1 + inodes);
            }
            let again = Tree::open(&pages, Kind::Group).unwrap();
            let found: Vec<(u32, (i64, i64))> = listed(&pages, &again)
                .iter()
                .map(|entry| (entry.id.get(), (entry.space.get().cast_signed(), entry.inodes.get().cast_signed())))
                .collect();
            prop_assert_eq!(found, model.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(pages.count(), again.header.pages.get());
        }

        #[test]
        fn any_bytes_are_answered(
            changes in proptest::collection::vec((0usize..20 * PAGE, any::<u8>()), 0..20),
        ) {
            let mut pages = empty(Kind::User);
            let mut tree = Tree::open(&pages, Kind::User).unwrap();
            for id in (0..20).chain([1 << 16, 1 << 30]) {
                tree.set(&mut pages, Entry::new(id)).unwrap();
            }
            for (at, byte) in changes {
                if let Some(place) = pages.0.get_mut(at) {
                    *place = byte;
                }
            }
            super::super::fuzz(&pages.0);
        }
    }

    /// A number of nothing with nothing in use is there all the same.
    #[test]
    fn zero_of_nothing_is_an_entry() {
        let mut pages = empty(Kind::Project);
        let mut tree = Tree::open(&pages, Kind::Project).unwrap();
        tree.set(&mut pages, Entry::new(0)).unwrap();
        let found = tree.find(&pages, 0).unwrap().unwrap();
        assert_eq!((found.inode_time.get(), found.space.get()), (1, 0));
        assert!(matches!(Tree::open(&pages, Kind::User), Err(TreeError::Magic(0xd9c0_3f14))));
    }

    /// Pages that a file gave back are used before it grows.
    #[test]
    fn free_pages_are_used_again() {
        let mut pages = empty(Kind::User);
        let mut tree = Tree::open(&pages, Kind::User).unwrap();
        tree.set(&mut pages, Entry::new(1)).unwrap();
        let free = tree.take_page(&mut pages).unwrap();
        tree.header.free_page = free.into();
        let count = tree.header.pages.get();
        // One node more is needed than for the first number: the leaf has room.
        tree.set(&mut pages, Entry::new(300)).unwrap();
        assert_eq!((tree.header.pages.get(), tree.header.free_page.get()), (count, 0));
        assert_eq!(listed(&pages, &tree).len(), 2);
    }

    #[test]
    fn limits_in_time_end_below_the_soft_limit() {
        let mut entry = Entry {
            space_soft: 4.into(),
            space: 9000.into(),
            space_time: 77.into(),
            inode_time: 88.into(),
            inodes: 3.into(),
            ..Entry::new(5)
        };
        entry.add(-1000, 1);
        assert_eq!((entry.space_time.get(), entry.inode_time.get()), (77, 88));
        entry.add(-4000, -4);
        assert_eq!((entry.space_time.get(), entry.inode_time.get()), (0, 0));
        entry.add(-9000, -9);
        assert_eq!((entry.space.get(), entry.inodes.get()), (0, 0));
    }
}
