//! Making one disk's content another's.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vbd_core::Client;
use vbd_core::client::Buffer;

use crate::input::Input;
use crate::ranges::{Chunk, Chunks, Low, Turns, each};
use crate::zeroes::{are_zero, runs};
use crate::{Error, Progress, Result};

/// Bytes that are read and written at once.
pub(crate) const CHUNK: u64 = 2 << 20;
/// The smallest run of zeroes that is not written.
const SMALLEST_UNIT: u64 = 4096;

/// How to copy.
pub(crate) struct Copy<'a> {
    /// Where the content is.
    pub(crate) source: &'a Client,
    /// Where it is to be, and where it is to begin as `base` tells, or with zeroes.
    pub(crate) target: &'a Client,
    /// What the target stands on: only what differs from that is written.
    pub(crate) base: Option<&'a Client>,
    /// Threads, and so chunks that are under way at once.
    pub(crate) threads: usize,
    /// Write in the order of the disk, one chunk at a time; what is compressed is not held up by that.
    pub(crate) ordered: bool,
    /// Write what becomes shorter by it compressed.
    pub(crate) compress: bool,
}

/// A thread's own memory.
struct Buffers {
    data: Arc<Buffer>,
    base: Option<Buffer>,
}

impl Copy<'_> {
    /// Copies from `start` on up to the source's end. `mark` is told now and then below which offset all is written
    /// (and not yet durable); it may fail the job. Gives the bytes that were written.
    pub(crate) fn run(
        &self,
        start: u64,
        progress: &dyn Progress,
        mark: &(dyn Fn(u64) -> Result<()> + Sync),
    ) -> Result<u64> {
        let size = self.source.size();
        let unit = u64::from(self.target.session().geometry().discard_granularity);
        let unit = unit.clamp(SMALLEST_UNIT, CHUNK).next_power_of_two();
        let start = start / CHUNK * CHUNK;
        progress.step("copying", size - start.min(size));
        let chunks = Chunks::new(self.source, start, size, unit, CHUNK);
        let (turns, low, written) = (Turns::default(), Low::new(start), AtomicU64::new(0));
        let bytes = usize::try_from(CHUNK).expect("a chunk is small");
        let own =
            || Buffers { data: Arc::new(Buffer::new(bytes)), base: self.base.map(|_| Buffer::new(bytes)) };
        let unit = usize::try_from(unit).expect("a unit is small");
        let inputs = (Input::new(self.source), self.base.map(Input::new));
        each(chunks, self.threads, &turns, progress, own, |own, chunk| {
            let done = self.chunk(&inputs, own, chunk, unit, &turns)?;
            written.fetch_add(done, Ordering::Relaxed);
            mark(low.done(chunk))?;
            Ok(true)
        })?;
        Ok(written.into_inner())
    }

    fn chunk(
        &self,
        (source, base): &(Input<'_>, Option<Input<'_>>),
        own: &mut Buffers,
        chunk: Chunk,
        unit: usize,
        turns: &Turns,
    ) -> Result<u64> {
        if !chunk.data && self.base.is_none() {
            self.turn(chunk, turns, || ());
            return Ok(0);
        }
        if !chunk.data {
            self.turn(chunk, turns, || ());
            return self.zero_over_base(chunk);
        }
        let len = usize::try_from(chunk.len).expect("data comes in chunks");
        let data = Arc::get_mut(&mut own.data);
        // Its last writer has been waited for, unless that was an error, which ended the job.
        let data = data.expect("a thread's buffer is its own between chunks");
        source.read(chunk.offset, data, len)?;
        let wanted = match (base, &mut own.base) {
            (Some(base), Some(below)) => {
                base.read_padded(chunk.offset, below, len)?;
                runs(len, unit, |piece| data[piece.clone()] != below[piece])
            }
            _ => runs(len, unit, |piece| !are_zero(&data[piece])),
        };
        if self.compress {
            self.turn(chunk, turns, || ());
            for run in &wanted {
                self.write_compressed(chunk.offset, &own.data, run.clone())?;
            }
            return Ok(wanted.iter().map(|run| run.len() as u64).sum());
        }
        let mut result = Ok(());
        self.turn(chunk, turns, || {
            let start = |run: &Range<usize>| {
                self.target.start_write(chunk.offset + run.start as u64, &own.data, run.clone())
            };
            let pending: Vec<_> = wanted.iter().map(start).collect();
            // All of them end before the next chunk begins: a format takes room for a long write in pieces, and those of
            // two writes would mix.
            for pending in pending {
                result = std::mem::replace(&mut result, Ok(())).and(pending.wait().1.map(|_| ()));
            }
        });
        result?;
        Ok(wanted.iter().map(|run| run.len() as u64).sum())
    }

    /// Writes a part of a buffer, of whole units, each compressed where that makes it shorter.
    fn write_compressed(&self, start: u64, data: &Arc<Buffer>, part: Range<usize>) -> Result<()> {
        let live = self.target.session().live();
        let unit = live.and_then(vbd_core::Live::compressed_unit).map(usize::try_from);
        let (Some(live), Some(Ok(unit))) = (live, unit) else {
            return Err(Error::Refused("the new image's format has no compression".to_owned()));
        };
        let mut at = part.start;
        while at < part.end {
            let piece = at..(at + unit).min(part.end);
            let offset = start + at as u64;
            if !live.write_compressed(offset, &data[piece.clone()])? {
                self.target.start_write(offset, data, piece.clone()).wait().1?;
            }
            at = piece.end;
        }
        Ok(())
    }

    /// Runs `work` when it is the chunk's turn, where there is an order.
    fn turn(&self, chunk: Chunk, turns: &Turns, work: impl FnOnce()) {
        if !self.ordered {
            work();
        } else if turns.wait(chunk.number) {
            work();
            turns.pass();
        }
    }

    /// Hides what the base has where the source has nothing.
    fn zero_over_base(&self, chunk: Chunk) -> Result<u64> {
        let Some(base) = self.base else { return Ok(0) };
        let end = chunk.end().min(base.size());
        let mut done = 0;
        if chunk.offset < end {
            base.parts(chunk.offset, end - chunk.offset, |offset, len, kind| {
                if kind == vbd_core::ExtentKind::Data {
                    self.target.zero(offset, len, true)?;
                    done += len;
                }
                Ok::<_, crate::Error>(())
            })?;
        }
        Ok(done)
    }
}
