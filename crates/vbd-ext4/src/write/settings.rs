//! What a new filesystem shall be like.

use crate::format::superblock::mount_option;
use crate::format::{Seed, Timestamp};

/// How a new filesystem shall be.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Bytes; what is left over after the last whole block stays unused.
    pub size: u64,
    /// Bytes of a block: 1024, 2048 or 4096.
    pub block_size: u32,
    /// The label, at most 16 bytes without a zero.
    pub label: Vec<u8>,
    /// What checksums begin with.
    pub checksums: Checksums,
    /// The seed of directory hashes: something that nobody who names files can guess. Zeros mean MD4's own.
    pub hash_seed: [u8; 16],
    /// Percent of the blocks that are kept for root: 0 to 50.
    pub reserved_percent: f64,
    /// How many inodes there shall be at least; otherwise it depends on the size.
    pub inodes: Option<u64>,
    /// Bytes of the filesystem for which there shall be one inode, where their number is not given.
    pub bytes_per_inode: u64,
    /// When the filesystem was made.
    pub time: Timestamp,
    /// The journal.
    pub journal: Journal,
    /// Mount options that are in force by default, as bits of [`mount_option`].
    pub default_mount_options: u32,
    /// More of them, as text, at most 63 bytes.
    pub mount_options: Vec<u8>,
    /// Whether orphans go to a file of their own, which scales better; kernels before 5.15 and e2fsprogs before 1.47 do not
    /// know it and refuse to write. There is none without a journal.
    pub orphan_file: bool,
}

/// What the checksums of a filesystem begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksums {
    /// A number in the superblock (metadata_csum_seed): the UUID can be chosen last, and changed later.
    Seed(u32),
    /// The UUID, which cannot change then. GRUB before 2.12 reads only these.
    OfUuid([u8; 16]),
}

/// How large the journal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Journal {
    /// As mke2fs makes it: none below 2048 blocks, from 1024 blocks to 262144 blocks above.
    Auto,
    /// There is none.
    None,
    /// So many blocks, at least 1024.
    Blocks(u32),
}

impl Settings {
    /// The usual ones for a filesystem of so many bytes.
    pub fn new(size: u64) -> Settings {
        Settings {
            size,
            block_size: 4096,
            label: Vec::new(),
            checksums: Checksums::Seed(0),
            hash_seed: [0; 16],
            reserved_percent: 5.0,
            inodes: None,
            bytes_per_inode: 16384,
            time: Timestamp::default(),
            journal: Journal::Auto,
            default_mount_options: mount_option::USER_XATTR | mount_option::ACL,
            mount_options: Vec::new(),
            orphan_file: false,
        }
    }
}

impl Checksums {
    /// The seed.
    pub fn seed(self) -> Seed {
        match self {
            Checksums::Seed(seed) => Seed(seed),
            Checksums::OfUuid(uuid) => Seed::of_uuid(&uuid),
        }
    }
}
