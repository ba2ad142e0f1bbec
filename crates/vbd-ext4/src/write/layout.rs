//! Where everything of a filesystem is ("Layout", "Block Groups", "Flexible Block Groups", "Meta Block Groups").

use super::error::{Result, WriteError};
use super::measure;
use super::run::{Run, merged};
use super::settings::{Journal, Settings};
use super::space::Space;
use crate::format::superblock::has_backup;
use crate::format::{Block, Ino, ino, journal, superblock};

/// Bytes of an inode, and of a group descriptor.
pub(crate) const INODE_SIZE: u32 = 256;
pub(crate) const DESCRIPTOR_SIZE: u32 = 64;
/// Groups whose bitmaps and tables lie together, as a power of 2.
pub(crate) const LOG_FLEX: u8 = 4;
const FLEX: u32 = 1 << LOG_FLEX;
/// A last group with fewer blocks than this beyond its own structures is left away.
const FEWEST_IN_LAST: u64 = 50;
/// The filesystem may grow online to so many times its size without moving anything.
const GROWTH: u64 = 1024;
/// Bytes of `lost+found`, which e2fsck fills when no new blocks can be had.
const LOST_AND_FOUND: u32 = 16 * 1024;
/// Blocks of the orphan file.
pub(crate) const ORPHAN_BLOCKS: u64 = 32;
/// Its inode, the first one that is no reserved number and not `lost+found`.
pub(crate) const ORPHAN_FILE: Ino = ino::FIRST + 1;

/// Where everything is.
#[derive(Debug, Clone)]
pub struct Layout {
    pub(crate) settings: Settings,
    pub(crate) blocks: u64,
    /// The first block of group 0: 1 where a block is 1 KiB, behind the boot block.
    pub(crate) first: Block,
    pub(crate) groups: u32,
    pub(crate) inodes_per_group: u32,
    pub(crate) descriptor_blocks: u64,
    pub(crate) reserved_descriptors: u64,
    pub(crate) meta_bg: bool,
    /// By group.
    pub(crate) places: Vec<Places>,
    /// The block that lists the reserved descriptor blocks (resize_inode).
    pub(crate) resize_block: Option<Block>,
    /// Blocks that are none of a file's, sorted.
    pub(crate) metadata: Vec<Run>,
    /// Blocks of the journal; 0: none.
    pub(crate) journal_blocks: u32,
    free: u64,
}

/// Where a group's bitmaps and inodes are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Places {
    pub(crate) block_bitmap: Block,
    pub(crate) inode_bitmap: Block,
    pub(crate) inode_table: Block,
}

impl Layout {
    /// Where everything is in a filesystem with these settings.
    pub fn new(settings: &Settings) -> Result<Layout> {
        check(settings)?;
        let size = settings.block_size;
        let first = u64::from(size == 1024);
        let per_group = u64::from(size) * 8;
        let too_small = || WriteError::TooSmall { size: settings.size };
        let mut blocks = settings.size / u64::from(size);
        if blocks < first + 32 {
            return Err(too_small());
        }
        loop {
            let groups = u32::try_from((blocks - first).div_ceil(per_group)).map_err(|_| {
                WriteError::setting("the size", settings.size, "there would be too many groups")
            })?;
            let mut layout = Layout {
                settings: settings.clone(),
                blocks,
                first,
                groups,
                inodes_per_group: inodes_per_group(settings, blocks, groups)?,
                descriptor_blocks: (u64::from(groups) * u64::from(DESCRIPTOR_SIZE)).div_ceil(u64::from(size)),
                reserved_descriptors: 0,
                // Reserved descriptors are listed in 32-bit numbers.
                meta_bg: blocks > u64::from(u32::MAX),
                places: Vec::new(),
                resize_block: None,
                metadata: Vec::new(),
                journal_blocks: match settings.journal {
                    Journal::None => 0,
                    Journal::Auto => usual_journal(blocks),
                    Journal::Blocks(blocks) => blocks,
                },
                free: 0,
            };
            layout.reserved_descriptors = layout.growth();
            let last = (blocks - first) % per_group;
            let fewest = layout.header(groups - 1) + 2 + layout.table_blocks() + FEWEST_IN_LAST;
            if last != 0 && last < fewest {
                if groups == 1 {
                    // Alone it need not be that roomy: whether all has a place is seen below.
                    if last < fewest - FEWEST_IN_LAST {
                        return Err(too_small());
                    }
                } else {
                    blocks -= last;
                    continue;
                }
            }
            layout.place().ok_or_else(too_small)?;
            layout.count_free()?;
            return Ok(layout);
        }
    }

    /// The smallest filesystem that has so many blocks and inodes free; the size in the settings does not matter, and the
    /// number of inodes is the settings' or this one, whichever is more.
    pub fn smallest(blocks: u64, inodes: u64, settings: &Settings) -> Result<Layout> {
        let mut settings = settings.clone();
        check(&settings)?;
        let size = u64::from(settings.block_size);
        // All numbers before the first for entries, the orphan file's among them.
        let all_inodes = inodes.saturating_add(u64::from(ino::FIRST) + 1);
        let fixed = settings.inodes.map(|count| count.max(all_inodes));
        let per_group = size * 8;
        let groups_before = fixed.unwrap_or(all_inodes).div_ceil(per_group) - 1;
        let journal = if let Journal::Blocks(blocks) = settings.journal { u64::from(blocks) } else { 0 };
        // No filesystem that holds it has fewer.
        let mut count = blocks.saturating_add(journal + 32).max(groups_before * per_group);
        loop {
            settings.size = count.checked_mul(size).ok_or_else(|| {
                WriteError::setting("the number of blocks", blocks, "no filesystem is as large as that")
            })?;
            settings.inodes = fixed.or_else(|| {
                let usual = settings.size / settings.bytes_per_inode.max(1);
                Some(all_inodes.max(usual))
            });
            // From below, by what is missing: no block more makes room for more than one.
            match Layout::new(&settings) {
                Ok(layout) if layout.free_blocks() >= blocks && layout.free_inodes() >= inodes => {
                    return Ok(layout);
                }
                Ok(layout) => count += blocks.saturating_sub(layout.free_blocks()).max(1),
                Err(WriteError::TooSmall { .. }) => count += 1 + count / 256,
                // A last group is missing that has to have some blocks to be there.
                Err(WriteError::NoInodes(most)) if most <= u64::from(u32::MAX) => count += 64,
                Err(error) => return Err(error),
            }
        }
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u32 {
        self.settings.block_size
    }

    /// Blocks of the filesystem.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Bytes of the filesystem.
    pub fn bytes(&self) -> u64 {
        self.blocks * u64::from(self.block_size())
    }

    /// Blocks free for files, directories (the root's too) and what belongs to them.
    pub fn free_blocks(&self) -> u64 {
        self.free
    }

    /// All inodes.
    pub fn inodes(&self) -> u64 {
        u64::from(self.inodes_per_group) * u64::from(self.groups)
    }

    /// Inodes free for entries; the root and `lost+found` have theirs.
    pub fn free_inodes(&self) -> u64 {
        self.inodes() - u64::from(self.first_free_ino() - 1)
    }

    /// The settings that it was made for.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Whether there is an orphan file, which is nothing without a journal.
    pub(crate) fn has_orphan_file(&self) -> bool {
        self.settings.orphan_file && self.journal_blocks > 0
    }

    /// The first inode number for entries.
    pub(crate) fn first_free_ino(&self) -> Ino {
        ino::FIRST + 1 + Ino::from(self.has_orphan_file())
    }

    pub(crate) fn blocks_per_group(&self) -> u32 {
        self.block_size() * 8
    }

    /// Blocks of an inode table.
    pub(crate) fn table_blocks(&self) -> u64 {
        u64::from(self.inodes_per_group) * u64::from(INODE_SIZE) / u64::from(self.block_size())
    }

    /// Blocks of `lost+found`.
    pub(crate) fn lost_and_found_blocks(&self) -> u64 {
        u64::from(LOST_AND_FOUND / self.block_size())
    }

    /// A group's blocks.
    pub(crate) fn group(&self, group: u32) -> Run {
        let per_group = u64::from(self.blocks_per_group());
        let start = self.first + u64::from(group) * per_group;
        Run::new(start, per_group.min(self.blocks - start))
    }

    /// Blocks at a group's beginning for the superblock and group descriptors.
    pub(crate) fn header(&self, group: u32) -> u64 {
        let superblock = has_backup(group);
        let descriptors = if self.meta_bg {
            u64::from(self.has_meta_descriptors(group))
        } else if superblock {
            self.descriptor_blocks + self.reserved_descriptors
        } else {
            0
        };
        u64::from(superblock) + descriptors
    }

    /// Whether a group has a copy of the descriptors of its meta group: the first, the second and the last one have.
    pub(crate) fn has_meta_descriptors(&self, group: u32) -> bool {
        let per_block = self.block_size() / DESCRIPTOR_SIZE;
        matches!(group % per_block, 0 | 1) || group % per_block == per_block - 1
    }

    /// Blocks to reserve for descriptors of groups to come.
    fn growth(&self) -> u64 {
        let most = u64::from(u32::MAX);
        if self.meta_bg {
            return 0;
        }
        let blocks = self.blocks.saturating_mul(GROWTH).min(most);
        let groups = (blocks - self.first).div_ceil(u64::from(self.blocks_per_group()));
        let needed = (groups * u64::from(DESCRIPTOR_SIZE)).div_ceil(u64::from(self.block_size()));
        // One block lists them all.
        needed.saturating_sub(self.descriptor_blocks).min(u64::from(self.block_size() / 4))
    }

    /// Gives bitmaps and tables their places, together for the groups of a flexible group. `None`: they do not fit.
    fn place(&mut self) -> Option<()> {
        let headers = (0..self.groups)
            .map(|group| Run::new(self.group(group).start, self.header(group)))
            .filter(|run| run.length > 0);
        let mut metadata: Vec<Run> = headers.collect();
        let table_blocks = self.table_blocks();
        for begin in (0..self.groups).step_by(FLEX as usize) {
            let count = u64::from(FLEX.min(self.groups - begin));
            let mut cursor = self.group(begin).start;
            let mut take = |length| {
                let start = self.room(cursor, length)?;
                metadata.push(Run::new(start, length));
                cursor = start + length;
                Some(start)
            };
            let block_bitmaps = (0..count).map(|_| take(1)).collect::<Option<Vec<_>>>()?;
            let inode_bitmaps = (0..count).map(|_| take(1)).collect::<Option<Vec<_>>>()?;
            let tables = (0..count).map(|_| take(table_blocks)).collect::<Option<Vec<_>>>()?;
            if begin == 0 && self.reserved_descriptors > 0 {
                self.resize_block = Some(take(1)?);
            }
            let places = block_bitmaps.into_iter().zip(inode_bitmaps).zip(tables);
            self.places.extend(places.map(|((block_bitmap, inode_bitmap), inode_table)| Places {
                block_bitmap,
                inode_bitmap,
                inode_table,
            }));
        }
        self.metadata = merged(metadata);
        Some(())
    }

    /// The first place from a block on that has so many blocks in a row without a group's header in them.
    fn room(&self, from: Block, length: u64) -> Option<Block> {
        let per_group = u64::from(self.blocks_per_group());
        let mut start = from;
        loop {
            let end = start + length;
            if end > self.blocks {
                return None;
            }
            // No table is longer than a group, so it touches two groups at most.
            let group_of = |block: Block| u32::try_from((block - self.first) / per_group).ok();
            let (begin, last) = (group_of(start)?, group_of(end - 1)?);
            let after = |group| self.group(group).start + self.header(group);
            if start < after(begin) {
                start = after(begin);
            } else if last != begin && self.header(last) > 0 {
                start = after(last);
            } else {
                return Some(start);
            }
        }
    }

    /// Sets what stays free after all that the filesystem itself needs.
    fn count_free(&mut self) -> Result<()> {
        let too_small = WriteError::TooSmall { size: self.settings.size };
        let mut space = Space::new(self);
        let Ok(runs) = space.allocate(u64::from(self.journal_blocks)) else { return Err(too_small) };
        let extents = measure::pieces(&runs);
        let orphans = if self.has_orphan_file() { ORPHAN_BLOCKS } else { 0 };
        let own = measure::tree_blocks(extents, self.block_size()) + self.lost_and_found_blocks() + orphans;
        self.free = space.free().checked_sub(own).ok_or(too_small)?;
        if self.inodes() < u64::from(self.first_free_ino()) {
            return Err(WriteError::NoInodes(self.inodes()));
        }
        Ok(())
    }
}

/// The journal as large as mke2fs makes it, in blocks.
fn usual_journal(blocks: u64) -> u32 {
    const K: u64 = 1024;
    match blocks {
        0..2048 => 0,
        2048..32768 => 1024,
        blocks if blocks < 256 * K => 4096,
        blocks if blocks < 512 * K => 8192,
        blocks if blocks < 4096 * K => 16384,
        blocks if blocks < 8192 * K => 32768,
        blocks if blocks < 16384 * K => 65536,
        blocks if blocks < 32768 * K => 131_072,
        _ => 262_144,
    }
}

fn inodes_per_group(settings: &Settings, blocks: u64, groups: u32) -> Result<u32> {
    let most = u64::from(settings.block_size) * 8;
    let in_block = u64::from(settings.block_size / INODE_SIZE).max(8);
    let bytes = blocks * u64::from(settings.block_size);
    // Numbers have 32 bits: by default a huge filesystem has what these can count.
    let usual = (bytes / settings.bytes_per_inode).min(u64::from(u32::MAX) - u64::from(groups) * in_block);
    let wanted = settings.inodes.unwrap_or(usual).max(u64::from(ino::FIRST) + 1);
    let in_group = wanted.div_ceil(u64::from(groups)).next_multiple_of(in_block);
    let in_group = if settings.inodes.is_none() { in_group.min(most) } else { in_group };
    if in_group > most || in_group * u64::from(groups) > u64::from(u32::MAX) {
        return Err(WriteError::NoInodes(most * u64::from(groups)));
    }
    Ok(u32::try_from(in_group).expect("at most the bits of a block"))
}

fn check(settings: &Settings) -> Result<()> {
    let Settings { block_size, label, mount_options, reserved_percent, bytes_per_inode, .. } = settings;
    if !matches!(block_size, 1024 | 2048 | 4096) {
        return Err(WriteError::setting("the block size", block_size, "it is 1024, 2048 or 4096 bytes"));
    }
    if label.len() > 16 || label.contains(&0) {
        let label = String::from_utf8_lossy(label);
        return Err(WriteError::setting("the label", label, "it has at most 16 bytes, and no zero"));
    }
    if mount_options.len() > 63 || mount_options.contains(&0) {
        let options = String::from_utf8_lossy(mount_options);
        return Err(WriteError::setting(
            "the mount options",
            options,
            "they have at most 63 bytes, and no zero",
        ));
    }
    if !(0.0..=50.0).contains(reserved_percent) {
        return Err(WriteError::setting("the reserved part", reserved_percent, "it is 0 to 50 percent"));
    }
    if *bytes_per_inode < 1024 {
        return Err(WriteError::setting("an inode for every", bytes_per_inode, "at least 1024 bytes"));
    }
    if let Journal::Blocks(blocks) = settings.journal
        && !(journal::MIN_BLOCKS..=10_240_000).contains(&blocks)
    {
        return Err(WriteError::setting(
            "the journal",
            blocks,
            "it has 1024 to 10240000 blocks, or there is none",
        ));
    }
    if !settings.time.fits() {
        return Err(WriteError::Time(settings.time.seconds));
    }
    debug_assert!(superblock::OFFSET < u64::from(*block_size) * 2);
    Ok(())
}
