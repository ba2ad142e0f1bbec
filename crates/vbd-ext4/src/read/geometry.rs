//! What the superblock says of the filesystem, checked.

use zerocopy::FromBytes;

use super::blocks::Blocks;
use super::{Error, Place, Result};
use crate::format::superblock::{self, Superblock, compat, incompat, ro_compat};
use crate::format::{Block, Ino, Seed, group, ino};

/// Features that are known, or do not matter to a reader.
const KNOWN: u32 = incompat::FILETYPE
    | incompat::RECOVER
    | incompat::META_BG
    | incompat::EXTENTS
    | incompat::BITS64
    | incompat::MMP
    | incompat::FLEX_BG
    | incompat::EA_INODE
    | incompat::CSUM_SEED
    | incompat::LARGEDIR
    | incompat::INLINE_DATA
    | incompat::ENCRYPT
    | incompat::CASEFOLD;

/// Bytes of an inode in the first revision, which does not say so.
const OLD_INODE: u16 = 128;

/// The numbers that everything else is found with.
#[derive(Debug, Clone)]
pub(crate) struct Geometry {
    pub(crate) superblock: Superblock,
    pub(crate) block_size: u32,
    pub(crate) blocks: Block,
    pub(crate) first_data_block: Block,
    pub(crate) blocks_per_group: u64,
    pub(crate) inodes_per_group: u32,
    pub(crate) inode_size: u16,
    pub(crate) descriptor_size: u16,
    pub(crate) groups: u32,
    /// The seed of all checksums, where there are any.
    pub(crate) seed: Option<Seed>,
}

fn bad(reason: impl Into<String>) -> Error {
    Error::corrupt(Place::Superblock, reason)
}

impl Geometry {
    /// From the 1024 bytes of a superblock; `verify` asks for the right checksum.
    pub(crate) fn new(bytes: &[u8], verify: bool) -> Result<Geometry> {
        let superblock = Superblock::read_from_prefix(bytes).map_err(|_| Error::NotExt)?.0;
        if superblock.magic.get() != superblock::MAGIC {
            return Err(Error::NotExt);
        }
        let unknown = superblock.incompat.get() & !KNOWN;
        if unknown != 0 {
            return Err(Error::unsupported(Place::Superblock, names(unknown)));
        }
        let with_sums = superblock.has_ro_compat(ro_compat::METADATA_CSUM);
        if with_sums && superblock.checksum_type != 1 {
            let feature = format!("checksums of kind {}", superblock.checksum_type);
            return Err(Error::unsupported(Place::Superblock, feature));
        }
        if verify && with_sums && superblock.sum() != superblock.checksum.get() {
            return Err(Error::Checksum(Place::Superblock));
        }
        let block_size = superblock.block_size().ok_or_else(|| bad("its blocks are larger than 64 KiB"))?;
        let blocks = superblock.blocks();
        let first_data_block = u64::from(superblock.first_data_block.get());
        if first_data_block >= blocks || first_data_block > 1 {
            return Err(bad(format!("the first group begins at block {first_data_block}, of {blocks}")));
        }
        if blocks.checked_mul(u64::from(block_size)).is_none_or(|bytes| i64::try_from(bytes).is_err()) {
            return Err(bad(format!("it says it has {blocks} blocks")));
        }

        let most = 8 * block_size;
        let cluster_ratio = match superblock.has_ro_compat(ro_compat::BIGALLOC) {
            true => {
                let shift = superblock.log_cluster_size.get().checked_sub(superblock.log_block_size.get());
                1 << shift.filter(|shift| *shift <= 20).ok_or_else(|| bad("its clusters have no size"))?
            }
            false => 1u64,
        };
        let blocks_per_group = u64::from(superblock.blocks_per_group.get());
        if blocks_per_group == 0 || blocks_per_group > u64::from(most) * cluster_ratio {
            return Err(bad(format!("it says it has {blocks_per_group} blocks in a group")));
        }
        let inodes_per_group = superblock.inodes_per_group.get();
        if inodes_per_group == 0 || inodes_per_group > most {
            return Err(bad(format!("it says it has {inodes_per_group} inodes in a group")));
        }
        let inode_size = if superblock.revision.get() == 0 { OLD_INODE } else { superblock.inode_size.get() };
        if !inode_size.is_power_of_two() || inode_size < OLD_INODE || u32::from(inode_size) > block_size {
            return Err(bad(format!("its inodes have {inode_size} bytes")));
        }
        let descriptor_size = superblock.descriptor_bytes();
        if !descriptor_size.is_power_of_two() || u32::from(descriptor_size) > block_size {
            return Err(bad(format!("its group descriptors have {descriptor_size} bytes")));
        }
        let groups = (blocks - first_data_block).div_ceil(blocks_per_group);
        let groups = u32::try_from(groups).map_err(|_| bad(format!("it says it has {groups} groups")))?;
        let inodes = superblock.inodes_count.get();
        if u64::from(inodes) > u64::from(groups) * u64::from(inodes_per_group) || inodes < ino::FIRST {
            return Err(bad(format!("it says it has {inodes} inodes in {groups} groups")));
        }
        let seed = with_sums.then(|| superblock.seed());
        Ok(Geometry {
            superblock,
            block_size,
            blocks,
            first_data_block,
            blocks_per_group,
            inodes_per_group,
            inode_size,
            descriptor_size,
            groups,
            seed,
        })
    }

    /// How many inodes there are.
    pub(crate) fn inodes(&self) -> Ino {
        self.superblock.inodes_count.get()
    }

    /// Whether a group begins with a superblock, and group descriptors where there is no meta_bg.
    pub(crate) fn has_superblock(&self, group: u32) -> bool {
        let superblock = &self.superblock;
        if superblock.has_compat(compat::SPARSE_SUPER2) {
            return group == 0 || superblock.backup_groups.iter().any(|backup| backup.get() == group);
        }
        !superblock.has_ro_compat(ro_compat::SPARSE_SUPER) || superblock::has_backup(group)
    }

    /// The block that holds the descriptor of a group, and where it is in it ("Meta Block Groups").
    pub(crate) fn descriptor_place(&self, group: u32) -> (Block, usize) {
        let per_block = self.block_size / u32::from(self.descriptor_size);
        let (number, within) = (group / per_block, group % per_block);
        let within = (within * u32::from(self.descriptor_size)) as usize;
        let old =
            !self.superblock.has_incompat(incompat::META_BG) || number < self.superblock.first_meta_bg.get();
        if old {
            // Behind the superblock, which is at byte 1024 whatever the numbering.
            let superblock = u64::from(self.block_size == 1024);
            return (superblock + 1 + u64::from(number), within);
        }
        let first = number * per_block;
        let mut block = self.first_data_block + u64::from(first) * self.blocks_per_group;
        if self.has_superblock(first) {
            block += 1;
            // With 1 KiB blocks, bigalloc numbers from 0: the boot block is before the superblock.
            if self.block_size == 1024 && self.first_data_block == 0 && first == 0 {
                block += 1;
            }
        }
        (block, within)
    }

    /// The descriptor of a group.
    pub(crate) fn descriptor(
        &self,
        blocks: &Blocks,
        group: u32,
        verify: bool,
    ) -> Result<group::GroupDescriptor> {
        let place = Place::Group(group);
        let (block, at) = self.descriptor_place(group);
        let bytes = blocks.metadata(block, place)?;
        let bytes = &bytes[at..at + usize::from(self.descriptor_size)];
        let descriptor = group::GroupDescriptor::read(bytes);
        let stored = descriptor.checksum.get();
        let right = match self.seed {
            _ if !verify => true,
            Some(seed) => group::GroupDescriptor::sum(bytes, group, seed) == stored,
            None if self.superblock.has_ro_compat(ro_compat::GDT_CSUM) => {
                group::GroupDescriptor::sum16(bytes, group, &self.superblock.uuid) == stored
            }
            None => true,
        };
        if right { Ok(descriptor) } else { Err(Error::Checksum(place)) }
    }
}

/// The names of incompatible features that cannot be read.
fn names(features: u32) -> String {
    let named = [
        (incompat::COMPRESSION, "compression"),
        (incompat::JOURNAL_DEV, "journal_dev (it is a journal, not a filesystem)"),
        (incompat::DIRDATA, "dirdata"),
    ];
    let mut names: Vec<_> =
        named.iter().filter(|(bit, _)| features & bit != 0).map(|(_, name)| (*name).to_owned()).collect();
    let rest = features & !named.iter().fold(0, |all, (bit, _)| all | bit);
    if rest != 0 {
        names.push(format!("the unknown feature {rest:#x}"));
    }
    names.join(", ")
}
