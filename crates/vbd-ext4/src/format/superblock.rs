//! The superblock ("Super Block"): 1 KiB at byte 1024 of the filesystem, and copies at the beginning of some groups.

use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::{Seed, crc32c};
use super::{Block, Timestamp};

/// Where it is, in bytes from the beginning of the filesystem.
pub const OFFSET: u64 = 1024;
/// Bytes of it.
pub const SIZE: usize = 1024;
/// The number in it that says ext2, ext3 or ext4.
pub const MAGIC: u16 = 0xEF53;

/// Compatible features: one that is not known does not matter.
pub mod compat {
    /// A journal.
    pub const HAS_JOURNAL: u32 = 0x4;
    /// Extended attributes.
    pub const EXT_ATTR: u32 = 0x8;
    /// Blocks reserved for more group descriptors.
    pub const RESIZE_INODE: u32 = 0x10;
    /// Hashed directories.
    pub const DIR_INDEX: u32 = 0x20;
    /// Two backups of the superblock, in groups that it names.
    pub const SPARSE_SUPER2: u32 = 0x200;
    /// The journal may hold fast commits.
    pub const FAST_COMMIT: u32 = 0x400;
    /// Inode numbers and UUID never change.
    pub const STABLE_INODES: u32 = 0x800;
    /// Orphans are listed in a file.
    pub const ORPHAN_FILE: u32 = 0x1000;
}

/// Incompatible features: who does not know one must not touch the filesystem.
pub mod incompat {
    /// Compression.
    pub const COMPRESSION: u32 = 0x1;
    /// Directory entries tell the type.
    pub const FILETYPE: u32 = 0x2;
    /// The journal holds changes.
    pub const RECOVER: u32 = 0x4;
    /// It is a journal only.
    pub const JOURNAL_DEV: u32 = 0x8;
    /// Group descriptors lie in the groups they describe.
    pub const META_BG: u32 = 0x10;
    /// Extents.
    pub const EXTENTS: u32 = 0x40;
    /// Block numbers of 64 bits.
    pub const BITS64: u32 = 0x80;
    /// Protection against two mounts.
    pub const MMP: u32 = 0x100;
    /// Bitmaps and tables of several groups together.
    pub const FLEX_BG: u32 = 0x200;
    /// Values of xattrs in inodes of their own.
    pub const EA_INODE: u32 = 0x400;
    /// Data in directory entries.
    pub const DIRDATA: u32 = 0x1000;
    /// The checksum seed is in the superblock.
    pub const CSUM_SEED: u32 = 0x2000;
    /// Directories of three levels and more than 4 GiB.
    pub const LARGEDIR: u32 = 0x4000;
    /// Small files in the inode.
    pub const INLINE_DATA: u32 = 0x8000;
    /// Encrypted inodes.
    pub const ENCRYPT: u32 = 0x1_0000;
    /// Directories that do not tell upper from lower case.
    pub const CASEFOLD: u32 = 0x2_0000;
}

/// Features that allow reading to those who do not know them.
pub mod ro_compat {
    /// Backups of the superblock in groups 0, 1 and powers of 3, 5 and 7 only.
    pub const SPARSE_SUPER: u32 = 0x1;
    /// Files of 2 GiB and more.
    pub const LARGE_FILE: u32 = 0x2;
    /// B-trees in directories; never used.
    pub const BTREE_DIR: u32 = 0x4;
    /// An inode's blocks may be counted in blocks instead of sectors.
    pub const HUGE_FILE: u32 = 0x8;
    /// Group descriptors have a checksum (CRC-16).
    pub const GDT_CSUM: u32 = 0x10;
    /// Directories with more than 64,998 subdirectories.
    pub const DIR_NLINK: u32 = 0x20;
    /// Inodes have room beyond 128 bytes for the fields that need it.
    pub const EXTRA_ISIZE: u32 = 0x40;
    /// A snapshot; never used.
    pub const HAS_SNAPSHOT: u32 = 0x80;
    /// Quotas in hidden inodes.
    pub const QUOTA: u32 = 0x100;
    /// Clusters of blocks.
    pub const BIGALLOC: u32 = 0x200;
    /// Everything has a checksum (CRC-32C).
    pub const METADATA_CSUM: u32 = 0x400;
    /// Replicas; never used.
    pub const REPLICA: u32 = 0x800;
    /// Never to be written.
    pub const READONLY: u32 = 0x1000;
    /// Quotas of projects.
    pub const PROJECT: u32 = 0x2000;
    /// Deduplicated.
    pub const SHARED_BLOCKS: u32 = 0x4000;
    /// Files with Merkle trees.
    pub const VERITY: u32 = 0x8000;
    /// The orphan file may hold something.
    pub const ORPHAN_PRESENT: u32 = 0x1_0000;
}

/// Values of `state`.
pub mod state {
    /// Unmounted cleanly.
    pub const VALID: u16 = 1;
    /// Errors were found.
    pub const ERRORS: u16 = 2;
    /// Orphans are being removed.
    pub const ORPHANS: u16 = 4;
}

/// Bits of `flags`.
pub mod flags {
    /// Names are hashed as signed characters.
    pub const SIGNED_HASH: u32 = 1;
    /// Names are hashed as unsigned characters.
    pub const UNSIGNED_HASH: u32 = 2;
    /// For tests of developers.
    pub const TEST_FILESYSTEM: u32 = 4;
}

/// Bits of `default_mount_options`.
pub mod mount_option {
    /// Debugging.
    pub const DEBUG: u32 = 0x1;
    /// New files take their directory's group.
    pub const BSD_GROUPS: u32 = 0x2;
    /// User xattrs.
    pub const USER_XATTR: u32 = 0x4;
    /// POSIX ACLs.
    pub const ACL: u32 = 0x8;
    /// 16-bit owners.
    pub const UID16: u32 = 0x10;
    /// data=journal; together with the next bit data=writeback.
    pub const JOURNAL_DATA: u32 = 0x20;
    /// data=ordered.
    pub const JOURNAL_ORDERED: u32 = 0x40;
    /// nobarrier.
    pub const NO_BARRIER: u32 = 0x100;
    /// block_validity.
    pub const BLOCK_VALIDITY: u32 = 0x200;
    /// discard.
    pub const DISCARD: u32 = 0x400;
    /// nodelalloc.
    pub const NO_DELALLOC: u32 = 0x800;
}

/// The superblock.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(
    missing_docs,
    reason = "the names are the documentation's, with the halves of one number named alike"
)]
pub struct Superblock {
    pub inodes_count: U32,
    pub blocks_count_low: U32,
    pub reserved_blocks_low: U32,
    pub free_blocks_low: U32,
    pub free_inodes: U32,
    pub first_data_block: U32,
    pub log_block_size: U32,
    pub log_cluster_size: U32,
    pub blocks_per_group: U32,
    pub clusters_per_group: U32,
    pub inodes_per_group: U32,
    pub mount_time: U32,
    pub write_time: U32,
    pub mount_count: U16,
    pub max_mount_count: U16,
    pub magic: U16,
    pub state: U16,
    pub errors: U16,
    pub minor_revision: U16,
    pub last_check: U32,
    pub check_interval: U32,
    pub creator_os: U32,
    pub revision: U32,
    pub reserved_uid: U16,
    pub reserved_gid: U16,
    pub first_ino: U32,
    pub inode_size: U16,
    pub block_group: U16,
    pub compat: U32,
    pub incompat: U32,
    pub ro_compat: U32,
    pub uuid: [u8; 16],
    pub label: [u8; 16],
    pub last_mounted: [u8; 64],
    pub algorithm_usage: U32,
    pub preallocate_blocks: u8,
    pub preallocate_directory_blocks: u8,
    pub reserved_gdt_blocks: U16,
    pub journal_uuid: [u8; 16],
    pub journal_inum: U32,
    pub journal_device: U32,
    pub last_orphan: U32,
    /// The seed of directory hashes: four little-endian words.
    pub hash_seed: [U32; 4],
    pub hash_version: u8,
    /// 1: `journal_blocks` has the journal's `i_block` and size.
    pub journal_backup_type: u8,
    pub descriptor_size: U16,
    pub default_mount_options: U32,
    pub first_meta_bg: U32,
    pub mkfs_time: U32,
    pub journal_blocks: [U32; 17],
    pub blocks_count_high: U32,
    pub reserved_blocks_high: U32,
    pub free_blocks_high: U32,
    pub min_extra_isize: U16,
    pub want_extra_isize: U16,
    pub flags: U32,
    pub raid_stride: U16,
    pub mmp_interval: U16,
    pub mmp_block: U64,
    pub raid_stripe_width: U32,
    pub log_groups_per_flex: u8,
    /// 1: CRC-32C.
    pub checksum_type: u8,
    pub encryption_level: u8,
    pub padding: u8,
    pub kbytes_written: U64,
    pub snapshot_inum: U32,
    pub snapshot_id: U32,
    pub snapshot_reserved_blocks: U64,
    pub snapshot_list: U32,
    pub error_count: U32,
    pub first_error_time: U32,
    pub first_error_ino: U32,
    pub first_error_block: U64,
    pub first_error_function: [u8; 32],
    pub first_error_line: U32,
    pub last_error_time: U32,
    pub last_error_ino: U32,
    pub last_error_line: U32,
    pub last_error_block: U64,
    pub last_error_function: [u8; 32],
    /// Mount options as a string that ends with a zero.
    pub mount_options: [u8; 64],
    pub user_quota_inum: U32,
    pub group_quota_inum: U32,
    pub overhead_clusters: U32,
    /// Groups with a backup (sparse_super2).
    pub backup_groups: [U32; 2],
    pub encryption_algorithms: [u8; 4],
    pub encryption_salt: [u8; 16],
    pub lost_and_found_ino: U32,
    pub project_quota_inum: U32,
    pub checksum_seed: U32,
    pub write_time_high: u8,
    pub mount_time_high: u8,
    pub mkfs_time_high: u8,
    pub last_check_high: u8,
    pub first_error_time_high: u8,
    pub last_error_time_high: u8,
    pub first_error_code: u8,
    pub last_error_code: u8,
    pub encoding: U16,
    pub encoding_flags: U16,
    pub orphan_file_inum: U32,
    pub reserved: [U32; 94],
    pub checksum: U32,
}

const _: () = assert!(size_of::<Superblock>() == SIZE && offset_of!(Superblock, checksum) == 0x3FC);

impl Superblock {
    /// Bytes of a block, where the shift can be: at most 64 KiB.
    pub fn block_size(&self) -> Option<u32> {
        Some(self.log_block_size.get()).filter(|shift| *shift <= 6).map(|shift| 1024 << shift)
    }

    /// Blocks of the filesystem.
    pub fn blocks(&self) -> Block {
        self.wide(self.blocks_count_low, self.blocks_count_high)
    }

    /// Blocks that are free.
    pub fn free_blocks(&self) -> Block {
        self.wide(self.free_blocks_low, self.free_blocks_high)
    }

    /// Blocks that only root may use.
    pub fn reserved_blocks(&self) -> Block {
        self.wide(self.reserved_blocks_low, self.reserved_blocks_high)
    }

    fn wide(&self, low: U32, high: U32) -> u64 {
        let high = if self.has_incompat(incompat::BITS64) { u64::from(high.get()) << 32 } else { 0 };
        high | u64::from(low.get())
    }

    /// Whether it has all of these compatible features.
    pub fn has_compat(&self, features: u32) -> bool {
        self.compat.get() & features == features
    }

    /// Whether it has all of these incompatible features.
    pub fn has_incompat(&self, features: u32) -> bool {
        self.incompat.get() & features == features
    }

    /// Whether it has all of these read-only compatible features.
    pub fn has_ro_compat(&self, features: u32) -> bool {
        self.ro_compat.get() & features == features
    }

    /// The inode of the quota file of a kind; 0 where there is none.
    pub fn quota_inum(&self, kind: super::quota::Kind) -> super::Ino {
        if !self.has_ro_compat(ro_compat::QUOTA) {
            return 0;
        }
        match kind {
            super::quota::Kind::User => self.user_quota_inum.get(),
            super::quota::Kind::Group => self.group_quota_inum.get(),
            super::quota::Kind::Project => self.project_quota_inum.get(),
        }
    }

    /// The seed of the checksums (metadata_csum).
    pub fn seed(&self) -> Seed {
        if self.has_incompat(incompat::CSUM_SEED) {
            Seed(self.checksum_seed.get())
        } else {
            Seed::of_uuid(&self.uuid)
        }
    }

    /// Its own checksum, of all before it; the seed has no part in it.
    pub fn sum(&self) -> u32 {
        crc32c(!0, &self.as_bytes()[..offset_of!(Superblock, checksum)])
    }

    /// Sets its checksum; the last thing before it is written.
    pub fn seal(&mut self) {
        self.checksum = self.sum().into();
    }

    /// Bytes of a group descriptor: 32 unless it says more.
    pub fn descriptor_bytes(&self) -> u16 {
        if self.has_incompat(incompat::BITS64) { self.descriptor_size.get().max(32) } else { 32 }
    }

    /// A time in two parts, the seconds beyond 32 bits in the second one.
    pub fn time(low: U32, high: u8) -> Timestamp {
        Timestamp { seconds: i64::from(high) << 32 | i64::from(low.get()), nanoseconds: 0 }
    }

    /// The two parts of a time; before 1970 becomes 1970.
    #[expect(clippy::cast_possible_truncation, reason = "the parts of one number")]
    pub fn split_time(time: Timestamp) -> (U32, u8) {
        let seconds = time.seconds.clamp(0, (1 << 40) - 1).cast_unsigned();
        ((seconds as u32).into(), (seconds >> 32) as u8)
    }
}

/// Whether a group begins with a backup of the superblock and the group descriptors (sparse_super).
pub fn has_backup(group: u32) -> bool {
    let power_of = |base: u32| {
        let mut left = group;
        while left > 1 && left.is_multiple_of(base) {
            left /= base;
        }
        left == 1
    };
    group <= 1 || power_of(3) || power_of(5) || power_of(7)
}
