//! Extended attributes: what fits goes into the inode, the rest into a block, which inodes with the same rest share.

use std::collections::HashMap;

use zerocopy::IntoBytes;

use super::error::{Result, WriteError};
use super::layout::INODE_SIZE;
use super::space::Space;
use super::target::Target;
use crate::format::inode::{EXTRA_ISIZE, GOOD_OLD_SIZE};
use crate::format::xattr::{
    ACL_ACCESS, ACL_DEFAULT, BLOCK_HEADER, BlockHeader, ENTRY, EntryHeader, MAGIC, MAX_SHARED, SYSTEM,
    block_hash, entry_hash, entry_size, seal, split_name,
};
use crate::format::{Block, Seed, Xattr, acl};

/// Where attributes begin in an inode, with their magic number.
pub(crate) const IN_INODE: usize = GOOD_OLD_SIZE + EXTRA_ISIZE as usize;
/// Room for them there, after the magic number.
const ROOM_IN_INODE: usize = INODE_SIZE as usize - IN_INODE - 4;
/// Zeros after the last entry.
const END: usize = 4;
/// Bytes of blocks kept in mind to share them; what comes after that gets blocks of its own.
const REMEMBERED: usize = 64 << 20;

/// An attribute as it goes to the disk.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Attribute {
    index: u8,
    name: Vec<u8>,
    value: Vec<u8>,
}

/// What does not fit into the inode; equal ones share a block.
type Rest = Vec<Attribute>;

/// Attributes by where they go.
pub(crate) struct Split {
    in_inode: Vec<Attribute>,
    rest: Rest,
}

fn padded(length: usize) -> usize {
    length.next_multiple_of(4)
}

impl Attribute {
    fn size(&self) -> usize {
        entry_size(self.name.len()) + padded(self.value.len())
    }
}

/// Decides what goes where.
pub(crate) fn split(xattrs: &[Xattr], block_size: u32) -> Result<Split> {
    split_for(xattrs, ROOM_IN_INODE, block_size)
}

/// The same, with so many bytes in the inode after the magic number; none where there is no room for that.
pub(crate) fn split_for(xattrs: &[Xattr], room: usize, block_size: u32) -> Result<Split> {
    let mut attributes = xattrs.iter().map(convert).collect::<Result<Vec<_>>>()?;
    // The order that the kernel keeps in a block.
    attributes.sort_unstable_by(|one, other| {
        (one.index, one.name.len(), &one.name).cmp(&(other.index, other.name.len(), &other.name))
    });
    let refuse = |attribute: &Attribute, why| {
        let full = crate::format::xattr::full_name(attribute.index, &attribute.name).unwrap_or_default();
        let name = String::from_utf8_lossy(&full).into_owned();
        Err(WriteError::Xattr { name, length: attribute.value.len(), why })
    };
    if let Some(twice) =
        attributes.windows(2).find(|pair| (pair[0].index, &pair[0].name) == (pair[1].index, &pair[1].name))
    {
        return refuse(&twice[1], "the entry has it twice");
    }
    let (mut in_inode, mut rest) = (Vec::new(), Vec::new());
    let mut free = room.saturating_sub(END);
    let mut free_in_block = block_size as usize - BLOCK_HEADER - END;
    for attribute in attributes {
        let size = attribute.size();
        if size <= free {
            free -= size;
            in_inode.push(attribute);
        } else if size <= free_in_block {
            free_in_block -= size;
            rest.push(attribute);
        } else {
            return refuse(&attribute, "all of an entry's attributes together have to fit into one block");
        }
    }
    Ok(Split { in_inode, rest })
}

fn convert((full, value): &Xattr) -> Result<Attribute> {
    let shown = || String::from_utf8_lossy(full).into_owned();
    let refuse = |why| Err(WriteError::Xattr { name: shown(), length: value.len(), why });
    let Some((index, name)) = split_name(full) else {
        return refuse("ext4 has no place for names of this kind");
    };
    if index == SYSTEM {
        return refuse("the filesystem keeps this kind of names for itself");
    }
    if name.len() > 255 || name.contains(&0) {
        return refuse("its name is too long, or has a zero in it");
    }
    let value = match index {
        ACL_ACCESS | ACL_DEFAULT => {
            acl::to_disk(value).map_err(|source| WriteError::Acl { name: shown(), source })?
        }
        _ => value.clone(),
    };
    Ok(Attribute { index, name: name.to_vec(), value })
}

/// Writes entries from the beginning of an area and values from its end; gives each entry's hash where it has one.
#[expect(clippy::cast_possible_truncation, reason = "offsets in a block, and lengths that fit into it")]
fn fill(area: &mut [u8], base: usize, attributes: &[Attribute], hashed: bool) -> Vec<u32> {
    let (mut at, mut end) = (base, area.len());
    let mut hashes = Vec::new();
    for attribute in attributes {
        let Attribute { index, name, value } = attribute;
        end -= padded(value.len());
        area[end..end + value.len()].copy_from_slice(value);
        let hash = if hashed { entry_hash(name, value) } else { 0 };
        hashes.push(hash);
        let header = EntryHeader {
            name_length: name.len() as u8,
            name_index: *index,
            value_offset: if value.is_empty() { 0 } else { end as u16 }.into(),
            value_inum: 0.into(),
            value_size: (value.len() as u32).into(),
            hash: hash.into(),
        };
        area[at..at + ENTRY].copy_from_slice(header.as_bytes());
        area[at + ENTRY..at + ENTRY + name.len()].copy_from_slice(name);
        at += entry_size(name.len());
    }
    hashes
}

impl Split {
    /// Whether something does not fit into the inode.
    pub(crate) fn needs_block(&self) -> bool {
        !self.rest.is_empty()
    }

    /// Puts what goes there into an inode, whole.
    pub(crate) fn put_into(&self, inode: &mut [u8]) {
        self.put_at(&mut inode[IN_INODE..]);
    }

    /// The same, with what is behind the inode's fields; all zeros.
    pub(crate) fn put_at(&self, area: &mut [u8]) {
        if !self.in_inode.is_empty() {
            area[..4].copy_from_slice(&MAGIC.to_le_bytes());
            fill(&mut area[4..], 0, &self.in_inode, false);
        }
    }

    /// The block for what is not in the inode, of one inode alone; nothing where all is.
    pub(crate) fn own_block(&self, seed: Seed, place: Block, block_size: u32) -> Option<Vec<u8>> {
        (!self.rest.is_empty())
            .then(|| encode(&self.rest, Shared { place, references: 1 }, seed, block_size as usize))
    }
}

/// The blocks of attributes.
#[derive(Debug)]
pub(crate) struct Blocks {
    known: HashMap<Rest, Shared>,
    remembered: usize,
    seed: Seed,
    block_size: usize,
}

#[derive(Debug, Clone, Copy)]
struct Shared {
    place: Block,
    references: u32,
}

impl Blocks {
    pub(crate) fn new(seed: Seed, block_size: u32) -> Blocks {
        Blocks { known: HashMap::new(), remembered: 0, seed, block_size: block_size as usize }
    }

    /// The block for what does not fit into the inode, if something does not.
    pub(crate) fn place(
        &mut self,
        split: Split,
        space: &mut Space,
        target: &mut Target,
    ) -> Result<Option<Block>> {
        let rest = split.rest;
        if rest.is_empty() {
            return Ok(None);
        }
        if let Some(shared) = self.known.get_mut(&rest) {
            if shared.references < MAX_SHARED {
                shared.references += 1;
                return Ok(Some(shared.place));
            }
            // Full: written as it is, and the next ones share a new block.
            let full = *shared;
            self.write(&rest, full, target)?;
            let place = space.one()?;
            self.known.insert(rest, Shared { place, references: 1 });
            return Ok(Some(place));
        }
        let shared = Shared { place: space.one()?, references: 1 };
        let size: usize = rest.iter().map(|attribute| size_of::<Attribute>() + attribute.size()).sum();
        if self.remembered + size > REMEMBERED {
            self.write(&rest, shared, target)?;
        } else {
            self.remembered += size;
            self.known.insert(rest, shared);
        }
        Ok(Some(shared.place))
    }

    /// Writes all blocks not yet written.
    pub(crate) fn finish(&mut self, target: &mut Target) -> Result<()> {
        let mut left: Vec<(Rest, Shared)> = std::mem::take(&mut self.known).into_iter().collect();
        left.sort_unstable_by_key(|(_, shared)| shared.place);
        left.iter().try_for_each(|(rest, shared)| self.write(rest, *shared, target))
    }

    fn write(&self, rest: &Rest, shared: Shared, target: &mut Target) -> Result<()> {
        target.write(shared.place, &encode(rest, shared, self.seed, self.block_size))
    }
}

/// A block of attributes as it goes to its place.
fn encode(rest: &Rest, shared: Shared, seed: Seed, block_size: usize) -> Vec<u8> {
    let mut block = vec![0; block_size];
    let hashes = fill(&mut block, BLOCK_HEADER, rest, true);
    let header = BlockHeader {
        magic: MAGIC.into(),
        references: shared.references.into(),
        blocks: 1.into(),
        hash: block_hash(hashes).into(),
        checksum: 0.into(),
        reserved: [0.into(); 3],
    };
    block[..BLOCK_HEADER].copy_from_slice(header.as_bytes());
    seal(seed, shared.place, &mut block);
    block
}
