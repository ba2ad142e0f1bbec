//! What those inside of this crate ask for who look at a filesystem's structures themselves.

use std::sync::Arc;

use super::{Filesystem, Place, Result};
use crate::format::group::GroupDescriptor;
use crate::format::{Block, Seed};

/// The numbers that a filesystem's structures are found with; checked when it was opened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Numbers {
    pub(crate) block_size: u32,
    pub(crate) blocks: Block,
    pub(crate) first_data_block: Block,
    pub(crate) blocks_per_group: u64,
    pub(crate) inodes_per_group: u32,
    pub(crate) inode_size: u16,
    pub(crate) descriptor_size: u16,
    pub(crate) groups: u32,
    pub(crate) seed: Option<Seed>,
}

impl Filesystem {
    pub(crate) fn numbers(&self) -> Numbers {
        let geometry = &self.geometry;
        Numbers {
            block_size: geometry.block_size,
            blocks: geometry.blocks,
            first_data_block: geometry.first_data_block,
            blocks_per_group: geometry.blocks_per_group,
            inodes_per_group: geometry.inodes_per_group,
            inode_size: geometry.inode_size,
            descriptor_size: geometry.descriptor_size,
            groups: geometry.groups,
            seed: geometry.seed,
        }
    }

    /// Whether a group begins with a superblock.
    pub(crate) fn superblock_in(&self, group: u32) -> bool {
        self.geometry.has_superblock(group)
    }

    /// The block with the descriptor of a group, and where it is in it.
    pub(crate) fn place_of_descriptor(&self, group: u32) -> (Block, usize) {
        self.geometry.descriptor_place(group)
    }

    /// The descriptor of a group, its checksum looked at if `verify` says so.
    pub(crate) fn group(&self, group: u32, verify: bool) -> Result<GroupDescriptor> {
        self.geometry.descriptor(&self.blocks, group, verify)
    }

    /// A block of metadata, through the cache.
    pub(crate) fn block(&self, block: Block, place: Place) -> Result<Arc<[u8]>> {
        self.blocks.metadata(block, place)
    }

    /// Bytes from a place of the filesystem on, newer ones from the journal included.
    pub(crate) fn bytes_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.blocks.read(offset, buffer)
    }
}
