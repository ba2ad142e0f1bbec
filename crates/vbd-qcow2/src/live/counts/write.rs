//! Blocks of counts on their way to the disk.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use vbd_core::memory::Buffer;
use vbd_core::{Guard, Result};

use super::super::image::Image;
use super::super::io::{Io, Writes};
use super::super::map::PIECE;

/// What was taken to be written, put back where that does not succeed.
struct Taken<'a> {
    image: &'a Image,
    /// Blocks that were dirty.
    blocks: BTreeSet<u64>,
    /// Pieces of others, which may be written by now.
    pieces: Vec<(u64, usize)>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut state = self.image.counts.state();
        state.dirty.append(&mut self.blocks);
        for (number, piece) in self.pieces.drain(..) {
            if let Some(block) = state.blocks.get(number) {
                block.dirty.mark(piece);
                state.dirty.insert(number);
            }
        }
    }
}

impl Image {
    /// Writes what has changed of the counts. It is not durable before the next sync.
    pub(in crate::live) async fn write_counts(&self, io: &Io) -> Result<()> {
        let turn: Guard = Arc::new(self.counts.writing.lock(0..1).await);
        let blocks = std::mem::take(&mut self.counts.state().dirty);
        let mut taken = Taken { image: self, blocks, pieces: Vec::new() };
        let mut writes = Writes::default();
        while let Some(number) = taken.blocks.pop_first() {
            for (offset, buffer) in self.dirty_pieces(number, &mut taken.pieces) {
                let turn = turn.clone();
                writes.add(buffer.len(), || io.write(offset, buffer, turn)).await;
            }
        }
        writes.end().await?;
        taken.pieces.clear();
        Ok(())
    }

    /// The dirty pieces of a block as they are now, which count as taken from now on.
    fn dirty_pieces(&self, number: u64, taken: &mut Vec<(u64, usize)>) -> Vec<(u64, Buffer)> {
        let state = self.counts.state();
        let Some(block) = state.blocks.get(number) else { return Vec::new() };
        let copy = |run: Range<usize>| {
            let from = run.start * PIECE;
            let bytes = &block.bytes[from..block.bytes.len().min(run.end * PIECE)];
            let mut buffer = Buffer::new(bytes.len());
            buffer.bytes_mut().copy_from_slice(bytes);
            taken.extend(run.map(|piece| (number, piece)));
            (block.offset + from as u64, buffer)
        };
        block.dirty.take().into_iter().map(copy).collect()
    }
}
