//! Blocks of the filesystem: from the source, or from the journal where that has a newer one.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Error, Place, Result, Source};
use crate::format::{Block, journal};

/// Bytes of metadata that are kept, twice at most.
const CACHE: usize = 1 << 20;

/// A block that is in the journal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Logged {
    /// Where its newest contents are on the disk.
    pub(crate) at: Block,
    /// Which block of the journal that is, for messages.
    pub(crate) log_block: u32,
    /// Whether the journal's number was taken off its beginning.
    pub(crate) escaped: bool,
    /// What its checksum has to be.
    pub(crate) sum: Option<LoggedSum>,
}

/// The checksum of a block in the journal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LoggedSum {
    pub(crate) seed: u32,
    pub(crate) sequence: u32,
    pub(crate) sum: u32,
    /// The bits of it that are kept: all, or the lower half.
    pub(crate) mask: u32,
}

/// Where the blocks are.
pub(crate) struct Blocks {
    source: Box<dyn Source>,
    size: u32,
    count: Block,
    logged: BTreeMap<Block, Logged>,
    /// Blocks of metadata that were changed and are not written yet: newer than all else.
    staged: BTreeMap<Block, Arc<[u8]>>,
    /// How often a block was changed in memory.
    stagings: u64,
    cache: Mutex<Cache>,
}

/// Two generations: when the younger one is full it becomes the older one, and what is asked for again comes back.
#[derive(Default)]
struct Cache {
    young: HashMap<Block, Arc<[u8]>>,
    old: HashMap<Block, Arc<[u8]>>,
}

impl Cache {
    fn get(&mut self, block: Block, room: usize) -> Option<Arc<[u8]>> {
        if let Some(found) = self.young.get(&block) {
            return Some(found.clone());
        }
        let found = self.old.remove(&block)?;
        self.put(block, found.clone(), room);
        Some(found)
    }

    fn put(&mut self, block: Block, bytes: Arc<[u8]>, room: usize) {
        if self.young.len() >= room {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(block, bytes);
    }
}

impl Blocks {
    /// Blocks of `size` bytes; those from `count` on do not exist.
    pub(crate) fn new(source: Box<dyn Source>, size: u32, count: Block) -> Blocks {
        Blocks {
            source,
            size,
            count,
            logged: BTreeMap::new(),
            staged: BTreeMap::new(),
            stagings: 0,
            cache: Mutex::default(),
        }
    }

    /// What the journal has is newer from now on.
    pub(crate) fn set_logged(&mut self, logged: BTreeMap<Block, Logged>) {
        self.logged = logged;
        self.cache = Mutex::default();
    }

    /// Changes a block in memory.
    pub(crate) fn stage(&mut self, block: Block, bytes: Arc<[u8]>) {
        self.stagings += 1;
        self.staged.insert(block, bytes);
    }

    /// A block of metadata, to change it in memory: copied once, when it is changed for the first time.
    pub(crate) fn change(&mut self, block: Block, place: Place) -> Result<&mut [u8]> {
        if !self.staged.contains_key(&block) {
            let bytes = self.metadata(block, place)?;
            self.staged.insert(block, bytes);
        }
        self.stagings += 1;
        let staged = self.staged.get_mut(&block).expect("put there just now, at the latest");
        Ok(Arc::make_mut(staged))
    }

    /// Whether a block was changed in memory.
    pub(crate) fn is_staged(&self, block: Block) -> bool {
        self.staged.contains_key(&block)
    }

    /// Takes a change back: the block is nothing any more.
    pub(crate) fn unstage(&mut self, block: Block) {
        self.stagings += 1;
        self.staged.remove(&block);
    }

    /// That the source has something else in these blocks now.
    pub(crate) fn forget(&self, first: Block, count: u64) {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let Cache { young, old } = &mut *cache;
        for kept in [young, old] {
            kept.retain(|block, _| !(first..first + count).contains(block));
        }
    }

    /// A number that changes whenever a block is changed in memory.
    pub(crate) fn stagings(&self) -> u64 {
        self.stagings
    }

    /// The blocks that were changed in memory.
    pub(crate) fn staged(&self) -> &BTreeMap<Block, Arc<[u8]>> {
        &self.staged
    }

    /// What was changed in memory or in the journal is in its place now.
    pub(crate) fn settle(&mut self) {
        self.staged.clear();
        self.set_logged(BTreeMap::new());
    }

    /// The blocks that are in the journal.
    pub(crate) fn logged(&self) -> &BTreeMap<Block, Logged> {
        &self.logged
    }

    pub(crate) fn source(&self) -> &dyn Source {
        &*self.source
    }

    /// What it was made of.
    pub(crate) fn into_parts(self) -> (Box<dyn Source>, BTreeMap<Block, Logged>) {
        (self.source, self.logged)
    }

    /// Bytes of a block.
    pub(crate) fn size(&self) -> u32 {
        self.size
    }

    /// The same, to count bytes in memory with.
    pub(crate) fn bytes(&self) -> usize {
        self.size as usize
    }

    /// How many there are.
    pub(crate) fn count(&self) -> Block {
        self.count
    }

    /// Whether these blocks exist and can hold something: the first one has the superblock or comes before it.
    pub(crate) fn exist(&self, first: Block, count: u64) -> bool {
        first > 0 && first.checked_add(count).is_some_and(|end| end <= self.count)
    }

    /// A block of metadata, on behalf of `place`.
    pub(crate) fn metadata(&self, block: Block, place: Place) -> Result<Arc<[u8]>> {
        if block >= self.count {
            return Err(Error::corrupt(place, format!("is said to be in block {block}, of {}", self.count)));
        }
        if let Some(staged) = self.staged.get(&block) {
            return Ok(staged.clone());
        }
        let room = (CACHE / self.bytes()).max(16);
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = cache.get(block, room) {
            return Ok(found);
        }
        drop(cache);
        let mut bytes = vec![0; self.bytes()];
        self.read(block * u64::from(self.size), &mut bytes)?;
        let bytes: Arc<[u8]> = bytes.into();
        cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.put(block, bytes.clone(), room);
        Ok(bytes)
    }

    /// Bytes at a place of the filesystem, newer ones from the journal included.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let size = u64::from(self.size);
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let block = at / size;
            let last = (at + rest.len() as u64 - 1) / size;
            let logged = self.logged.range(block..=last).next().map(|(block, _)| *block);
            let staged = self.staged.range(block..=last).next().map(|(block, _)| *block);
            match logged.into_iter().chain(staged).min() {
                Some(found) if found == block => {
                    let bytes = self.newer(block)?;
                    // Below a block's size, so it fits.
                    let from = usize::try_from(at % size).unwrap_or(0);
                    let length = (bytes.len() - from).min(rest.len());
                    let (now, after) = rest.split_at_mut(length);
                    now.copy_from_slice(&bytes[from..from + length]);
                    (at, rest) = (at + length as u64, after);
                }
                Some(found) => {
                    let length = usize::try_from(found * size - at).unwrap_or(usize::MAX).min(rest.len());
                    let (now, after) = rest.split_at_mut(length);
                    self.raw(at, now)?;
                    (at, rest) = (at + length as u64, after);
                }
                None => {
                    self.raw(at, rest)?;
                    break;
                }
            }
        }
        Ok(())
    }

    /// The contents of a block that was changed in memory, or is in the journal.
    fn newer(&self, block: Block) -> Result<Arc<[u8]>> {
        match (self.staged.get(&block), self.logged.get(&block)) {
            (Some(staged), _) => Ok(staged.clone()),
            (None, Some(logged)) => Ok(self.logged_block(logged)?.into()),
            (None, None) => unreachable!("asked for blocks of either map only"),
        }
    }

    /// The contents of a block that is in the journal.
    pub(crate) fn logged_block(&self, logged: &Logged) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.bytes()];
        self.raw(logged.at * u64::from(self.size), &mut bytes)?;
        if let Some(LoggedSum { seed, sequence, sum, mask }) = logged.sum
            && (journal::data_sum(seed, sequence, &bytes) ^ sum) & mask != 0
        {
            return Err(Error::Checksum(Place::JournalBlock(logged.log_block)));
        }
        if logged.escaped {
            bytes[..4].copy_from_slice(&journal::MAGIC.to_be_bytes());
        }
        Ok(bytes)
    }

    /// Bytes as the source has them.
    pub(crate) fn raw(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let length = buffer.len();
        self.source.read_exact_at(buffer, offset).map_err(|error| Error::Io { offset, length, error })
    }
}

#[cfg(test)]
mod tests {
    use super::super::source::Padded;
    use super::*;

    #[test]
    fn what_is_in_the_journal_is_newer() {
        let mut bytes = vec![1; 8 * 1024];
        bytes[6 * 1024..7 * 1024].fill(6);
        let mut blocks = Blocks::new(Box::new(Padded::new(bytes, 0)), 1024, 8);
        let logged = Logged { at: 6, log_block: 1, escaped: true, sum: None };
        let read = |blocks: &Blocks| {
            let mut buffer = vec![0; 3000];
            blocks.read(1000, &mut buffer).unwrap();
            buffer
        };
        assert_eq!(read(&blocks), vec![1; 3000]);
        assert_eq!(blocks.metadata(2, Place::Journal).unwrap()[0], 1);
        blocks.set_logged(BTreeMap::from([(2, logged)]));
        let mut expected = vec![1; 3000];
        expected[1048..2072].fill(6);
        expected[1048..1052].copy_from_slice(&journal::MAGIC.to_be_bytes());
        assert_eq!(read(&blocks), expected);
        assert_eq!(blocks.metadata(2, Place::Journal).unwrap()[4], 6);
        assert!(blocks.metadata(8, Place::Journal).is_err());

        let sum = journal::data_sum(5, 7, &[6; 1024]);
        let right = LoggedSum { seed: 5, sequence: 7, sum, mask: !0 };
        blocks.set_logged(BTreeMap::from([(2, Logged { sum: Some(right), ..logged })]));
        assert_eq!(read(&blocks), expected);
        let wrong = LoggedSum { sequence: 8, ..right };
        blocks.set_logged(BTreeMap::from([(2, Logged { sum: Some(wrong), ..logged })]));
        let error = blocks.read(2048, &mut [0; 8]).unwrap_err();
        assert!(matches!(error, Error::Checksum(Place::JournalBlock(1))), "{error}");
    }

    #[test]
    fn the_cache_keeps_what_is_asked_for_again() {
        let mut cache = Cache::default();
        let block = |byte: u8| -> Arc<[u8]> { Arc::from([byte]) };
        for number in 0..100 {
            cache.put(number, block(1), 4);
            assert!(cache.get(0, 4).is_some());
            assert!(cache.young.len() <= 4 && cache.old.len() <= 4);
        }
        assert!(cache.get(50, 4).is_none());
    }
}
