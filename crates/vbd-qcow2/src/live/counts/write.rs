//! Blocks of counts on their way to the disk.

use std::sync::Arc;

use vbd_core::memory::Buffer;
use vbd_core::{Guard, Result};

use super::super::image::Image;
use super::super::io::{Io, all};
use super::super::map::PIECE;

/// Pieces that were taken to be written, put back where that does not succeed.
struct Taken<'a> {
    image: &'a Image,
    pieces: Vec<(u64, usize)>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut state = self.image.counts.state();
        for (number, piece) in self.pieces.drain(..) {
            if let Some(block) = state.blocks.get(&number) {
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
        let mut taken = Taken { image: self, pieces: Vec::new() };
        let mut writes = Vec::new();
        {
            let mut state = self.counts.state();
            for number in std::mem::take(&mut state.dirty) {
                let Some(block) = state.blocks.get(&number) else { continue };
                for run in block.dirty.take() {
                    let from = run.start * PIECE;
                    let bytes = &block.bytes[from..block.bytes.len().min(run.end * PIECE)];
                    let mut buffer = Buffer::new(bytes.len());
                    buffer.bytes_mut().copy_from_slice(bytes);
                    writes.push((block.offset + from as u64, buffer));
                    taken.pieces.extend(run.map(|piece| (number, piece)));
                }
            }
        }
        let writes = writes.into_iter().map(|(offset, buffer)| io.write(offset, buffer, turn.clone()));
        all(writes.collect()).await?;
        taken.pieces.clear();
        Ok(())
    }
}
