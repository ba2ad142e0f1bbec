//! Metadata: a run of blocks of 8 KiB, each compressed for itself, that is read at places in it.

use std::collections::HashMap;
use std::sync::Arc;

use super::block::Compression;
use super::superblock::{u16_at, u32_at, u64_at};
use super::{ReadAt, read};

/// Bytes in a block.
pub(super) const BLOCK: usize = 8192;
/// How many unpacked blocks are kept: 32 MiB.
const KEPT: usize = 4096;
const PLAIN: u16 = 0x8000;

/// A block, unpacked, and where the next one begins.
type Block = (Arc<[u8]>, u64);

/// A run of blocks.
pub(super) struct Metadata<'a> {
    source: &'a dyn ReadAt,
    compression: Compression,
    start: u64,
    end: u64,
    kept: HashMap<u64, Block>,
}

/// A place in it, from where is read on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor {
    /// Where in the file the block begins.
    block: u64,
    offset: usize,
}

impl<'a> Metadata<'a> {
    /// The run from `start` on, whose last block begins before `end`.
    pub(super) fn new(
        source: &'a dyn ReadAt,
        compression: Compression,
        start: u64,
        end: u64,
    ) -> Metadata<'a> {
        Metadata { source, compression, start, end, kept: HashMap::new() }
    }

    /// The most bytes that all blocks can hold: one takes three bytes or more.
    pub(super) fn most(&self) -> u64 {
        (self.end.saturating_sub(self.start) / 3 + 1).saturating_mul(BLOCK as u64)
    }

    /// A place by the distance of its block from the start, and the offset in that.
    pub(super) fn cursor(&self, block: u64, offset: usize) -> Result<Cursor, String> {
        let block = self.start.checked_add(block).filter(|&block| block < self.end);
        let block = block.ok_or("is damaged: it leads out of a table")?;
        if offset >= BLOCK {
            return Err("is damaged: it leads out of a block".to_owned());
        }
        Ok(Cursor { block, offset })
    }

    /// Reads exactly so many bytes, and goes on behind them.
    pub(super) fn read(&mut self, cursor: &mut Cursor, buffer: &mut [u8]) -> Result<(), String> {
        let mut filled = 0;
        while filled < buffer.len() {
            let (bytes, next) = self.block(cursor.block)?;
            let Some(rest) = bytes.get(cursor.offset..).filter(|rest| !rest.is_empty()) else {
                // Only a full block is followed by another.
                if bytes.len() != BLOCK {
                    return Err("is damaged: a table ends too early".to_owned());
                }
                *cursor = Cursor { block: next, offset: 0 };
                continue;
            };
            let count = rest.len().min(buffer.len() - filled);
            buffer[filled..filled + count].copy_from_slice(&rest[..count]);
            filled += count;
            cursor.offset += count;
        }
        Ok(())
    }

    /// As [`Metadata::read`], for as many bytes as are asked for by a number in the image, up to `most`.
    pub(super) fn bytes(&mut self, cursor: &mut Cursor, count: u32, most: u32) -> Result<Vec<u8>, String> {
        if count > most {
            return Err(format!("is damaged: it says that something has {count} bytes"));
        }
        let mut bytes = vec![0; usize::try_from(count).unwrap_or(0)];
        self.read(cursor, &mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn array<const N: usize>(&mut self, cursor: &mut Cursor) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.read(cursor, &mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, cursor: &mut Cursor) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array(cursor)?))
    }

    fn block(&mut self, at: u64) -> Result<Block, String> {
        if let Some(block) = self.kept.get(&at) {
            return Ok(block.clone());
        }
        if at >= self.end {
            return Err("is damaged: it leads out of a table".to_owned());
        }
        let block = read_block(self.source, self.compression, at)?;
        if self.kept.len() >= KEPT {
            self.kept.clear();
        }
        self.kept.insert(at, block.clone());
        Ok(block)
    }
}

fn read_block(source: &dyn ReadAt, compression: Compression, at: u64) -> Result<Block, String> {
    let header = u16_at(&read(source, at, 2)?, 0);
    let length = match usize::from(header & !PLAIN) {
        0 => usize::from(PLAIN),
        length => length,
    };
    let stored = read(source, at + 2, length)?;
    let bytes = if header & PLAIN != 0 { stored } else { compression.unpack(&stored, BLOCK)? };
    if bytes.len() > BLOCK {
        return Err("is damaged: it has a block that is too large".to_owned());
    }
    Ok((Arc::from(bytes), at + 2 + length as u64))
}

/// Entries of one size in blocks whose places are in a list.
pub(super) struct Table<'a> {
    blocks: Metadata<'a>,
    list: u64,
    count: u64,
    size: usize,
}

impl<'a> Table<'a> {
    /// The table of `count` entries of `size` bytes, a part of 8 KiB, whose list is at `list`.
    pub(super) fn new(
        source: &'a dyn ReadAt,
        compression: Compression,
        list: u64,
        count: u64,
        size: usize,
    ) -> Result<Table<'a>, String> {
        // That a list is there says that its length is no more than the file's.
        let length = (count * size as u64).div_ceil(BLOCK as u64) * 8;
        if list.checked_add(length).is_none_or(|end| end > source.length()) {
            return Err("is cut off or damaged: it has no room for its tables".to_owned());
        }
        Ok(Table { blocks: Metadata::new(source, compression, 0, source.length()), list, count, size })
    }

    /// An entry, by its number.
    pub(super) fn get(&mut self, number: u64) -> Result<Vec<u8>, String> {
        if number >= self.count {
            return Err(format!("is damaged: it has entry {number} of a table of {}", self.count));
        }
        let at = number * self.size as u64;
        let place = read(self.blocks.source, self.list + at / BLOCK as u64 * 8, 8)?;
        let offset = usize::try_from(at % BLOCK as u64).unwrap_or(0);
        let mut cursor = self.blocks.cursor(u64_at(&place, 0), offset)?;
        let mut bytes = vec![0; self.size];
        self.blocks.read(&mut cursor, &mut bytes)?;
        Ok(bytes)
    }

    /// An entry that is a number.
    pub(super) fn number(&mut self, number: u64) -> Result<u32, String> {
        self.get(number).map(|bytes| u32_at(&bytes, 0))
    }
}
