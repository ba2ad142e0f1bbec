//! Group descriptors ("Block Group Descriptors"): 32 bytes, or 64 with the 64bit feature.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Block;
use super::checksum::{Seed, crc16, crc32c};

/// Bits of `flags`.
pub mod flags {
    /// The inode table and its bitmap are not set up.
    pub const INODE_UNINIT: u16 = 1;
    /// The block bitmap is not set up.
    pub const BLOCK_UNINIT: u16 = 2;
    /// The inode table is zeroed.
    pub const INODE_ZEROED: u16 = 4;
}

/// A descriptor; the second half is there with the 64bit feature only, and zeros otherwise.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
#[allow(
    missing_docs,
    reason = "the names are the documentation's, with the halves of one number named alike"
)]
pub struct GroupDescriptor {
    pub block_bitmap_low: U32,
    pub inode_bitmap_low: U32,
    pub inode_table_low: U32,
    pub free_blocks_low: U16,
    pub free_inodes_low: U16,
    pub directories_low: U16,
    pub flags: U16,
    pub exclude_bitmap_low: U32,
    pub block_bitmap_sum_low: U16,
    pub inode_bitmap_sum_low: U16,
    pub unused_inodes_low: U16,
    pub checksum: U16,
    pub block_bitmap_high: U32,
    pub inode_bitmap_high: U32,
    pub inode_table_high: U32,
    pub free_blocks_high: U16,
    pub free_inodes_high: U16,
    pub directories_high: U16,
    pub unused_inodes_high: U16,
    pub exclude_bitmap_high: U32,
    pub block_bitmap_sum_high: U16,
    pub inode_bitmap_sum_high: U16,
    pub reserved: U32,
}

const CHECKSUM: usize = offset_of!(GroupDescriptor, checksum);
const _: () = assert!(size_of::<GroupDescriptor>() == 64 && CHECKSUM == 0x1E);

fn wide(low: U32, high: U32) -> u64 {
    u64::from(high.get()) << 32 | u64::from(low.get())
}

fn joined(low: U16, high: U16) -> u32 {
    u32::from(high.get()) << 16 | u32::from(low.get())
}

#[expect(clippy::cast_possible_truncation, reason = "the halves of one number")]
fn halves(number: u64) -> (U32, U32) {
    ((number as u32).into(), ((number >> 32) as u32).into())
}

#[expect(clippy::cast_possible_truncation, reason = "the halves of one number")]
fn parts(number: u32) -> (U16, U16) {
    ((number as u16).into(), ((number >> 16) as u16).into())
}

impl GroupDescriptor {
    /// From the bytes on disk, 32 or more of them.
    pub fn read(bytes: &[u8]) -> GroupDescriptor {
        let mut descriptor = GroupDescriptor::default();
        let length = bytes.len().min(size_of::<GroupDescriptor>());
        descriptor.as_mut_bytes()[..length].copy_from_slice(&bytes[..length]);
        descriptor
    }

    /// Where the block bitmap is.
    pub fn block_bitmap(&self) -> Block {
        wide(self.block_bitmap_low, self.block_bitmap_high)
    }

    /// Where the inode bitmap is.
    pub fn inode_bitmap(&self) -> Block {
        wide(self.inode_bitmap_low, self.inode_bitmap_high)
    }

    /// Where the inode table begins.
    pub fn inode_table(&self) -> Block {
        wide(self.inode_table_low, self.inode_table_high)
    }

    /// Free blocks (clusters) of the group.
    pub fn free_blocks(&self) -> u32 {
        joined(self.free_blocks_low, self.free_blocks_high)
    }

    /// Free inodes of the group.
    pub fn free_inodes(&self) -> u32 {
        joined(self.free_inodes_low, self.free_inodes_high)
    }

    /// Inodes of the group that are directories.
    pub fn directories(&self) -> u32 {
        joined(self.directories_low, self.directories_high)
    }

    /// Inodes at the end of the table that were never used.
    pub fn unused_inodes(&self) -> u32 {
        joined(self.unused_inodes_low, self.unused_inodes_high)
    }

    /// The block bitmap's checksum; 16 bits of it in a descriptor of 32 bytes.
    pub fn block_bitmap_sum(&self) -> u32 {
        joined(self.block_bitmap_sum_low, self.block_bitmap_sum_high)
    }

    /// The inode bitmap's checksum; 16 bits of it in a descriptor of 32 bytes.
    pub fn inode_bitmap_sum(&self) -> u32 {
        joined(self.inode_bitmap_sum_low, self.inode_bitmap_sum_high)
    }

    /// Sets where the bitmaps and the inode table are.
    pub fn set_places(&mut self, block_bitmap: Block, inode_bitmap: Block, inode_table: Block) {
        (self.block_bitmap_low, self.block_bitmap_high) = halves(block_bitmap);
        (self.inode_bitmap_low, self.inode_bitmap_high) = halves(inode_bitmap);
        (self.inode_table_low, self.inode_table_high) = halves(inode_table);
    }

    /// Sets the number of free blocks.
    pub fn set_free_blocks(&mut self, count: u32) {
        (self.free_blocks_low, self.free_blocks_high) = parts(count);
    }

    /// Sets the number of free inodes.
    pub fn set_free_inodes(&mut self, count: u32) {
        (self.free_inodes_low, self.free_inodes_high) = parts(count);
    }

    /// Sets the number of directories.
    pub fn set_directories(&mut self, count: u32) {
        (self.directories_low, self.directories_high) = parts(count);
    }

    /// Sets the number of inodes never used.
    pub fn set_unused_inodes(&mut self, count: u32) {
        (self.unused_inodes_low, self.unused_inodes_high) = parts(count);
    }

    /// Sets the block bitmap's checksum.
    pub fn set_block_bitmap_sum(&mut self, sum: u32) {
        (self.block_bitmap_sum_low, self.block_bitmap_sum_high) = parts(sum);
    }

    /// Sets the inode bitmap's checksum.
    pub fn set_inode_bitmap_sum(&mut self, sum: u32) {
        (self.inode_bitmap_sum_low, self.inode_bitmap_sum_high) = parts(sum);
    }

    /// Its own checksum with metadata_csum; `bytes` is the whole descriptor as the filesystem has it.
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is what is kept")]
    pub fn sum(bytes: &[u8], group: u32, seed: Seed) -> u16 {
        let sum = crc32c(seed.0, &group.to_le_bytes());
        let sum = crc32c(sum, &bytes[..CHECKSUM]);
        let sum = crc32c(sum, &[0, 0]);
        crc32c(sum, &bytes[CHECKSUM + 2..]) as u16
    }

    /// Its own checksum with uninit_bg (gdt_csum).
    pub fn sum16(bytes: &[u8], group: u32, uuid: &[u8; 16]) -> u16 {
        let sum = crc16(crc16(!0, uuid), &group.to_le_bytes());
        crc16(crc16(sum, &bytes[..CHECKSUM]), &bytes[CHECKSUM + 2..])
    }

    /// Sets its checksum (metadata_csum, 64 bytes); the last thing before it is written.
    pub fn seal(&mut self, group: u32, seed: Seed) {
        self.checksum = GroupDescriptor::sum(self.as_bytes(), group, seed).into();
    }
}
