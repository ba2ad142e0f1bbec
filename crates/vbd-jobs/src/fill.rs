//! Filling a new image that is written without an engine.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use vbd_core::client::Buffer;
use vbd_core::{Client, ExtentKind};
use vbd_qcow2::Packer;

use crate::input::Input;
use crate::ranges::{Chunk, Chunks, Low, Turns, each};
use crate::target::{Piece, Target};
use crate::zeroes::{are_zero, runs};
use crate::{Progress, Result};

/// How to fill an image.
pub(crate) struct Fill<'a> {
    /// Where the content is.
    pub(crate) source: &'a Client,
    /// Where it is to be.
    pub(crate) target: &'a Target,
    /// What the target stands on: only what differs from that is written.
    pub(crate) base: Option<&'a Client>,
    /// Threads that read, compress and write.
    pub(crate) threads: usize,
    /// Have the file hold everything in the disk's order.
    pub(crate) ordered: bool,
    /// Write what becomes shorter by it compressed.
    pub(crate) compress: bool,
}

/// A thread's own memory.
struct Own {
    data: Buffer,
    base: Option<Buffer>,
    packer: Option<Result<Packer>>,
    packed: Vec<u8>,
    padded: Vec<u8>,
}

/// The two disks that are read.
struct Inputs<'a> {
    source: Input<'a>,
    base: Option<Input<'a>>,
}

impl Fill<'_> {
    /// Fills the image from where it is to be begun up to the source's end. `mark` is told now and then below which offset all is
    /// written (and not yet durable); it may fail the job. Gives the bytes that were written, before compression.
    pub(crate) fn run(
        &self,
        progress: &dyn Progress,
        mark: &(dyn Fn(u64) -> Result<()> + Sync),
    ) -> Result<u64> {
        let (size, start) = (self.source.size(), self.target.start());
        let bytes = self.target.piece();
        progress.step("copying", size - start.min(size));
        let chunks = Chunks::new(self.source, start, size, self.target.unit() as u64, bytes as u64);
        let (turns, low, written) = (Turns::default(), Low::new(start), AtomicU64::new(0));
        let inputs = Inputs { source: Input::new(self.source), base: self.base.map(Input::new) };
        let own = || Own {
            data: Buffer::new(bytes),
            base: self.base.map(|_| Buffer::new(bytes)),
            packer: self.compress.then(|| self.target.packer()),
            packed: Vec::new(),
            padded: Vec::new(),
        };
        each(chunks, self.threads, &turns, progress, own, |own, chunk| {
            let done = self.chunk(&inputs, own, chunk, &turns)?;
            written.fetch_add(done, Ordering::Relaxed);
            let low = low.done(chunk);
            self.target.settled(low)?;
            mark(low)?;
            Ok(true)
        })?;
        Ok(written.into_inner())
    }

    fn chunk(&self, inputs: &Inputs<'_>, own: &mut Own, chunk: Chunk, turns: &Turns) -> Result<u64> {
        if !chunk.data {
            return self.in_turn(chunk, turns, || self.hide(chunk));
        }
        let len = usize::try_from(chunk.len).expect("data comes in pieces");
        let unit = self.target.unit();
        inputs.source.read(chunk.offset, &mut own.data, len)?;
        let data = &own.data[..len];
        let (mut plain, zeroes) = match (&inputs.base, &mut own.base) {
            (Some(base), Some(below)) => {
                base.read_padded(chunk.offset, below, len)?;
                let differs = |piece: &Range<usize>| data[piece.clone()] != below[piece.clone()];
                let zero = |piece: &Range<usize>| are_zero(&data[piece.clone()]);
                (
                    runs(len, unit, |piece| !zero(&piece) && differs(&piece)),
                    runs(len, unit, |piece| zero(&piece) && differs(&piece)),
                )
            }
            _ => (runs(len, unit, |piece| !are_zero(&data[piece])), Vec::new()),
        };
        let wanted: u64 = plain.iter().map(|run| run.len() as u64).sum();
        let mut packed = Vec::new();
        own.packed.clear();
        if let Some(packer) = own.packer.as_mut() {
            let packer = match packer {
                Ok(packer) => packer,
                Err(_) => {
                    return Err(own.packer.take().and_then(Result::err).unwrap_or(crate::Error::Cancelled));
                }
            };
            let room = (&mut own.packed, &mut own.padded);
            (packed, plain) = pack(packer, data, unit, &plain, room)?;
        }
        let (hosts, pieces) = self.in_turn(chunk, turns, || {
            for run in &zeroes {
                self.target.zero(chunk.offset + run.start as u64, run.len() as u64)?;
            }
            self.target.place(chunk.offset, &packed, &plain)
        })?;
        self.target.write(&own.packed, &one_behind_the_other(&packed, &hosts))?;
        self.target.write(data, &pieces)?;
        Ok(wanted)
    }

    /// Runs `work` when it is the chunk's turn, where there is an order. Gives nothing where the job has stopped.
    fn in_turn<T: Default>(
        &self,
        chunk: Chunk,
        turns: &Turns,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if !self.ordered {
            return work();
        }
        if !turns.wait(chunk.number) {
            return Err(crate::Error::Cancelled);
        }
        let result = work();
        turns.pass();
        result
    }

    /// Hides what the base has where the source has nothing.
    fn hide(&self, chunk: Chunk) -> Result<u64> {
        let Some(base) = self.base else { return Ok(0) };
        let (mut done, end) = (0, chunk.end().min(base.size()));
        let unit = self.target.unit() as u64;
        if chunk.offset < end {
            base.parts(chunk.offset, end - chunk.offset, |offset, len, kind| {
                if kind == ExtentKind::Data {
                    // A chunk is of whole units, so what is beside it in its unit is nothing, too.
                    let start = offset / unit * unit;
                    self.target.zero(start, offset + len - start)?;
                    done += len;
                }
                Ok::<_, crate::Error>(())
            })?;
        }
        Ok(done)
    }
}

/// Compresses units one behind the other, and gives where each was and how long it is now, and those that do not become
/// shorter.
#[expect(clippy::type_complexity, reason = "two lists")]
fn pack(
    packer: &mut Packer,
    data: &[u8],
    unit: usize,
    wanted: &[Range<usize>],
    (to, padded): (&mut Vec<u8>, &mut Vec<u8>),
) -> Result<(Vec<(usize, usize)>, Vec<Range<usize>>)> {
    let (mut packed, mut plain): (Vec<_>, Vec<Range<usize>>) = (Vec::new(), Vec::new());
    let failed = |error| vbd_core::Error::io("cannot compress", error);
    for start in wanted.iter().flat_map(|run| run.clone().step_by(unit)) {
        let part = start..(start + unit).min(data.len());
        let cluster = if part.len() == unit {
            &data[part.clone()]
        } else {
            // The disk ends within its last cluster, which is a whole one all the same.
            padded.clear();
            padded.extend_from_slice(&data[part.clone()]);
            padded.resize(unit, 0);
            padded.as_slice()
        };
        match (packer.pack(cluster, to).map_err(failed)?, plain.last_mut()) {
            (Some(len), _) => packed.push((start, len)),
            (None, Some(last)) if last.end == start => last.end = part.end,
            (None, _) => plain.push(part),
        }
    }
    Ok((packed, plain))
}

/// The pieces of what was packed: as long as they can be.
fn one_behind_the_other(packed: &[(usize, usize)], hosts: &[u64]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut at = 0;
    for ((_, len), host) in packed.iter().zip(hosts) {
        match pieces.last_mut() {
            Some(last) if last.to + last.from.len() as u64 == *host => last.from.end += len,
            _ => pieces.push(Piece { from: at..at + len, to: *host }),
        }
        at += len;
    }
    pieces
}
