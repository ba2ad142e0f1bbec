//! The end of writing: the filesystem's own inodes, bitmaps, group descriptors and superblocks.

use zerocopy::IntoBytes;

use super::error::{Result, WriteError};
use super::layout::{DESCRIPTOR_SIZE, INODE_SIZE, LOG_FLEX, Layout, ORPHAN_BLOCKS, ORPHAN_FILE};
use super::run::{Run, touching};
use super::settings::Checksums;
use super::tree;
use super::writer::{Journal, Writer};
use crate::format::group::flags as group_flags;
use crate::format::superblock::{MAGIC, compat, flags, has_backup, incompat, ro_compat, state};
use crate::format::{Block, FileType, GroupDescriptor, Inode, Superblock, ino, inode, journal, orphan};

/// What a finished filesystem is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of a block.
    pub block_size: u32,
    /// Blocks.
    pub blocks: u64,
    /// Blocks that are free.
    pub free_blocks: u64,
    /// Inodes.
    pub inodes: u64,
    /// Inodes that are free.
    pub free_inodes: u64,
    /// Blocks of the journal.
    pub journal_blocks: u32,
}

pub(super) fn finish(mut writer: Writer, uuid: [u8; 16]) -> Result<Summary> {
    if let Checksums::OfUuid(begun) = writer.layout.settings.checksums
        && begun != uuid
    {
        return Err(WriteError::Uuid);
    }
    if !writer.inodes.is_used(ino::ROOT) {
        return Err(WriteError::Inode {
            ino: ino::ROOT,
            why: "is the root directory, which was never written",
        });
    }
    let journal = own_inodes(&mut writer, &uuid)?;

    let Writer {
        layout, seed, space, mut target, mut inodes, mut blocks_of_xattrs, large_directories, ..
    } = writer;
    blocks_of_xattrs.finish(&mut target)?;
    inodes.finish(&layout, &mut target)?;
    let (used, released) = space.into_used();
    let mut groups = Groups { layout: &layout, at: [0; 3], lists: [&layout.metadata, &used, &released] };

    let mut descriptors = Vec::with_capacity(layout.groups as usize);
    let mut block = vec![0; layout.block_size() as usize];
    let mut free_blocks = 0;
    for group in 0..layout.groups {
        let places = layout.places[group as usize];
        let tally = inodes.tally(group);
        let mut descriptor = GroupDescriptor::default();
        descriptor.set_places(places.block_bitmap, places.inode_bitmap, places.inode_table);
        let mut state = group_flags::INODE_ZEROED;
        let taken = groups.bitmap(group, &mut block);
        let free = layout.group(group).length - taken;
        free_blocks += free;
        descriptor.set_free_blocks(u32::try_from(free).expect("a group has at most 32768 blocks"));
        // A group without anything but its own header is for the kernel to set up; the last one, whose bits end early, not.
        if tally.used == 0 && taken == layout.header(group) && group + 1 < layout.groups {
            state |= group_flags::BLOCK_UNINIT;
        } else {
            descriptor.set_block_bitmap_sum(seed.of_bitmap(&block));
            target.write(places.block_bitmap, &block)?;
        }
        descriptor.set_free_inodes(layout.inodes_per_group - tally.used);
        descriptor.set_unused_inodes(layout.inodes_per_group - tally.reached);
        descriptor.set_directories(tally.directories);
        if tally.used == 0 {
            state |= group_flags::INODE_UNINIT;
        } else {
            inodes.bitmap(group, &mut block);
            descriptor.set_inode_bitmap_sum(seed.of_bitmap(&block[..layout.inodes_per_group as usize / 8]));
            target.write(places.inode_bitmap, &block)?;
        }
        descriptor.flags = state.into();
        descriptor.seal(group, seed);
        descriptors.push(descriptor);
    }
    write_descriptors(&layout, &descriptors, &mut target)?;
    write_resize_list(&layout, &mut target)?;

    let summary = Summary {
        block_size: layout.block_size(),
        blocks: layout.blocks,
        free_blocks,
        inodes: layout.inodes(),
        free_inodes: layout.inodes() - inodes.used(),
        journal_blocks: layout.journal_blocks,
    };
    let superblock = superblock(&layout, &summary, uuid, &journal, large_directories);
    target.flush()?;
    // The one that counts comes last.
    for group in (0..layout.groups).filter(|group| has_backup(*group)).rev() {
        let mut copy = superblock.clone();
        copy.block_group = u16::try_from(group).unwrap_or(u16::MAX).into();
        copy.seal();
        let place = layout.group(group).start;
        let within = if place == 0 { crate::format::superblock::OFFSET } else { 0 };
        target.write_within(place, within, copy.as_bytes())?;
    }
    Ok(summary)
}

/// The blocks in use, group by group.
struct Groups<'a> {
    layout: &'a Layout,
    /// The filesystem's own, those given out, those taken back.
    lists: [&'a [Run]; 3],
    at: [usize; 3],
}

impl Groups<'_> {
    /// A group's bitmap, bits beyond its blocks set; how many of its blocks are in use. Groups come in rising order.
    fn bitmap(&mut self, group: u32, block: &mut [u8]) -> u64 {
        let range = self.layout.group(group);
        block.fill(0);
        let mut taken = 0;
        for (list, at) in self.lists.iter().zip(&mut self.at).take(2) {
            for run in touching(list, at, range) {
                set(block, run.start - range.start, run.length, true);
                taken += run.length;
            }
        }
        for run in touching(self.lists[2], &mut self.at[2], range) {
            set(block, run.start - range.start, run.length, false);
            taken -= run.length;
        }
        let bits = block.len() as u64 * 8;
        set(block, range.length, bits - range.length, true);
        taken
    }
}

/// Sets or clears bits.
#[expect(clippy::cast_possible_truncation, reason = "bits of a block")]
fn set(block: &mut [u8], from: u64, count: u64, value: bool) {
    let (from, end) = (from as usize, (from + count) as usize);
    let mut put = |byte: usize, mask: u8| {
        if value {
            block[byte] |= mask;
        } else {
            block[byte] &= !mask;
        }
    };
    let mut bit = from;
    while bit < end {
        let (byte, within) = (bit / 8, bit % 8);
        let length = (8 - within).min(end - bit);
        put(byte, ((0xffu16 >> (8 - length)) << within) as u8);
        bit += length;
    }
}

/// Writes the inodes that the filesystem has for itself; gives the journal's.
fn own_inodes(writer: &mut Writer, uuid: &[u8; 16]) -> Result<Inode> {
    // Reserved numbers are in use whether they have an inode or not.
    for reserved in ino::BAD_BLOCKS..ino::FIRST {
        let has_inode = match reserved {
            ino::ROOT => true,
            ino::RESIZE => writer.layout.resize_block.is_some(),
            ino::JOURNAL => writer.layout.journal_blocks > 0,
            _ => false,
        };
        if !has_inode {
            writer.inodes.mark(reserved, false)?;
        }
    }
    if let Some(block) = writer.layout.resize_block {
        let (inode, blocks) = resize_inode(&writer.layout, block);
        let prepared = writer.own(ino::RESIZE, 0o600)?;
        writer.put_inode(ino::RESIZE, inode, FileType::Regular, prepared, blocks)?;
    }
    let journal = writer.journal.clone();
    if let Some(Journal { inode, blocks, place }) = &journal {
        let prepared = writer.own(ino::JOURNAL, 0o600)?;
        writer.put_inode(ino::JOURNAL, *inode, FileType::Regular, prepared, *blocks)?;
        let superblock = journal_superblock(&writer.layout, uuid);
        let mut block = vec![0; writer.layout.block_size() as usize];
        block[..superblock.len()].copy_from_slice(&superblock);
        writer.target.write(*place, &block)?;
    }
    if writer.layout.has_orphan_file() {
        orphan_file(writer)?;
    }
    Ok(journal.map_or_else(Inode::default, |journal| journal.inode))
}

/// Writes an orphan file without orphans.
fn orphan_file(writer: &mut Writer) -> Result<()> {
    let size = ORPHAN_BLOCKS * u64::from(writer.layout.block_size());
    let extents = tree::normalized(&writer.orphans, size, writer.layout.block_size())?;
    let begin = writer.seed.of_inode(ORPHAN_FILE, 0);
    for place in extents.iter().flat_map(|extent| extent.physical..extent.physical + u64::from(extent.length))
    {
        let mut block = vec![0; writer.layout.block_size() as usize];
        orphan::seal(begin, place, &mut block);
        writer.target.write(place, &block)?;
    }
    let mut inode = Inode { links: 1.into(), ..Inode::default() };
    inode.set_size(size);
    let blocks = writer.set_extents(ORPHAN_FILE, &mut inode, &extents)?;
    let prepared = writer.own(ORPHAN_FILE, 0o600)?;
    writer.put_inode(ORPHAN_FILE, inode, FileType::Regular, prepared, blocks)
}

/// The journal's superblock ("Journal (jbd2)", "Super Block"): an empty log.
fn journal_superblock(layout: &Layout, uuid: &[u8; 16]) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    let (superblock, _) = <journal::JournalSuperblock as zerocopy::FromBytes>::mut_from_prefix(&mut bytes)
        .expect("the size is its own");
    superblock.header.magic = journal::MAGIC.into();
    superblock.header.block_type = journal::block_type::SUPERBLOCK_V2.into();
    superblock.block_size = layout.block_size().into();
    superblock.blocks = layout.journal_blocks.into();
    superblock.first = 1.into();
    superblock.sequence = 1.into();
    superblock.users_count = 1.into();
    superblock.uuid = *uuid;
    bytes
}

/// Groups with a backup, group 0 left out.
fn backups(layout: &Layout) -> impl Iterator<Item = u32> {
    let groups = layout.groups;
    (1..groups).filter(|group| has_backup(*group))
}

/// The inode whose double-indirect block lists the reserved descriptor blocks of group 0, each of which lists its copies.
/// Its size is that of a file with all of double indirection, as mke2fs has it.
fn resize_inode(layout: &Layout, list: Block) -> (Inode, u64) {
    let mut resize = Inode { links: 1.into(), ..Inode::default() };
    let per_block = u64::from(layout.block_size()) / 4;
    resize.set_size((per_block * per_block + per_block + 12) * u64::from(layout.block_size()));
    let narrow = u32::try_from(list).expect("there are no reserved descriptors beyond 2^32 blocks");
    // The fourteenth block pointer is the double-indirect one.
    resize.block[13 * 4..14 * 4].copy_from_slice(&narrow.to_le_bytes());
    let copies = 1 + backups(layout).count() as u64;
    (resize, 1 + layout.reserved_descriptors * copies)
}

fn write_resize_list(layout: &Layout, target: &mut super::target::Target) -> Result<()> {
    let Some(list) = layout.resize_block else { return Ok(()) };
    let mut block = vec![0; layout.block_size() as usize];
    let per_block = u64::from(layout.block_size()) / 4;
    let put = |block: &mut [u8], index: u64, number: Block| {
        let at = usize::try_from(index).expect("an index in a block") * 4;
        let number = u32::try_from(number).expect("there are no reserved descriptors beyond 2^32 blocks");
        block[at..at + 4].copy_from_slice(&number.to_le_bytes());
    };
    let first = layout.first + 1 + layout.descriptor_blocks;
    for reserved in 0..layout.reserved_descriptors {
        put(&mut block, (layout.descriptor_blocks + reserved) % per_block, first + reserved);
    }
    target.write(list, &block)?;
    for reserved in 0..layout.reserved_descriptors {
        block.fill(0);
        for (index, group) in backups(layout).enumerate() {
            let place = layout.group(group).start + 1 + layout.descriptor_blocks + reserved;
            put(&mut block, index as u64, place);
        }
        if layout.groups > 1 {
            target.write(first + reserved, &block)?;
        }
    }
    Ok(())
}

/// Writes the group descriptors and their copies.
fn write_descriptors(
    layout: &Layout,
    descriptors: &[GroupDescriptor],
    target: &mut super::target::Target,
) -> Result<()> {
    let block_size = layout.block_size() as usize;
    let mut bytes = descriptors.as_bytes().to_vec();
    bytes.resize(bytes.len().next_multiple_of(block_size), 0);
    for group in 0..layout.groups {
        let after_superblock = layout.group(group).start + u64::from(has_backup(group));
        if !layout.meta_bg {
            if has_backup(group) {
                target.write(after_superblock, &bytes)?;
            }
        } else if layout.has_meta_descriptors(group) {
            let per_block = layout.block_size() / DESCRIPTOR_SIZE;
            let at = (group / per_block) as usize * block_size;
            target.write(after_superblock, &bytes[at..at + block_size])?;
        }
    }
    Ok(())
}

fn superblock(
    layout: &Layout,
    summary: &Summary,
    uuid: [u8; 16],
    journal: &Inode,
    large_directories: bool,
) -> Superblock {
    #[expect(clippy::cast_possible_truncation, reason = "the halves of one number")]
    let halves = |number: u64| ((number as u32).into(), ((number >> 32) as u32).into());
    let only = |condition: bool, feature: u32| if condition { feature } else { 0 };
    let settings = &layout.settings;
    let has_journal = layout.journal_blocks > 0;
    let mut superblock = <Superblock as zerocopy::FromBytes>::read_from_bytes(&[0; size_of::<Superblock>()])
        .expect("the size is its own");
    let narrow = |inodes: u64| u32::try_from(inodes).expect("inode numbers have 32 bits").into();
    superblock.inodes_count = narrow(summary.inodes);
    superblock.free_inodes = narrow(summary.free_inodes);
    (superblock.blocks_count_low, superblock.blocks_count_high) = halves(summary.blocks);
    (superblock.free_blocks_low, superblock.free_blocks_high) = halves(summary.free_blocks);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a part of the blocks"
    )]
    let reserved = (summary.blocks as f64 * settings.reserved_percent / 100.0) as u64;
    (superblock.reserved_blocks_low, superblock.reserved_blocks_high) = halves(reserved);
    superblock.first_data_block = u32::try_from(layout.first).expect("0 or 1").into();
    superblock.log_block_size = (layout.block_size().trailing_zeros() - 10).into();
    superblock.log_cluster_size = superblock.log_block_size;
    superblock.blocks_per_group = layout.blocks_per_group().into();
    superblock.clusters_per_group = layout.blocks_per_group().into();
    superblock.inodes_per_group = layout.inodes_per_group.into();
    superblock.max_mount_count = u16::MAX.into();
    superblock.magic = MAGIC.into();
    superblock.state = state::VALID.into();
    superblock.errors = 1.into();
    superblock.revision = 1.into();
    superblock.first_ino = ino::FIRST.into();
    #[expect(clippy::cast_possible_truncation, reason = "256")]
    let inode_size = INODE_SIZE as u16;
    superblock.inode_size = inode_size.into();
    let (time, time_high) = Superblock::split_time(settings.time);
    (superblock.write_time, superblock.write_time_high) = (time, time_high);
    (superblock.last_check, superblock.last_check_high) = (time, time_high);
    (superblock.mkfs_time, superblock.mkfs_time_high) = (time, time_high);

    superblock.compat = (compat::EXT_ATTR
        | compat::DIR_INDEX
        | only(has_journal, compat::HAS_JOURNAL)
        | only(layout.resize_block.is_some(), compat::RESIZE_INODE)
        | only(layout.has_orphan_file(), compat::ORPHAN_FILE))
    .into();
    superblock.incompat = (incompat::FILETYPE
        | incompat::EXTENTS
        | incompat::BITS64
        | incompat::FLEX_BG
        | only(layout.meta_bg, incompat::META_BG)
        | only(matches!(settings.checksums, Checksums::Seed(_)), incompat::CSUM_SEED)
        | only(large_directories, incompat::LARGEDIR))
    .into();
    superblock.ro_compat = (ro_compat::SPARSE_SUPER
        | ro_compat::LARGE_FILE
        | ro_compat::HUGE_FILE
        | ro_compat::DIR_NLINK
        | ro_compat::EXTRA_ISIZE
        | ro_compat::METADATA_CSUM)
        .into();
    superblock.uuid = uuid;
    superblock.label[..settings.label.len()].copy_from_slice(&settings.label);
    superblock.reserved_gdt_blocks =
        u16::try_from(layout.reserved_descriptors).expect("at most a quarter of a block").into();
    for (word, bytes) in superblock.hash_seed.iter_mut().zip(settings.hash_seed.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().expect("four bytes")).into();
    }
    superblock.hash_version = 1;
    superblock.flags = flags::SIGNED_HASH.into();
    #[expect(clippy::cast_possible_truncation, reason = "64")]
    let descriptor_size = DESCRIPTOR_SIZE as u16;
    superblock.descriptor_size = descriptor_size.into();
    superblock.default_mount_options = settings.default_mount_options.into();
    superblock.mount_options[..settings.mount_options.len()].copy_from_slice(&settings.mount_options);
    if has_journal {
        superblock.journal_inum = ino::JOURNAL.into();
        superblock.journal_backup_type = 1;
        for (word, bytes) in superblock.journal_blocks.iter_mut().zip(journal.block.chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into().expect("four bytes")).into();
        }
        superblock.journal_blocks[15] = journal.size_high;
        superblock.journal_blocks[16] = journal.size_low;
    }
    if layout.has_orphan_file() {
        superblock.orphan_file_inum = ORPHAN_FILE.into();
    }
    superblock.min_extra_isize = inode::EXTRA_ISIZE.into();
    superblock.want_extra_isize = inode::EXTRA_ISIZE.into();
    superblock.log_groups_per_flex = LOG_FLEX;
    superblock.checksum_type = 1;
    superblock.checksum_seed = match settings.checksums {
        Checksums::Seed(seed) => seed.into(),
        Checksums::OfUuid(_) => 0.into(),
    };
    let own: u64 = layout.metadata.iter().map(|run| run.length).sum();
    let overhead =
        layout.first + own + u64::from(layout.journal_blocks) - u64::from(layout.resize_block.is_some());
    superblock.overhead_clusters = u32::try_from(overhead).unwrap_or(0).into();
    superblock
}
