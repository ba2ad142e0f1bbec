//! Inodes ("Index Nodes"): 128 bytes, and in ext4 commonly 256, of which `extra_isize` on top of 128 have a meaning; what is
//! left holds xattrs.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::{Seed, crc32c};
use super::{Attributes, Block, Ino, Timestamp};

/// Bytes of the oldest inode, and of the part without `extra_isize`.
pub const GOOD_OLD_SIZE: usize = 128;
/// Bytes beyond those that fields have in a common inode.
pub const EXTRA_ISIZE: u16 = 32;

/// The kind of an inode, in its mode.
pub mod kind {
    #![allow(missing_docs, reason = "the names say it")]
    pub const MASK: u16 = 0xF000;
    pub const FIFO: u16 = 0x1000;
    pub const CHARACTER: u16 = 0x2000;
    pub const DIRECTORY: u16 = 0x4000;
    pub const BLOCK: u16 = 0x6000;
    pub const REGULAR: u16 = 0x8000;
    pub const SYMLINK: u16 = 0xA000;
    pub const SOCKET: u16 = 0xC000;
}

/// Bits of `flags`.
pub mod flags {
    /// Synchronous.
    pub const SYNC: u32 = 0x8;
    /// Immutable.
    pub const IMMUTABLE: u32 = 0x10;
    /// Append only.
    pub const APPEND: u32 = 0x20;
    /// Not to be dumped.
    pub const NODUMP: u32 = 0x40;
    /// No update of the access time.
    pub const NOATIME: u32 = 0x80;
    /// Encrypted.
    pub const ENCRYPT: u32 = 0x800;
    /// A hashed directory.
    pub const INDEX: u32 = 0x1000;
    /// Its data goes through the journal.
    pub const JOURNAL_DATA: u32 = 0x4000;
    /// `blocks` counts blocks of the filesystem, not of 512 bytes.
    pub const HUGE_FILE: u32 = 0x4_0000;
    /// `block` is the root of an extent tree.
    pub const EXTENTS: u32 = 0x8_0000;
    /// A Merkle tree protects it.
    pub const VERITY: u32 = 0x10_0000;
    /// It is the value of an xattr.
    pub const EA_INODE: u32 = 0x20_0000;
    /// Its data is in the inode.
    pub const INLINE_DATA: u32 = 0x1000_0000;
    /// New entries inherit the project.
    pub const PROJECT_INHERIT: u32 = 0x2000_0000;
    /// Names without regard to case.
    pub const CASEFOLD: u32 = 0x4000_0000;
}

/// The fields of an inode, without the xattrs after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(
    missing_docs,
    reason = "the names are the documentation's, with the halves of one number named alike"
)]
pub struct Inode {
    pub mode: U16,
    pub uid_low: U16,
    pub size_low: U32,
    pub atime: U32,
    pub ctime: U32,
    pub mtime: U32,
    pub dtime: U32,
    pub gid_low: U16,
    pub links: U16,
    pub blocks_low: U32,
    pub flags: U32,
    pub version_low: U32,
    /// The extent tree's root, the block map, the target of a short symlink or the number of a device.
    pub block: [u8; 60],
    pub generation: U32,
    pub xattr_block_low: U32,
    pub size_high: U32,
    pub fragment: U32,
    pub blocks_high: U16,
    pub xattr_block_high: U16,
    pub uid_high: U16,
    pub gid_high: U16,
    pub checksum_low: U16,
    pub reserved: U16,
    pub extra_isize: U16,
    pub checksum_high: U16,
    pub ctime_extra: U32,
    pub mtime_extra: U32,
    pub atime_extra: U32,
    pub crtime: U32,
    pub crtime_extra: U32,
    pub version_high: U32,
    pub project: U32,
}

const CHECKSUM_LOW: usize = offset_of!(Inode, checksum_low);
const CHECKSUM_HIGH: usize = offset_of!(Inode, checksum_high);
const _: () = assert!(size_of::<Inode>() == 160 && CHECKSUM_LOW == 0x7C && CHECKSUM_HIGH == 0x82);

impl Default for Inode {
    /// All zeros: one not in use.
    fn default() -> Inode {
        Inode::read_from_bytes(&[0; size_of::<Inode>()]).expect("the size is its own")
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the parts of one number")]
fn parts(number: u32) -> (U16, U16) {
    ((number as u16).into(), ((number >> 16) as u16).into())
}

impl Inode {
    /// From the bytes on disk, 128 or more of them; fields that `extra_isize` does not reach are zero.
    pub fn read(bytes: &[u8]) -> Inode {
        let mut inode = Inode::default();
        let whole = bytes.len().min(size_of::<Inode>());
        let extra = match bytes.get(GOOD_OLD_SIZE..GOOD_OLD_SIZE + 2) {
            Some(extra) => usize::from(u16::from_le_bytes([extra[0], extra[1]])),
            None => 0,
        };
        let length = whole.min(GOOD_OLD_SIZE + extra);
        inode.as_mut_bytes()[..length].copy_from_slice(&bytes[..length]);
        inode
    }

    /// Bytes of the content; for directories too.
    pub fn size(&self) -> u64 {
        u64::from(self.size_high.get()) << 32 | u64::from(self.size_low.get())
    }

    /// Sets the bytes of the content.
    #[expect(clippy::cast_possible_truncation, reason = "the parts of one number")]
    pub fn set_size(&mut self, size: u64) {
        self.size_low = (size as u32).into();
        self.size_high = ((size >> 32) as u32).into();
    }

    /// The owner.
    pub fn uid(&self) -> u32 {
        u32::from(self.uid_high.get()) << 16 | u32::from(self.uid_low.get())
    }

    /// The group.
    pub fn gid(&self) -> u32 {
        u32::from(self.gid_high.get()) << 16 | u32::from(self.gid_low.get())
    }

    /// The block with its xattrs, 0 where it has none.
    pub fn xattr_block(&self) -> Block {
        u64::from(self.xattr_block_high.get()) << 32 | u64::from(self.xattr_block_low.get())
    }

    /// Sets the block with its xattrs.
    #[expect(clippy::cast_possible_truncation, reason = "the parts of one number")]
    pub fn set_xattr_block(&mut self, block: Block) {
        self.xattr_block_low = (block as u32).into();
        self.xattr_block_high = ((block >> 32) as u16).into();
    }

    /// Sectors of 512 bytes that it occupies, its xattr block and its tree included.
    pub fn sectors(&self, block_size: u32) -> u64 {
        let count = u64::from(self.blocks_high.get()) << 32 | u64::from(self.blocks_low.get());
        if self.flags.get() & flags::HUGE_FILE != 0 { count * u64::from(block_size / 512) } else { count }
    }

    /// Sets what it occupies, in blocks; with huge_file the count changes its unit when sectors do not fit.
    #[expect(clippy::cast_possible_truncation, reason = "the parts of one number")]
    pub fn set_blocks(&mut self, blocks: u64, block_size: u32) {
        let sectors = blocks * u64::from(block_size / 512);
        let huge = sectors >> 48 != 0;
        let count = if huge { blocks } else { sectors };
        let flag = if huge { flags::HUGE_FILE } else { 0 };
        self.flags = (self.flags.get() & !flags::HUGE_FILE | flag).into();
        self.blocks_low = (count as u32).into();
        self.blocks_high = ((count >> 32) as u16).into();
    }

    /// Mode bits, owner and times.
    pub fn attributes(&self) -> Attributes {
        let read = |low: U32, extra: U32| Timestamp::decode(low.get(), extra.get());
        Attributes {
            mode: self.mode.get() & !kind::MASK,
            uid: self.uid(),
            gid: self.gid(),
            atime: read(self.atime, self.atime_extra),
            ctime: read(self.ctime, self.ctime_extra),
            mtime: read(self.mtime, self.mtime_extra),
            crtime: read(self.crtime, self.crtime_extra),
        }
    }

    /// Sets mode bits, owner and times, and that the inode has room for them; the kind stays.
    pub fn set_attributes(&mut self, attributes: &Attributes) {
        let words = |time: Timestamp| {
            let (low, extra) = time.encode();
            (low.into(), extra.into())
        };
        self.mode = (self.mode.get() & kind::MASK | attributes.mode & !kind::MASK).into();
        (self.uid_low, self.uid_high) = parts(attributes.uid);
        (self.gid_low, self.gid_high) = parts(attributes.gid);
        self.extra_isize = EXTRA_ISIZE.into();
        (self.atime, self.atime_extra) = words(attributes.atime);
        (self.ctime, self.ctime_extra) = words(attributes.ctime);
        (self.mtime, self.mtime_extra) = words(attributes.mtime);
        (self.crtime, self.crtime_extra) = words(attributes.crtime);
    }

    /// The number of a device: major and minor ("the first two words of i_block": the old form, else the new).
    pub fn device(&self) -> (u32, u32) {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| self.block[at + byte]));
        let (old, new) = (word(0), word(4));
        if old != 0 {
            (old >> 8 & 0xff, old & 0xff)
        } else {
            (new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xf_ff00)
        }
    }

    /// Sets the number of a device; major below 2^12, minor below 2^20.
    pub fn set_device(&mut self, major: u32, minor: u32) {
        self.block = [0; 60];
        if major < 256 && minor < 256 {
            self.block[..4].copy_from_slice(&(major << 8 | minor).to_le_bytes());
        } else {
            let new = minor & 0xff | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12;
            self.block[4..8].copy_from_slice(&new.to_le_bytes());
        }
    }

    /// The checksum of an inode as it is on the disk, whole; 16 bits of it where there is no room for more.
    pub fn sum(bytes: &[u8], ino: Ino, seed: Seed) -> u32 {
        let generation = offset_of!(Inode, generation);
        let generation = u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[generation + byte]));
        let sum = crc32c(seed.of_inode(ino, generation), &bytes[..CHECKSUM_LOW]);
        let sum = crc32c(sum, &[0, 0]);
        if bytes.len() == GOOD_OLD_SIZE {
            return crc32c(sum, &bytes[CHECKSUM_LOW + 2..]) & 0xffff;
        }
        let sum = crc32c(sum, &bytes[CHECKSUM_LOW + 2..CHECKSUM_HIGH]);
        if has_high_sum(bytes) {
            crc32c(crc32c(sum, &[0, 0]), &bytes[CHECKSUM_HIGH + 2..])
        } else {
            crc32c(sum, &bytes[CHECKSUM_HIGH..]) & 0xffff
        }
    }

    /// The checksum that an inode as it is on the disk says it has.
    pub fn stored_sum(bytes: &[u8]) -> u32 {
        let half = |at: usize| u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
        let high = if has_high_sum(bytes) { half(CHECKSUM_HIGH) << 16 } else { 0 };
        high | half(CHECKSUM_LOW)
    }

    /// Sets the checksum in an inode as it goes to the disk, whole.
    pub fn seal(bytes: &mut [u8], ino: Ino, seed: Seed) {
        let sum = Inode::sum(bytes, ino, seed).to_le_bytes();
        bytes[CHECKSUM_LOW..CHECKSUM_LOW + 2].copy_from_slice(&sum[..2]);
        if has_high_sum(bytes) {
            bytes[CHECKSUM_HIGH..CHECKSUM_HIGH + 2].copy_from_slice(&sum[2..]);
        }
    }
}

/// Whether `extra_isize` reaches the checksum's upper half.
fn has_high_sum(bytes: &[u8]) -> bool {
    bytes.len() >= CHECKSUM_HIGH + 2
        && usize::from(u16::from_le_bytes([bytes[GOOD_OLD_SIZE], bytes[GOOD_OLD_SIZE + 1]])) >= 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_in_the_old_and_the_new_form() {
        let mut inode = Inode::default();
        for (major, minor) in [(1, 3), (255, 255), (256, 0), (8, 256), (4095, 0xf_ffff), (0, 300)] {
            inode.set_device(major, minor);
            assert_eq!(inode.device(), (major, minor));
        }
        inode.set_device(8, 1);
        assert_eq!(&inode.block[..8], [1, 8, 0, 0, 0, 0, 0, 0]);
        // As the kernel's new_encode_dev: (259, 65536) is 0x10010300.
        inode.set_device(259, 65536);
        assert_eq!(&inode.block[..8], [0, 0, 0, 0, 0x00, 0x03, 0x01, 0x10]);
    }

    #[test]
    fn blocks_change_their_unit_when_sectors_do_not_fit() {
        let mut inode = Inode::default();
        inode.set_blocks(8, 4096);
        assert_eq!((inode.blocks_low.get(), inode.flags.get(), inode.sectors(4096)), (64, 0, 64));
        inode.set_blocks(1 << 45, 4096);
        assert_eq!((inode.flags.get(), inode.sectors(4096)), (flags::HUGE_FILE, 1 << 48));
    }
}
