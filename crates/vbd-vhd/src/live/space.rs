//! Places for new blocks, at the end of the file.

use std::sync::PoisonError;

use vbd_core::ask::{Ask, ask};
use vbd_core::file::Backend;
use vbd_core::memory::Buffer;
use vbd_core::{Error, ErrorKind, Operation, Result};

use super::channel::VhdChannel;
use super::map::{Map, Reserved};
use crate::format::{FOOTER_LEN, SECTOR, UNUSED};

/// Content of blocks begins at a multiple of this, so that requests keep their alignment on the way to the storage.
const ALIGNMENT: u64 = 4096;
/// The file grows by one block first, then by twice as much each time, up to this.
const MOST_STEP: u64 = 64 << 20;

/// The end of the file.
pub(crate) struct Space {
    /// Where the next block may begin.
    next: u64,
    /// Where the footer is. What is before it and not used is durably zero.
    end: u64,
    /// How much to grow by next.
    step: u64,
    /// Blocks that have a place and are not in the table: their writes failed.
    reserved: Reserved,
}

impl Space {
    pub(crate) fn new(end: u64) -> Self {
        Space { next: end, end, step: 0, reserved: Reserved::new() }
    }
}

/// A place for a block.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// Where its bitmap begins, in bytes.
    pub(crate) start: u64,
    /// Nothing was ever written there: it is durably zero.
    pub(crate) fresh: bool,
}

impl Place {
    /// The sector for the table.
    pub(crate) fn sector(self) -> u32 {
        u32::try_from(self.start / SECTOR).expect("checked where places are given")
    }
}

impl Map {
    fn space(&self) -> std::sync::MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the footer behind the last block, and ends the file there.
    pub(crate) fn trim(&self, file: &Backend) -> std::io::Result<()> {
        let space = self.space();
        if space.next == space.end || !space.reserved.is_empty() {
            return Ok(());
        }
        file.write_all_at(space.next, &self.footer.encode())?;
        file.sync()?;
        file.set_length(space.next + FOOTER_LEN as u64)
    }

    /// The place of this block is in the table.
    pub(crate) fn placed(&self, block: u64) {
        self.space().reserved.remove(&block);
    }
}

impl VhdChannel {
    /// A place for a block: the one that it was given before, where a write to it has failed.
    pub(crate) async fn place(&self, map: &Map, block: u64) -> Result<Place> {
        let _growing = map.growing.lock(0..1).await;
        let (start, after, end, step) = {
            let space = map.space();
            if let Some(start) = space.reserved.get(&block) {
                return Ok(Place { start: *start, fresh: false });
            }
            let start = (space.next + map.bitmap_len).next_multiple_of(ALIGNMENT) - map.bitmap_len;
            (start, start + map.bitmap_len + map.block_size, space.end, space.step.max(map.block_size))
        };
        if start / SECTOR >= u64::from(UNUSED) {
            let message =
                "the file has reached 2 TiB, where the format ends; convert the image to qcow2 or raw";
            return Err(Error::new(ErrorKind::Io, message));
        }
        if after > end {
            let wanted = (after - map.block_size).saturating_add(step).next_multiple_of(ALIGNMENT);
            self.grow_file(map, end, wanted).await?;
            let mut space = map.space();
            space.step = (step * 2).min(MOST_STEP);
        }
        let mut space = map.space();
        space.next = after;
        space.reserved.insert(block, start);
        Ok(Place { start, fresh: true })
    }

    /// Makes room up to `end`, with the footer behind it. It is durable before anything is placed there; until then the
    /// footer's copy at the start of the file stands for it.
    async fn grow_file(&self, map: &Map, old_end: u64, end: u64) -> Result<()> {
        let backend = self.image.backend.clone();
        // Where growing failed half way, the file is as long as it came.
        let end = end.max(backend.size().saturating_sub(FOOTER_LEN as u64));
        let grown = end + FOOTER_LEN as u64;
        self.local.unblock(move || backend.grow(grown)).await?;
        let mut footer = Buffer::new(FOOTER_LEN);
        footer.bytes_mut().copy_from_slice(&map.footer.encode());
        self.write_buffer(footer, end).await?;
        self.write_buffer(Buffer::new(FOOTER_LEN), old_end).await?;
        self.flush().await?;
        map.space().end = end;
        Ok(())
    }

    /// Writes all of a buffer.
    pub(crate) async fn write_buffer(&self, buffer: Buffer, offset: u64) -> Result<()> {
        let buffer = std::sync::Arc::new(buffer);
        let memory = vec![buffer.whole()];
        let write = Ask::transfer(Operation::Write, offset, memory, Some(buffer));
        ask(&self.file, write, self.local.now()).await.map(|_| ())
    }

    /// Makes what has been written durable. Those who ask while another's flush runs share the next.
    pub(crate) async fn flush(&self) -> Result<()> {
        let Some(map) = &self.image.map else {
            return ask(&self.file, Ask::flush(), self.local.now()).await.map(|_| ());
        };
        let durable = &map.durable;
        let number = durable.ask();
        let _turn = durable.turn.lock(0..1).await;
        if durable.is_served(number) {
            return Ok(());
        }
        let (until, covered) = (durable.asked(), durable.begin());
        ask(&self.file, Ask::flush(), self.local.now()).await?;
        durable.ended(covered);
        durable.serve(until);
        Ok(())
    }
}
