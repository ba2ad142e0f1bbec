//! The journal of a filesystem that was not unmounted, read as the kernel would replay it ("Journal (jbd2)"), but into
//! memory: nothing more than where the newest contents of each block are.

use std::collections::{BTreeMap, HashMap};

use zerocopy::FromBytes;
use zerocopy::big_endian::{U32, U64};

use super::blocks::{Logged, LoggedSum};
use super::map::Run;
use super::{Error, Filesystem, Place, Result};
use crate::format::Block;
use crate::format::journal::{
    self, CommitHeader, Header, JournalSuperblock, RevokeHeader, Tag, Tag3, block_type, feature, tag_flag,
};

/// Blocks at the end that are for fast commits, where the journal does not say how many.
const FAST_COMMIT_BLOCKS: u32 = 256;
/// What a block of fast commits begins with: a tag, and the length of what follows.
const FAST_COMMIT_HEAD: [u8; 2] = 9u16.to_le_bytes();
/// Bytes of the checksum at the end of descriptor and revoke blocks.
const TAIL: usize = 4;
const KNOWN: u32 = feature::REVOKE
    | feature::BITS64
    | feature::ASYNC_COMMIT
    | feature::CSUM_V2
    | feature::CSUM_V3
    | feature::FAST_COMMIT;

/// What a replay would do.
#[derive(Default)]
pub(crate) struct Replay {
    pub(crate) logged: BTreeMap<Block, Logged>,
    /// Transactions in it.
    pub(crate) transactions: u32,
    /// The one that would have followed; nothing where the journal was empty.
    pub(crate) expected: Option<u32>,
    /// The transaction at which it ends because its commit is damaged.
    pub(crate) damaged: Option<u32>,
}

/// A block of the filesystem in a transaction.
struct Change {
    block: Block,
    log_block: u32,
    escaped: bool,
    sum: u32,
}

#[derive(Default)]
struct Transaction {
    changes: Vec<Change>,
    revoked: Vec<Block>,
}

fn corrupt(reason: impl Into<String>) -> Error {
    Error::corrupt(Place::Journal, reason)
}

/// Where the blocks of the journal are on the disk.
struct Log<'a> {
    filesystem: &'a Filesystem,
    runs: Vec<Run>,
}

impl Log<'_> {
    fn open<'a>(filesystem: &'a Filesystem) -> Result<Log<'a>> {
        let number = filesystem.geometry.superblock.journal_inum.get();
        if number == 0 {
            return Err(Error::unsupported(Place::Journal, "another device, and holds changes"));
        }
        let inode = filesystem.inode(number)?;
        let blocks = inode.size() / u64::from(filesystem.geometry.block_size);
        let mut runs: Vec<Run> = Vec::new();
        // No block is there twice: the memory that a replay takes follows from what is really there.
        let mut taken: BTreeMap<Block, Block> = BTreeMap::new();
        for run in filesystem.runs(&inode, 0, blocks)? {
            let run = run?;
            let end = run.physical + run.length;
            let before = taken.range(..end).next_back();
            if before.is_some_and(|(_, before)| *before > run.physical) {
                return Err(corrupt("it has a block twice"));
            }
            taken.insert(run.physical, end);
            runs.push(run);
        }
        Ok(Log { filesystem, runs })
    }

    /// Where a block of the journal is.
    fn place(&self, block: u32) -> Result<Block> {
        let block = u64::from(block);
        let after = self.runs.partition_point(|run| run.logical <= block);
        let run = after.checked_sub(1).map(|number| self.runs[number]);
        match run.filter(|run| block < run.logical + run.length) {
            Some(run) => Ok(run.physical + (block - run.logical)),
            None => Err(corrupt(format!("its block {block} is missing"))),
        }
    }

    fn read(&self, block: u32) -> Result<Vec<u8>> {
        let blocks = &self.filesystem.blocks;
        let mut bytes = vec![0; blocks.bytes()];
        blocks.raw(self.place(block)? * u64::from(blocks.size()), &mut bytes)?;
        Ok(bytes)
    }
}

/// What is known of the journal from its superblock.
struct Scan<'a> {
    log: Log<'a>,
    verify: bool,
    superblock: JournalSuperblock,
    first: u32,
    /// The first block behind the log.
    last: u32,
    at: u32,
    /// Blocks of the log that were not read yet.
    left: u32,
    expected: u32,
    done: Vec<(u32, Transaction)>,
    /// When the last of them was committed: seconds and nanoseconds.
    committed: Option<(u64, u32)>,
    damaged: Option<u32>,
}

/// Looks through the journal.
pub(crate) fn replay(filesystem: &Filesystem) -> Result<Replay> {
    let log = Log::open(filesystem)?;
    let bytes = log.read(0)?;
    let superblock = JournalSuperblock::read_from_prefix(&bytes).map_err(|_| corrupt("it is too short"))?.0;
    let header = superblock.header;
    let kind = header.block_type.get();
    if header.magic.get() != journal::MAGIC
        || ![block_type::SUPERBLOCK_V1, block_type::SUPERBLOCK_V2].contains(&kind)
    {
        return Err(corrupt("it does not begin with a superblock"));
    }
    let mut scan = Scan::new(log, superblock, kind == block_type::SUPERBLOCK_V1)?;
    if scan.at == 0 {
        return Ok(Replay::default());
    }
    while scan.step()? {}
    scan.refuse_fast_commits()?;
    scan.finish()
}

/// The first block of the log and the one behind its last, by the journal's superblock.
pub(crate) fn ring(filesystem: &Filesystem, superblock: &JournalSuperblock) -> Result<(u32, u32)> {
    let kind = superblock.header.block_type.get();
    if superblock.header.magic.get() != journal::MAGIC
        || ![block_type::SUPERBLOCK_V1, block_type::SUPERBLOCK_V2].contains(&kind)
    {
        return Err(corrupt("it does not begin with a superblock"));
    }
    let scan = Scan::new(Log::open(filesystem)?, superblock.clone(), kind == block_type::SUPERBLOCK_V1)?;
    Ok((scan.first, scan.last))
}

impl<'a> Scan<'a> {
    fn new(log: Log<'a>, mut superblock: JournalSuperblock, old: bool) -> Result<Scan<'a>> {
        if old {
            // The first version has no features.
            (superblock.compat, superblock.incompat) = (0.into(), 0.into());
        }
        let unknown = superblock.incompat.get() & !KNOWN;
        if unknown != 0 {
            return Err(Error::unsupported(Place::Journal, format!("the unknown feature {unknown:#x}")));
        }
        let verify = log.filesystem.verify;
        let block_size = log.filesystem.geometry.block_size;
        let scan = Scan {
            verify,
            first: superblock.first.get(),
            last: superblock.blocks.get(),
            at: superblock.start.get(),
            left: 0,
            expected: superblock.sequence.get(),
            done: Vec::new(),
            committed: None,
            damaged: None,
            log,
            superblock,
        };
        if verify && scan.has_sums() && scan.superblock.sum() != scan.superblock.checksum.get() {
            return Err(Error::Checksum(Place::JournalBlock(0)));
        }
        if scan.superblock.block_size.get() != block_size {
            return Err(corrupt(format!("its blocks have {} bytes", scan.superblock.block_size.get())));
        }
        scan.bounded()
    }

    /// Takes the fast commits off the end, and sees to it that the numbers make a ring.
    fn bounded(mut self) -> Result<Scan<'a>> {
        if self.has(feature::FAST_COMMIT) {
            let fast = match self.superblock.fast_commit_blocks.get() {
                0 => FAST_COMMIT_BLOCKS,
                blocks => blocks,
            };
            let last = self.last.checked_sub(fast);
            self.last = last.filter(|last| *last >= journal::MIN_BLOCKS).unwrap_or(self.last);
        }
        let ring = 1 <= self.first && self.first < self.last;
        if !ring || self.at != 0 && !(self.first..self.last).contains(&self.at) {
            let (first, last, at) = (self.first, self.last, self.at);
            return Err(corrupt(format!(
                "it is said to go from block {first} to {last} and to begin at {at}"
            )));
        }
        self.left = self.last - self.first;
        Ok(self)
    }

    fn has(&self, feature: u32) -> bool {
        self.superblock.incompat.get() & feature != 0
    }

    fn has_sums(&self) -> bool {
        self.has(feature::CSUM_V2 | feature::CSUM_V3)
    }

    /// The number of the next block, which goes round at the end.
    fn advance(&mut self) -> Result<u32> {
        self.left = self.left.checked_sub(1).ok_or_else(|| corrupt("it has no end"))?;
        let now = self.at;
        self.at = if now + 1 == self.last { self.first } else { now + 1 };
        Ok(now)
    }

    fn right(&self, block: &[u8], at: usize, stored: u32) -> bool {
        !self.verify || !self.has_sums() || journal::block_sum(self.superblock.seed(), block, at) == stored
    }

    fn tail_is_right(&self, block: &[u8]) -> bool {
        let at = block.len() - TAIL;
        let stored = U32::read_from_bytes(&block[at..]).map_or(0, U32::get);
        self.right(block, at, stored)
    }

    /// Reads one transaction; whether it was whole and another one may follow.
    fn step(&mut self) -> Result<bool> {
        let mut transaction = Transaction::default();
        // A wrong checksum may as well mean an older transaction, which the commit's time tells.
        let mut suspect = None;
        let mut data_sum = !0;
        loop {
            if self.left == 0 {
                return Ok(false);
            }
            let number = self.advance()?;
            let bytes = self.log.read(number)?;
            let header = Header::read_from_prefix(&bytes).map_err(|_| corrupt("a block is too short"))?.0;
            if header.magic.get() != journal::MAGIC || header.sequence.get() != self.expected {
                return Ok(false);
            }
            match header.block_type.get() {
                block_type::DESCRIPTOR => {
                    if !self.tail_is_right(&bytes) {
                        suspect.get_or_insert(number);
                    }
                    if !self.descriptor(&bytes, &mut transaction, &mut data_sum)? {
                        return Ok(false);
                    }
                }
                block_type::REVOKE => {
                    if !self.tail_is_right(&bytes) {
                        suspect.get_or_insert(number);
                    }
                    self.revoke(&bytes, number, &mut transaction)?;
                }
                block_type::COMMIT => return self.commit(&bytes, transaction, suspect, data_sum),
                _ => return Ok(false),
            }
        }
    }

    /// Takes the tags of a descriptor block and passes over the blocks that they are of. Whether there is room for them.
    fn descriptor(&mut self, bytes: &[u8], transaction: &mut Transaction, sum: &mut u32) -> Result<bool> {
        let wide = self.has(feature::BITS64);
        let third = self.has(feature::CSUM_V3);
        let length = match (third, self.has(feature::CSUM_V2), wide) {
            (true, _, _) => size_of::<Tag3>(),
            // Two bytes more than the fields need, as the kernel counts.
            (_, true, true) => size_of::<Tag>() + 2,
            (_, true, false) => size_of::<Tag>() + 2 - 4,
            (_, false, true) => size_of::<Tag>(),
            (_, false, false) => size_of::<Tag>() - 4,
        };
        let old_sums = self.has_old_sums();
        if old_sums {
            *sum = crc32_be(*sum, bytes);
        }
        let end = bytes.len() - if self.has_sums() { TAIL } else { 0 };
        let mut at = size_of::<Header>();
        while at + length <= end {
            let mut tag = [0; size_of::<Tag3>()];
            tag[..length].copy_from_slice(&bytes[at..at + length]);
            at += length;
            let (low, high, flags, stored) = if third {
                let tag = Tag3::read_from_bytes(&tag).map_err(|_| corrupt("a tag is too short"))?;
                (tag.block_low, tag.block_high, tag.flags.get(), tag.checksum.get())
            } else {
                let tag = Tag::read_from_prefix(&tag).map_err(|_| corrupt("a tag is too short"))?.0;
                (tag.block_low, tag.block_high, tag.flags.get().into(), tag.checksum.get().into())
            };
            if flags & tag_flag::SAME_UUID == 0 {
                at += 16;
            }
            let high = if wide { u64::from(high.get()) << 32 } else { 0 };
            if self.left == 0 {
                return Ok(false);
            }
            let log_block = self.advance()?;
            if old_sums {
                *sum = crc32_be(*sum, &self.log.read(log_block)?);
            }
            transaction.changes.push(Change {
                block: high | u64::from(low.get()),
                log_block,
                escaped: flags & tag_flag::ESCAPE != 0,
                sum: stored,
            });
            if flags & tag_flag::LAST != 0 {
                break;
            }
        }
        Ok(true)
    }

    fn revoke(&self, bytes: &[u8], number: u32, transaction: &mut Transaction) -> Result<()> {
        let header = RevokeHeader::read_from_prefix(bytes).map_err(|_| corrupt("a block is too short"))?.0;
        let end = bytes.len() - if self.has_sums() { TAIL } else { 0 };
        let used = size_of::<RevokeHeader>()..header.count.get() as usize;
        let Some(list) = bytes.get(used).filter(|_| header.count.get() as usize <= end) else {
            let reason = format!("it says that {} bytes of it are in use", header.count.get());
            return Err(Error::corrupt(Place::JournalBlock(number), reason));
        };
        if self.has(feature::BITS64) {
            let blocks = list.chunks_exact(8).filter_map(|word| U64::read_from_bytes(word).ok());
            transaction.revoked.extend(blocks.map(U64::get));
        } else {
            let blocks = list.chunks_exact(4).filter_map(|word| U32::read_from_bytes(word).ok());
            transaction.revoked.extend(blocks.map(|word| u64::from(word.get())));
        }
        Ok(())
    }

    fn has_old_sums(&self) -> bool {
        self.verify && !self.has_sums() && self.superblock.compat.get() & feature::COMPAT_CHECKSUM != 0
    }

    /// Ends a transaction. One whose commit does not count ends the log, as if it had never been begun.
    fn commit(
        &mut self,
        bytes: &[u8],
        transaction: Transaction,
        suspect: Option<u32>,
        data_sum: u32,
    ) -> Result<bool> {
        let header = CommitHeader::read_from_prefix(bytes).map_err(|_| corrupt("a block is too short"))?.0;
        let stored = header.checksum[0].get();
        let time = (header.seconds.get(), header.nanoseconds.get());
        // Left over from an earlier round through the log.
        let stale = self.committed.is_some_and(|last| time < last);
        let whole = self.right(bytes, std::mem::offset_of!(CommitHeader, checksum), stored)
            && (!self.has_old_sums() || header.checksum_type == 0 || stored == data_sum);
        if !whole {
            if !stale {
                self.damaged = Some(self.expected);
            }
            return Ok(false);
        }
        if let Some(number) = suspect {
            return if stale { Ok(false) } else { Err(Error::Checksum(Place::JournalBlock(number))) };
        }
        self.committed = Some(time);
        self.done.push((self.expected, transaction));
        self.expected = self.expected.wrapping_add(1);
        Ok(true)
    }

    /// Whether a fast commit follows the last transaction. They are changes in words, not in blocks.
    fn refuse_fast_commits(&self) -> Result<()> {
        if !self.has(feature::FAST_COMMIT) || self.last == self.superblock.blocks.get() {
            return Ok(());
        }
        for number in [self.last, self.last + 1].into_iter().filter(|at| *at < self.superblock.blocks.get()) {
            let bytes = self.log.read(number)?;
            if bytes[..2] == FAST_COMMIT_HEAD && bytes[8..12] == self.expected.to_le_bytes() {
                let feature = "fast commits that were not replayed (mount it once, or run e2fsck)";
                return Err(Error::unsupported(Place::Journal, feature));
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Replay> {
        let mut revoked: HashMap<Block, u32> = HashMap::new();
        for (sequence, transaction) in &self.done {
            // In rising order, so the last one stays.
            revoked.extend(transaction.revoked.iter().map(|block| (*block, *sequence)));
        }
        let seed = self.superblock.seed();
        let mask = if self.has(feature::CSUM_V3) { !0 } else { 0xffff };
        let with_sums = self.verify && self.has_sums();
        let mut logged = BTreeMap::new();
        for (sequence, transaction) in &self.done {
            for change in &transaction.changes {
                // The numbers go round, so the difference counts.
                let later = |revoke: &u32| sequence.wrapping_sub(*revoke).cast_signed() <= 0;
                if revoked.get(&change.block).is_some_and(later) {
                    continue;
                }
                if change.block >= self.log.filesystem.blocks.count() {
                    return Err(corrupt(format!("it changes block {}, which is not there", change.block)));
                }
                let sum = LoggedSum { seed, sequence: *sequence, sum: change.sum, mask };
                logged.insert(
                    change.block,
                    Logged {
                        at: self.log.place(change.log_block)?,
                        log_block: change.log_block,
                        escaped: change.escaped,
                        sum: with_sums.then_some(sum),
                    },
                );
            }
        }
        let transactions = u32::try_from(self.done.len()).unwrap_or(u32::MAX);
        Ok(Replay { logged, transactions, expected: Some(self.expected), damaged: self.damaged })
    }
}

/// CRC-32 with the highest bit first, as the first version of checksums has it.
fn crc32_be(sum: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0u32;
        while index < 256 {
            let mut sum = index << 24;
            let mut bit = 0;
            while bit < 8 {
                sum = (sum << 1) ^ if sum >> 31 != 0 { 0x04C1_1DB7 } else { 0 };
                bit += 1;
            }
            table[index as usize] = sum;
            index += 1;
        }
        table
    };
    bytes.iter().fold(sum, |sum, byte| sum << 8 ^ TABLE[(sum >> 24) as usize ^ usize::from(*byte)])
}
