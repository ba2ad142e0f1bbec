//! Changes to blocks: placed as they are needed, and their sectors marked as there.

use std::sync::Arc;

use vbd_core::ask::{Ask, ask};
use vbd_core::memory::Buffer;
use vbd_core::{Flags, Operation, Result};

use super::bitmap::{Bitmap, set_bits};
use super::channel::VhdChannel;
use super::map::{BlockState, Map};
use super::space::Place;
use super::work::{Memory, Part, Placed, bytes};
use crate::format::SECTOR;

/// What a block's range is to become.
#[derive(Clone, Copy)]
enum Source<'a> {
    Memory(&'a Memory),
    Zeroes(Flags),
}

impl VhdChannel {
    pub(crate) async fn write(&self, map: &Map, memory: &Memory, part: Part) -> Result<()> {
        self.change(map, Source::Memory(memory), part).await
    }

    pub(crate) async fn write_zeroes(&self, map: &Map, mut part: Part, flags: Flags) -> Result<()> {
        if map.differencing {
            return self.change(map, Source::Zeroes(flags), part).await;
        }
        // What is not there reads as zeroes already.
        let content = match map.state(part.block) {
            BlockState::Damaged => return Err(map.damaged(part.block)),
            BlockState::Absent => return Ok(()),
            BlockState::Full(content) => return self.put(Source::Zeroes(flags), part, content).await,
            BlockState::Partial(content) => content,
        };
        match self.placed(map, part.block, content).await? {
            Placed::Full => self.put(Source::Zeroes(flags), part, content).await,
            Placed::Partial(bitmap) => {
                while part.len > 0 {
                    let (there, run, rest) = next_run(&bitmap, part);
                    if there {
                        self.put(Source::Zeroes(flags), run, content).await?;
                    }
                    part = rest;
                }
                Ok(())
            }
        }
    }

    /// Gives the room of what is there back. The block stays where it is, so that nobody can meet another's content
    /// there; what is not there is left as it is.
    pub(crate) async fn discard(&self, map: &Map, mut part: Part) -> Result<()> {
        let content = match map.state(part.block) {
            BlockState::Damaged => return Err(map.damaged(part.block)),
            BlockState::Absent => return Ok(()),
            BlockState::Full(content) | BlockState::Partial(content) => content,
        };
        let punch = async |run: Part| {
            let discard = Ask::new(Operation::Discard, content + run.within, run.len);
            ask(&self.file, discard, self.local.now()).await.map(|_| ())
        };
        match self.placed(map, part.block, content).await? {
            Placed::Full => punch(part).await,
            Placed::Partial(bitmap) => {
                while part.len > 0 {
                    let (there, run, rest) = next_run(&bitmap, part);
                    if there {
                        punch(run).await?;
                    }
                    part = rest;
                }
                Ok(())
            }
        }
    }

    /// Changes a range of a block, which gets its place and its bits where it has to.
    async fn change(&self, map: &Map, source: Source<'_>, part: Part) -> Result<()> {
        // Without the lock where everything is there: places and bits stay.
        if let Some(content) = self.in_place(map, part)? {
            return self.put(source, part, content).await;
        }
        let lock = map.blocks.lock(part.block..part.block + 1).await;
        match map.state(part.block) {
            BlockState::Damaged => Err(map.damaged(part.block)),
            BlockState::Full(content) => {
                drop(lock);
                self.put(source, part, content).await
            }
            BlockState::Absent if map.differencing => self.place_over_parent(map, source, part).await,
            BlockState::Absent => self.place_new(map, source, part).await,
            BlockState::Partial(content) => match self.placed_locked(map, part.block, content).await? {
                Placed::Full => self.put(source, part, content).await,
                Placed::Partial(bitmap) if map.differencing => {
                    let fresh = false;
                    self.fill(map, source, part, content, &bitmap, fresh).await
                }
                Placed::Partial(bitmap) => {
                    self.complete_block(map, part.block, content, &bitmap).await?;
                    drop(lock);
                    self.put(source, part, content).await
                }
            },
        }
    }

    /// Where a block's content is, if all sectors of the range are there, as far as memory tells.
    fn in_place(&self, map: &Map, part: Part) -> Result<Option<u64>> {
        match map.state(part.block) {
            BlockState::Damaged => Err(map.damaged(part.block)),
            BlockState::Absent => Ok(None),
            BlockState::Full(content) => Ok(Some(content)),
            BlockState::Partial(content) => {
                let bitmaps = map.bitmaps.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let bitmap = bitmaps.get(part.block);
                drop(bitmaps);
                Ok(bitmap.filter(|bitmap| bitmap.has_all(part.sectors())).map(|_| content))
            }
        }
    }

    /// Writes to sectors that are there, or are about to be.
    async fn put(&self, source: Source<'_>, part: Part, content: u64) -> Result<()> {
        let change = match source {
            Source::Memory(memory) => {
                let (pieces, guard) = (memory.pieces(&part), memory.guard.clone());
                Ask::transfer(Operation::Write, content + part.within, pieces, guard)
            }
            Source::Zeroes(flags) => {
                let flags = Flags { fua: false, ..flags };
                Ask { flags, ..Ask::new(Operation::WriteZeroes, content + part.within, part.len) }
            }
        };
        ask(&self.file, change, self.local.now()).await.map(|_| ())
    }

    /// A new block of a dynamic disk. All of its sectors are there from the start, as QEMU has it too: those that
    /// nobody wrote are zeroes, on room that was durably zero.
    async fn place_new(&self, map: &Map, source: Source<'_>, part: Part) -> Result<()> {
        let place = self.place(map, part.block).await?;
        if !place.fresh {
            // A write that failed may have left something there, which must not turn up now.
            let whole = Part { block: part.block, within: 0, len: map.block_size, done: 0 };
            let flags = Flags { may_unmap: true, ..Flags::default() };
            self.put(Source::Zeroes(flags), whole, place.start + map.bitmap_len).await?;
            self.flush().await?;
        }
        let mut bitmap = Buffer::new(bytes(map.bitmap_len));
        set_bits(bitmap.bytes_mut(), 0..map.block_size / SECTOR);
        self.put(source, part, place.start + map.bitmap_len).await?;
        self.write_buffer(bitmap, place.start).await?;
        map.durable.wrote();
        map.set_full(part.block);
        self.enter(map, part.block, place).await
    }

    /// A new block of a differencing disk: only what is written is there.
    async fn place_over_parent(&self, map: &Map, source: Source<'_>, part: Part) -> Result<()> {
        let place = self.place(map, part.block).await?;
        let bitmap = Arc::new(Bitmap::new(&vec![0; bytes(map.bitmap_len)]));
        self.keep(map, part.block, &bitmap);
        let content = place.start + map.bitmap_len;
        let filled = self.fill(map, source, part, content, &bitmap, place.fresh).await;
        let entered = match filled {
            Ok(()) => self.enter(map, part.block, place).await,
            Err(error) => Err(error),
        };
        if entered.is_err() {
            // Without a place there is no bitmap that could count.
            map.bitmaps.lock().unwrap_or_else(std::sync::PoisonError::into_inner).forget(part.block);
            map.set_look(part.block);
        }
        entered
    }

    /// Writes a range of a differencing disk's block, then the bits of its sectors. `fresh`: the content was durably
    /// zero so far, so that zeroes need not be written.
    async fn fill(
        &self,
        map: &Map,
        source: Source<'_>,
        part: Part,
        content: u64,
        bitmap: &Arc<Bitmap>,
        fresh: bool,
    ) -> Result<()> {
        let sectors = part.sectors();
        if !bitmap.has_all(sectors.clone()) {
            self.fill_edges(map, part, content, bitmap).await?;
        }
        // Sectors that are to be zero in part were just filled.
        let is_zero = fresh && part.within.is_multiple_of(SECTOR) && part.len.is_multiple_of(SECTOR);
        if !(is_zero && matches!(source, Source::Zeroes(_))) {
            self.put(source, part, content).await?;
        }
        if bitmap.has_all(sectors.clone()) {
            return Ok(());
        }
        // A bit must never be there without its content.
        self.flush().await?;
        let mut buffer = Buffer::new(bytes(map.bitmap_len));
        buffer.bytes_mut().copy_from_slice(&bitmap.bytes());
        set_bits(buffer.bytes_mut(), sectors);
        let bits = buffer.bytes_mut().to_vec();
        self.write_buffer(buffer, content - map.bitmap_len).await?;
        map.durable.wrote();
        bitmap.set(&bits);
        if bitmap.has_all(0..self.sectors(map, part.block)) {
            map.set_full(part.block);
        }
        Ok(())
    }

    /// Brings sectors that a range covers in part, and that are not there, from below into their place.
    async fn fill_edges(&self, map: &Map, part: Part, content: u64, bitmap: &Bitmap) -> Result<()> {
        let sectors = part.sectors();
        let (first, last) = (sectors.start, sectors.end - 1);
        let mut edges = Vec::new();
        if !part.within.is_multiple_of(SECTOR) {
            edges.push(first);
        }
        if !(part.within + part.len).is_multiple_of(SECTOR) && !edges.contains(&last) {
            edges.push(last);
        }
        for sector in edges.into_iter().filter(|sector| !bitmap.has(*sector)) {
            let buffer = Arc::new(Buffer::new(bytes(SECTOR)));
            let memory = Memory { pieces: vec![buffer.whole()], guard: Some(buffer.clone()) };
            let whole = Part { block: part.block, within: sector * SECTOR, len: SECTOR, done: 0 };
            self.read_below(map, &memory, whole).await?;
            self.put(Source::Memory(&memory), whole, content).await?;
        }
        Ok(())
    }

    /// Makes all sectors of a dynamic disk's block be there: those that were not become zeroes in the file too.
    async fn complete_block(&self, map: &Map, block: u64, content: u64, bitmap: &Bitmap) -> Result<()> {
        let mut part = Part { block, within: 0, len: map.block_size, done: 0 };
        let flags = Flags { may_unmap: true, ..Flags::default() };
        while part.len > 0 {
            let (there, run, rest) = next_run(bitmap, part);
            if !there {
                self.put(Source::Zeroes(flags), run, content).await?;
            }
            part = rest;
        }
        self.flush().await?;
        let mut full = Buffer::new(bytes(map.bitmap_len));
        set_bits(full.bytes_mut(), 0..map.block_size / SECTOR);
        self.write_buffer(full, content - map.bitmap_len).await?;
        map.durable.wrote();
        map.set_full(block);
        map.bitmaps.lock().unwrap_or_else(std::sync::PoisonError::into_inner).forget(block);
        Ok(())
    }

    /// Enters a block's place in the table, in the file and then in memory.
    async fn enter(&self, map: &Map, block: u64, place: Place) -> Result<()> {
        // Others' entries in the same sector wait, so that none is written as it was before.
        let first = block / 128 * 128;
        let _lock = map.table.lock(first..first + 128).await;
        let (at, bytes) = map.table_sector(block, place.sector());
        let mut buffer = Buffer::new(bytes.len());
        buffer.bytes_mut().copy_from_slice(&bytes);
        self.write_buffer(buffer, at).await?;
        map.durable.wrote();
        map.publish(block, place.sector());
        map.placed(block);
        Ok(())
    }
}

/// The first sectors of a part that are alike: whether they are there, they, and the rest.
pub(crate) fn next_run(bitmap: &Bitmap, part: Part) -> (bool, Part, Part) {
    let (there, sectors) = bitmap.run(part.sectors());
    let end = (part.sectors().start + sectors) * SECTOR;
    let (run, rest) = part.split(end - part.within);
    (there, run, rest)
}
