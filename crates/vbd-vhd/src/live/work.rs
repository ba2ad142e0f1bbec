//! Requests that take more than one step: over several blocks, with sectors that are not there, with places to be given.

use std::sync::{Arc, PoisonError};

use vbd_core::ask::{Ask, ask};
use vbd_core::memory::{Buffer, slice, zero};
use vbd_core::{Guard, IoVec, Operation, Request, Result};

use super::bitmap::{Bitmap, is_full};
use super::channel::VhdChannel;
use super::map::{BlockState, Map};
use super::write::next_run;
use crate::format::SECTOR;

/// A part of a request within one block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) block: u64,
    /// Bytes from the block's start.
    pub(crate) within: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// Bytes of the request before it.
    pub(crate) done: u64,
}

impl Part {
    /// The sectors that it touches, counted from the block's start.
    pub(crate) fn sectors(&self) -> std::ops::Range<u64> {
        self.within / SECTOR..(self.within + self.len).div_ceil(SECTOR)
    }

    /// The first `len` bytes of it, and the rest.
    pub(crate) fn split(self, len: u64) -> (Part, Part) {
        let first = Part { len: len.min(self.len), ..self };
        let (within, done) = (self.within + first.len, self.done + first.len);
        (first, Part { within, done, len: self.len - first.len, ..self })
    }
}

/// Memory of a request.
pub(crate) struct Memory {
    pub(crate) pieces: Vec<IoVec>,
    pub(crate) guard: Option<Guard>,
}

impl Memory {
    fn of(request: &mut Request) -> Self {
        Memory { pieces: request.memory.clone(), guard: request.guard.clone() }
    }

    /// The pieces that a part covers.
    pub(crate) fn pieces(&self, part: &Part) -> Vec<IoVec> {
        slice(&self.pieces, bytes(part.done), bytes(part.len), usize::MAX).0
    }
}

/// A block that has its place, and which of its sectors are there.
#[derive(Clone)]
pub(crate) enum Placed {
    Full,
    Partial(Arc<Bitmap>),
}

impl VhdChannel {
    /// Does a request, one block after the other.
    pub(crate) async fn serve(&self, request: &mut Request) -> Result<()> {
        let Some(map) = &self.image.map else { return Ok(()) };
        let operation = request.operation;
        if operation == Operation::Extents {
            request.extents = self.extents(map, request.offset, request.len).await?;
            return Ok(());
        }
        let flags = request.flags;
        let (offset, len) = (request.offset, request.len);
        let memory = Memory::of(request);
        let mut done = 0;
        while done < len {
            let (block, within) = ((offset + done) / map.block_size, (offset + done) % map.block_size);
            let part = Part { block, within, len: (len - done).min(map.block_size - within), done };
            match operation {
                Operation::Read => self.read(map, &memory, part).await?,
                Operation::Write => self.write(map, &memory, part).await?,
                Operation::WriteZeroes => self.write_zeroes(map, part, flags).await?,
                _ => self.discard(map, part).await?,
            }
            done += part.len;
        }
        // The parts were written without the flag: one flush covers them, and the metadata.
        if flags.fua { self.flush().await } else { Ok(()) }
    }

    async fn read(&self, map: &Map, memory: &Memory, mut part: Part) -> Result<()> {
        let content = match map.state(part.block) {
            BlockState::Damaged => return Err(map.damaged(part.block)),
            BlockState::Absent => return self.read_below(map, memory, part).await,
            BlockState::Full(content) => return self.read_content(memory, part, content).await,
            BlockState::Partial(content) => content,
        };
        match self.placed(map, part.block, content).await? {
            Placed::Full => self.read_content(memory, part, content).await,
            Placed::Partial(bitmap) => {
                while part.len > 0 {
                    let (there, run, rest) = next_run(&bitmap, part);
                    match there {
                        true => self.read_content(memory, run, content).await?,
                        false => self.read_below(map, memory, run).await?,
                    }
                    part = rest;
                }
                Ok(())
            }
        }
    }

    async fn read_content(&self, memory: &Memory, part: Part, content: u64) -> Result<()> {
        let pieces = memory.pieces(&part);
        let read = Ask::transfer(Operation::Read, content + part.within, pieces, memory.guard.clone());
        ask(&self.file, read, self.local.now()).await.map(|_| ())
    }

    /// Reads what is not in this file: of the parent, or zeroes.
    pub(crate) async fn read_below(&self, map: &Map, memory: &Memory, part: Part) -> Result<()> {
        let offset = part.block * map.block_size + part.within;
        let (inside, beyond) = match &self.parent {
            Some((_, size)) => part.split(size.saturating_sub(offset)),
            None => part.split(0),
        };
        if let Some((parent, _)) = &self.parent
            && inside.len > 0
        {
            let pieces = memory.pieces(&inside);
            let read = Ask::transfer(Operation::Read, offset, pieces, memory.guard.clone());
            ask(parent, read, self.local.now()).await?;
        }
        // SAFETY: the request's guard keeps its memory valid.
        unsafe { zero(&memory.pieces, bytes(beyond.done), bytes(beyond.len)) };
        Ok(())
    }

    /// Which sectors of a block are there: from memory, or from its bitmap in the file.
    pub(crate) async fn placed(&self, map: &Map, block: u64, content: u64) -> Result<Placed> {
        if let Some(bitmap) = self.known(map, block) {
            return Ok(bitmap);
        }
        // With the lock, so that no older state of the bitmap is kept than somebody writes meanwhile.
        let _lock = map.blocks.lock(block..block + 1).await;
        self.placed_locked(map, block, content).await
    }

    /// The same for who has the block's lock.
    pub(crate) async fn placed_locked(&self, map: &Map, block: u64, content: u64) -> Result<Placed> {
        if let Some(bitmap) = self.known(map, block) {
            return Ok(bitmap);
        }
        let buffer = Arc::new(Buffer::new(bytes(map.bitmap_len)));
        let memory = vec![buffer.whole()];
        let at = content - map.bitmap_len;
        let read = Ask::transfer(Operation::Read, at, memory, Some(buffer.clone()));
        ask(&self.file, read, self.local.now()).await?;
        // SAFETY: the read has come back.
        let bits = unsafe { buffer.bytes() };
        if is_full(bits, self.sectors(map, block)) {
            map.set_full(block);
            return Ok(Placed::Full);
        }
        let bitmap = Arc::new(Bitmap::new(bits));
        self.keep(map, block, &bitmap);
        Ok(Placed::Partial(bitmap))
    }

    fn known(&self, map: &Map, block: u64) -> Option<Placed> {
        if matches!(map.state(block), BlockState::Full(_)) {
            return Some(Placed::Full);
        }
        let bitmaps = map.bitmaps.lock().unwrap_or_else(PoisonError::into_inner);
        bitmaps.get(block).map(Placed::Partial)
    }

    pub(crate) fn keep(&self, map: &Map, block: u64, bitmap: &Arc<Bitmap>) {
        map.bitmaps.lock().unwrap_or_else(PoisonError::into_inner).keep(block, bitmap.clone());
    }

    /// How many sectors of a block the disk has: the last may be cut short.
    pub(crate) fn sectors(&self, map: &Map, block: u64) -> u64 {
        let rest = self.image.size.saturating_sub(block * map.block_size);
        rest.min(map.block_size) / SECTOR
    }
}

pub(crate) fn bytes(len: u64) -> usize {
    usize::try_from(len).expect("a 64-bit host")
}
