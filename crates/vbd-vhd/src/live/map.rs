//! What is known of an open image, shared by its queues: where each block is.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vbd_core::file::Backend;
use vbd_core::range_lock::RangeLocks;
use vbd_core::{Error, ErrorKind, Session};

use super::bitmap::Bitmaps;
use super::space::Space;
use crate::format::{DynamicHeader, Footer, SECTOR, UNUSED};

/// An open image.
pub(crate) struct Image {
    /// Its file.
    pub(crate) backend: Arc<Backend>,
    /// For messages.
    pub(crate) label: String,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Writes are refused.
    pub(crate) read_only: bool,
    /// Where blocks are; none where the disk is fixed, and its content begins the file.
    pub(crate) map: Option<Map>,
    /// What a differencing disk lies over.
    pub(crate) parent: Option<Arc<dyn Session>>,
    /// Keeps the file's lease.
    pub(crate) _lease: vbd_image::lease::Lease,
}

impl Drop for Image {
    /// Gives back the room that the file was grown by ahead. Nothing is in flight any more, and the lease is still held.
    fn drop(&mut self) {
        if let Some(map) = self.map.as_ref().filter(|_| !self.read_only)
            && let Err(error) = map.trim(&self.backend)
        {
            // The next who opens it for writing does it.
            tracing::debug!("{}: its end was not put in order: {error}", self.label);
        }
    }
}

/// The blocks of a dynamic or differencing disk.
pub(crate) struct Map {
    /// Whether what is not there is the parent's.
    pub(crate) differencing: bool,
    pub(crate) block_size: u64,
    pub(crate) bitmap_len: u64,
    pub(crate) table_offset: u64,
    /// The footer, as it is written behind new room.
    pub(crate) footer: Footer,
    /// The table as it is in the file: the sector of each block.
    entries: Box<[AtomicU32]>,
    /// What is known of each block.
    states: Box<[AtomicU8]>,
    pub(crate) bitmaps: Mutex<Bitmaps>,
    /// Blocks that somebody places, or whose bitmap is read or changed.
    pub(crate) blocks: Arc<RangeLocks>,
    /// Sectors of the table that are being written.
    pub(crate) table: Arc<RangeLocks>,
    /// Excludes others from `space`, which is held while the file grows.
    pub(crate) growing: Arc<RangeLocks>,
    pub(crate) space: Mutex<Space>,
    pub(crate) durable: Durable,
}

/// What has become durable. Metadata counts itself when it has been written, and a flush covers what was counted when
/// it began.
#[derive(Default)]
pub(crate) struct Durable {
    written: AtomicU64,
    flushed: AtomicU64,
    /// One flush at a time, of those made here; who waits meanwhile shares the next.
    pub(crate) turn: Arc<RangeLocks>,
    /// Those who asked for a flush, and how many of them are served.
    asked: AtomicU64,
    served: AtomicU64,
}

impl Durable {
    /// Metadata was written.
    pub(crate) fn wrote(&self) {
        self.written.fetch_add(1, Ordering::SeqCst);
    }

    /// What a flush that begins now will cover.
    pub(crate) fn begin(&self) -> u64 {
        self.written.load(Ordering::SeqCst)
    }

    /// A flush that began with this has succeeded.
    pub(crate) fn ended(&self, covered: u64) {
        self.flushed.fetch_max(covered, Ordering::SeqCst);
    }

    /// Whether all metadata is durable, so that a write with FUA to a block in place is durable when its data is.
    pub(crate) fn is_settled(&self) -> bool {
        self.flushed.load(Ordering::SeqCst) >= self.written.load(Ordering::SeqCst)
    }

    /// Somebody asks for a flush: their number.
    pub(crate) fn ask(&self) -> u64 {
        self.asked.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Whether a flush that began after they had asked has ended.
    pub(crate) fn is_served(&self, number: u64) -> bool {
        self.served.load(Ordering::SeqCst) >= number
    }

    /// Who has asked until now.
    pub(crate) fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }

    /// They are served.
    pub(crate) fn serve(&self, until: u64) {
        self.served.fetch_max(until, Ordering::SeqCst);
    }
}

/// What is known of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockState {
    /// It has no place.
    Absent,
    /// All of its sectors are there; its content begins at this byte of the file.
    Full(u64),
    /// Its bitmap says which are there, or has not been read; its content begins at this byte.
    Partial(u64),
    /// The table says something that cannot be.
    Damaged,
}

const LOOK: u8 = 0;
const FULL: u8 = 1;
const DAMAGED: u8 = 2;

impl Map {
    /// The blocks of a disk in a file whose content ends at `end`. Entries that cannot be are remembered as damaged.
    pub(crate) fn new(header: &DynamicHeader, footer: Footer, table: &[u32], end: u64) -> Self {
        let (bitmap_len, block_size) = (header.bitmap_len(), u64::from(header.block_size));
        // Behind footer and header at least; what else must not be met is looked at before anything is written.
        let first = footer.data_offset + crate::format::HEADER_LEN as u64;
        let state = |entry: &u32| {
            let start = u64::from(*entry) * SECTOR;
            let is_damaged = *entry != UNUSED && (start < first || start + bitmap_len + block_size > end);
            AtomicU8::new(if is_damaged { DAMAGED } else { LOOK })
        };
        Map {
            differencing: footer.kind == crate::format::Kind::Differencing,
            block_size,
            bitmap_len,
            table_offset: header.table_offset,
            footer,
            entries: table.iter().map(|entry| AtomicU32::new(*entry)).collect(),
            states: table.iter().map(state).collect(),
            bitmaps: Mutex::default(),
            blocks: Arc::default(),
            table: Arc::default(),
            growing: Arc::default(),
            space: Mutex::new(Space::new(end)),
            durable: Durable::default(),
        }
    }

    /// What is known of a block.
    pub(crate) fn state(&self, block: u64) -> BlockState {
        let index = usize::try_from(block).expect("a 64-bit host");
        let entry = self.entries[index].load(Ordering::Acquire);
        let content = u64::from(entry) * SECTOR + self.bitmap_len;
        match self.states[index].load(Ordering::Acquire) {
            DAMAGED => BlockState::Damaged,
            _ if entry == UNUSED => BlockState::Absent,
            FULL => BlockState::Full(content),
            _ => BlockState::Partial(content),
        }
    }

    /// Where a range lies in the file, if it is within one block all of whose sectors are there.
    pub(crate) fn direct(&self, offset: u64, len: u64) -> Option<u64> {
        let (block, within) = (offset / self.block_size, offset % self.block_size);
        if within + len > self.block_size || len == 0 {
            return None;
        }
        match self.state(block) {
            BlockState::Full(content) => Some(content + within),
            _ => None,
        }
    }

    /// All of a block's sectors are there.
    pub(crate) fn set_full(&self, block: u64) {
        self.states[usize::try_from(block).expect("a 64-bit host")].store(FULL, Ordering::Release);
    }

    /// What is there of a block has to be looked up.
    pub(crate) fn set_look(&self, block: u64) {
        self.states[usize::try_from(block).expect("a 64-bit host")].store(LOOK, Ordering::Release);
    }

    /// A block has its place, in memory. What is known of it was said before.
    pub(crate) fn publish(&self, block: u64, sector: u32) {
        self.entries[usize::try_from(block).expect("a 64-bit host")].store(sector, Ordering::Release);
    }

    /// The bytes of the sector of the table that has this block's entry, with that one as given; and where it is.
    pub(crate) fn table_sector(&self, block: u64, sector: u32) -> (u64, [u8; 512]) {
        let first = block / 128 * 128;
        let mut bytes = [0xff; 512];
        for (number, slot) in (first..).zip(bytes.chunks_exact_mut(4)) {
            let entry = match usize::try_from(number).ok().and_then(|index| self.entries.get(index)) {
                _ if number == block => sector,
                Some(entry) => entry.load(Ordering::Acquire),
                None => UNUSED,
            };
            slot.copy_from_slice(&entry.to_be_bytes());
        }
        (self.table_offset + first * 4, bytes)
    }

    /// An error for a block whose entry cannot be.
    pub(crate) fn damaged(&self, block: u64) -> Error {
        let message =
            format!("block {block} has no place that can be; check the image, and restore it from a backup");
        Error::new(ErrorKind::Corrupt, message)
    }
}

/// Places that were given to blocks which did not come into the table.
pub(crate) type Reserved = HashMap<u64, u64>;
