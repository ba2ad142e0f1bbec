//! The journal (jbd2, "Journal (jbd2)"), as the way to make many writes one.
//!
//! A commit writes descriptors, changed blocks and a commit block into the log while its superblock still says that the log
//! is empty. The one write that lets the log begin is the moment of the change. Then the blocks go to their places, and the
//! log is empty again. There is never more than one transaction in it, so no block needs to be revoked.

use std::borrow::Cow;

use zerocopy::FromBytes;
use zerocopy::IntoBytes;

use super::{EditError, Editor, Result};
use crate::format::journal::{
    CommitHeader, Header, JournalSuperblock, MAGIC, Tag, Tag3, block_sum, block_type, data_sum, feature,
    tag_flag,
};
use crate::format::superblock::{self, incompat};
use crate::format::{Block, Superblock};
use crate::read::journal::ring;
use crate::read::{Filesystem, Place};

/// Bytes of the checksum at the end of a descriptor.
const TAIL: usize = 4;
/// Bytes of the UUID that follows a descriptor's first tag.
const UUID: usize = 16;

/// Where the journal is and what is written into it.
pub(super) struct Journal {
    superblock: JournalSuperblock,
    /// Blocks of the journal in their order: the first of some in a row, and how many.
    runs: Vec<(u64, Block, u64)>,
    /// The first block of the log and the one behind its last.
    first: u32,
    last: u32,
}

fn corrupt(reason: &str) -> EditError {
    EditError::corrupt(Place::Journal, reason)
}

impl Journal {
    /// Looks at the journal's superblock, which the reader has not done where it is empty.
    pub(super) fn open(filesystem: &Filesystem) -> Result<Journal> {
        let inode = filesystem.inode(filesystem.geometry.superblock.journal_inum.get())?;
        let blocks = inode.size() / u64::from(filesystem.geometry.block_size);
        let mut runs = Vec::new();
        let mut after = 0;
        for run in filesystem.runs(&inode, 0, blocks)? {
            let run = run?;
            if run.logical != after || run.unwritten {
                return Err(corrupt("it has holes"));
            }
            after = run.logical + run.length;
            runs.push((run.logical, run.physical, run.length));
        }
        if after < blocks || blocks == 0 {
            return Err(corrupt("it has holes"));
        }
        let mut bytes = vec![0; filesystem.blocks.bytes()];
        filesystem.blocks.raw(runs[0].1 * u64::from(filesystem.blocks.size()), &mut bytes)?;
        let superblock =
            JournalSuperblock::read_from_prefix(&bytes).map_err(|_| corrupt("it is too short"))?.0;
        if u64::from(superblock.blocks.get()) > blocks {
            return Err(corrupt("it says it has more blocks than its inode"));
        }
        let (first, last) = ring(filesystem, &superblock)?;
        if superblock.error.get() != 0 {
            return Err(EditError::Refused(
                "its journal was aborted; repair it with e2fsck first".to_owned(),
            ));
        }
        Ok(Journal { superblock, runs, first, last })
    }

    /// Where a block of the journal is.
    fn place(&self, block: u32) -> Result<Block> {
        let block = u64::from(block);
        self.runs
            .iter()
            .find(|(logical, _, length)| (*logical..logical + length).contains(&block))
            .map(|(logical, physical, _)| physical + (block - logical))
            .ok_or_else(|| corrupt("a block of it is missing"))
    }

    fn is_old(&self) -> bool {
        self.superblock.header.block_type.get() == block_type::SUPERBLOCK_V1
    }

    fn has(&self, feature: u32) -> bool {
        !self.is_old() && self.superblock.incompat.get() & feature != 0
    }

    fn has_sums(&self) -> bool {
        self.has(feature::CSUM_V2 | feature::CSUM_V3)
    }

    /// Bytes of a tag.
    fn tag_size(&self) -> usize {
        if self.has(feature::CSUM_V3) {
            return size_of::<Tag3>();
        }
        let sums = if self.has(feature::CSUM_V2) { 2 } else { 0 };
        let narrow = if self.has(feature::BITS64) { 0 } else { 4 };
        size_of::<Tag>() + sums - narrow
    }

    /// Tags that a descriptor has room for.
    fn tags(&self, block_size: usize) -> usize {
        let tail = if self.has_sums() { TAIL } else { 0 };
        (block_size - size_of::<Header>() - UUID - tail) / self.tag_size()
    }

    fn header(&self, kind: u32) -> Header {
        Header { magic: MAGIC.into(), block_type: kind.into(), sequence: self.superblock.sequence }
    }

    /// The tag of a block whose contents in the log are these.
    #[expect(clippy::cast_possible_truncation, reason = "the parts of numbers")]
    fn tag(&self, block: Block, flags: u32, logged: &[u8]) -> Vec<u8> {
        let sum = data_sum(self.superblock.seed(), self.superblock.sequence.get(), logged);
        let (low, high) = ((block as u32).into(), ((block >> 32) as u32).into());
        let mut bytes = if self.has(feature::CSUM_V3) {
            Tag3 { block_low: low, flags: flags.into(), block_high: high, checksum: sum.into() }
                .as_bytes()
                .to_vec()
        } else {
            let sum = if self.has(feature::CSUM_V2) { sum as u16 } else { 0 };
            Tag { block_low: low, checksum: sum.into(), flags: (flags as u16).into(), block_high: high }
                .as_bytes()
                .to_vec()
        };
        bytes.resize(self.tag_size(), 0);
        bytes
    }

    /// The log of a transaction, block after block.
    fn log<'a>(
        &self,
        changes: &[(Block, &'a [u8])],
        block_size: usize,
        now: super::Timestamp,
    ) -> Vec<Cow<'a, [u8]>> {
        let mut log = Vec::with_capacity(changes.len() + 2);
        for group in changes.chunks(self.tags(block_size)) {
            let mut descriptor = self.header(block_type::DESCRIPTOR).as_bytes().to_vec();
            let mut contents = Vec::with_capacity(group.len());
            for (number, (block, bytes)) in group.iter().enumerate() {
                let mut bytes = Cow::Borrowed(*bytes);
                let mut flags = if number > 0 { tag_flag::SAME_UUID } else { 0 };
                if bytes.starts_with(&MAGIC.to_be_bytes()) {
                    bytes.to_mut()[..4].fill(0);
                    flags |= tag_flag::ESCAPE;
                }
                if number + 1 == group.len() {
                    flags |= tag_flag::LAST;
                }
                descriptor.extend(self.tag(*block, flags, &bytes));
                if number == 0 {
                    descriptor.extend(self.superblock.uuid);
                }
                contents.push(bytes);
            }
            descriptor.resize(block_size, 0);
            if self.has_sums() {
                let at = block_size - TAIL;
                let sum = block_sum(self.superblock.seed(), &descriptor, at);
                descriptor[at..].copy_from_slice(&sum.to_be_bytes());
            }
            log.push(Cow::Owned(descriptor));
            log.append(&mut contents);
        }
        let commit = CommitHeader {
            header: self.header(block_type::COMMIT),
            checksum_type: 0,
            checksum_size: 0,
            padding: [0; 2],
            checksum: [0.into(); 8],
            seconds: now.seconds.max(0).cast_unsigned().into(),
            nanoseconds: now.nanoseconds.into(),
        };
        let mut block = commit.as_bytes().to_vec();
        block.resize(block_size, 0);
        if self.has_sums() {
            let at = std::mem::offset_of!(CommitHeader, checksum);
            let sum = block_sum(self.superblock.seed(), &block, at);
            block[at..at + 4].copy_from_slice(&sum.to_be_bytes());
        }
        log.push(Cow::Owned(block));
        log
    }
}

impl Editor {
    /// Blocks that a transaction may have in the journal, its descriptors included.
    pub(super) fn journal_room(&self) -> usize {
        usize::try_from(self.journal.last - self.journal.first).unwrap_or(0)
    }

    /// Says where the log begins, 0 for an empty one, and which transaction is the next in it.
    fn set_journal(&mut self, start: u32, sequence: u32) -> Result<()> {
        let journal = &mut self.journal;
        journal.superblock.start = start.into();
        journal.superblock.sequence = sequence.into();
        if journal.has_sums() {
            journal.superblock.checksum = journal.superblock.sum().into();
        }
        let place = journal.place(0)? * u64::from(self.block_size());
        // A journal of the first version has nothing behind its first words.
        let bytes = self.journal.superblock.as_bytes();
        self.write_at(bytes, place)
    }

    /// Writes the superblock as it is in memory, but for the word that says whether the journal holds changes.
    fn write_superblock(&mut self, recover: bool) -> Result<()> {
        let superblock = sealed(self.superblock().clone(), recover);
        self.superblock_mut().incompat = superblock.incompat;
        self.write_at(superblock.as_bytes(), superblock::OFFSET)
    }

    /// The superblock among the blocks that were changed.
    pub(super) fn stage_superblock(&mut self) -> Result<()> {
        let size = u64::from(self.block_size());
        let (block, at) =
            (superblock::OFFSET / size, usize::try_from(superblock::OFFSET % size).unwrap_or(0));
        let (time, high) = Superblock::split_time(self.now);
        let superblock = self.superblock_mut();
        (superblock.write_time, superblock.write_time_high) = (time, high);
        let superblock = sealed(superblock.clone(), true);
        let bytes = self.filesystem.blocks.change(block, Place::Superblock)?;
        bytes[at..at + superblock::SIZE].copy_from_slice(superblock.as_bytes());
        Ok(())
    }

    /// Makes what was changed one transaction; all of it is in its place at the end.
    pub(super) fn write_transaction(&mut self) -> Result<()> {
        self.seal_bitmaps()?;
        self.stage_superblock()?;
        let block_size = self.block_size();
        // The blocks themselves are shared.
        let staged = self.filesystem.blocks.staged().clone();
        if staged.last_key_value().is_some_and(|(block, _)| *block >> 32 != 0)
            && !self.journal.has(feature::BITS64)
        {
            return Err(EditError::Refused(
                "it is larger than its journal has numbers for; mount it once, so that the kernel changes that".to_owned(),
            ));
        }
        let changes: Vec<(Block, &[u8])> = staged.iter().map(|(block, bytes)| (*block, &bytes[..])).collect();
        let tags = self.journal.tags(block_size as usize);
        let needed = (changes.len() + changes.len().div_ceil(tags) + 1) as u64;
        let room = u64::from(self.journal.last - self.journal.first);
        if needed > room {
            return Err(EditError::TooLarge { needed, room, block_size });
        }

        let log = self.journal.log(&changes, block_size as usize, self.now);
        let mut places = Vec::with_capacity(log.len());
        for (block, bytes) in (self.journal.first..).zip(&log) {
            places.push((self.journal.place(block)?, &bytes[..]));
        }
        self.write_blocks(places)?;
        // The old superblock says so that the journal may hold something; it still is empty.
        let mut old = [0; superblock::SIZE];
        self.filesystem.blocks.raw(superblock::OFFSET, &mut old)?;
        let old = Superblock::read_from_bytes(&old).map_err(|_| corrupt("the superblock is too short"))?;
        self.write_at(sealed(old, true).as_bytes(), superblock::OFFSET)?;
        self.sync()?;

        let sequence = self.journal.superblock.sequence.get();
        self.set_journal(self.journal.first, sequence)?;
        self.sync()?;

        self.write_blocks(changes)?;
        self.sync()?;
        self.empty_journal(sequence.wrapping_add(1))
    }

    /// Everything in the journal is in its place.
    fn empty_journal(&mut self, sequence: u32) -> Result<()> {
        self.set_journal(0, sequence)?;
        self.sync()?;
        self.write_superblock(false)?;
        self.sync()?;
        self.filesystem.blocks.settle();
        Ok(())
    }

    /// Puts what the journal holds into its place. Cut at any moment, it can be done again.
    pub(super) fn recover(&mut self) -> Result<()> {
        let logged = self.filesystem.blocks.logged();
        let mut contents = Vec::with_capacity(logged.len());
        for (block, logged) in logged {
            contents.push((*block, self.filesystem.blocks.logged_block(logged)?));
        }
        // The newest free counts are the descriptors'.
        let usage = self.filesystem.usage()?;
        let free = usage.free / u64::from(self.block_size());
        self.set_free_blocks(free);
        let inodes = u32::try_from(usage.free_inodes).unwrap_or(u32::MAX);
        self.superblock_mut().free_inodes = inodes.into();
        self.write_blocks(contents.iter().map(|(block, bytes)| (*block, &bytes[..])))?;
        self.write_superblock(true)?;
        self.sync()?;
        let sequence = self.journal.superblock.sequence.get();
        // What was begun after the last whole transaction has the number that follows it.
        let next = self.filesystem.expected.map_or(sequence, |expected| expected.wrapping_add(1));
        self.empty_journal(next)
    }
}

/// A superblock that says whether the journal holds changes, with its checksum.
fn sealed(mut superblock: Superblock, recover: bool) -> Superblock {
    let flag = if recover { incompat::RECOVER } else { 0 };
    superblock.incompat = (superblock.incompat.get() & !incompat::RECOVER | flag).into();
    // Without metadata_csum the place of the checksum stays as it is.
    if superblock.has_ro_compat(superblock::ro_compat::METADATA_CSUM) {
        superblock.seal();
    }
    superblock
}
