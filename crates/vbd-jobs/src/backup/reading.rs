//! Reading a disk as it was, beside guests that go on.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vbd_core::bitmap::Bitmap;
use vbd_core::client::Buffer;
use vbd_core::track::Frozen;
use vbd_core::{Client, Session};
use vbd_ring::{Reactor, Settings};

use super::Cost;
use crate::ranges::{Chunk, Chunks, Extents, Turns, each, lock};
use crate::{Error, Progress, Result};

use std::sync::Arc;

/// What is read at once while guests ask for something, in bytes. Storage that does one request after the other answers
/// a guest only when this has passed.
const BESIDE_GUESTS: usize = 32 << 10;
/// How many times as long as a read took is waited before the next one, beside guests.
const PAUSE: u32 = 4;
/// Guests that have asked for nothing for this long are not in a hurry.
const QUIET: Duration = Duration::from_millis(100);
/// The longest pause between two reads.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// Where the content goes.
pub(super) trait Target: Sync {
    /// The bytes from `offset` on: one piece, all of it. Called from several threads.
    fn content(&self, offset: u64, buffer: &mut Buffer, len: usize) -> Result<()>;

    /// A part that is wanted and has no content: zeroes.
    fn empty(&self, offset: u64, len: u64) -> Result<()>;
}

/// Reads what is wanted of a disk, in pieces that begin at multiples of `piece` and have whole multiples of `unit`, and lets
/// go of it. Gives the bytes that were read.
pub(super) fn read(
    frozen: &Arc<Frozen>,
    unit: u64,
    piece: u64,
    cost: &Cost,
    target: &dyn Target,
    progress: &dyn Progress,
) -> Result<u64> {
    let size = frozen.geometry().size;
    let read = AtomicU64::new(0);
    let reactor = Reactor::spawn("vbd-backup", Settings::default());
    let reactor = reactor.map_err(Error::io("vbd-backup".as_ref(), "start a thread"))?;
    let client = Client::new(&reactor.handle(), frozen.clone())?;
    progress.step("reading", size);
    let wanted = frozen.wanted();
    let extents = Wanted { client: &client, bitmap: wanted };
    let pace = Pace::new(frozen);
    let work = || {
        // What guests wait for is done by reactors, which go first then.
        if let Err(error) = vbd_ring::yield_to_others() {
            tracing::debug!("the backup's threads have the priority of others: {error}");
        }
        let pieces = Chunks::new(&extents, 0, size, unit, piece);
        let own = || Buffer::new(usize::try_from(piece).unwrap_or(usize::MAX));
        each(pieces, cost.threads, &Turns::default(), progress, own, |buffer, piece| {
            if !piece.data {
                return pass(&client, wanted, piece, target);
            }
            let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
            pace.read(&client, piece.offset, buffer, len)?;
            read.fetch_add(piece.len, Ordering::Relaxed);
            target.content(piece.offset, buffer, len)?;
            Ok(true)
        })
    };
    // On a thread of its own, since there is no way back from its priority; those that it starts have the same.
    let done = std::thread::scope(|scope| scope.spawn(work).join());
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    frozen.check()?;
    Ok(read.into_inner())
}

/// A part of the disk without data: where it is wanted, it has become zeroes.
fn pass(client: &Client, wanted: &Bitmap, piece: Chunk, target: &dyn Target) -> Result<bool> {
    for run in wanted.runs(piece.offset..piece.end()) {
        target.empty(run.start, run.end - run.start)?;
        client.discard(run.start, run.end - run.start)?;
    }
    Ok(true)
}

/// What the disk consists of, as far as it is wanted.
struct Wanted<'a> {
    client: &'a Client,
    bitmap: &'a Bitmap,
}

impl Extents for Wanted<'_> {
    fn extents(&self, offset: u64, len: u64) -> Result<Vec<(u64, bool)>> {
        let end = offset + len;
        match self.bitmap.next_run(offset..end) {
            // What is not wanted is passed over like a hole; the caller tells them apart.
            None => Ok(vec![(len, false)]),
            Some(run) if run.start > offset => Ok(vec![(run.start - offset, false)]),
            Some(run) => Extents::extents(self.client, offset, run.end - offset),
        }
    }
}

/// Leaves guests the most of the storage while they use it.
struct Pace<'a> {
    frozen: &'a Frozen,
    /// What guests had asked for when it was looked at, and when that was something new.
    seen: Mutex<(u64, Instant)>,
    /// One at a time, beside guests.
    turn: Mutex<()>,
}

impl<'a> Pace<'a> {
    fn new(frozen: &'a Frozen) -> Self {
        Pace { frozen, seen: Mutex::new((0, Instant::now())), turn: Mutex::default() }
    }

    fn guests_are_busy(&self) -> bool {
        let requests = self.frozen.requests();
        let mut seen = lock(&self.seen);
        if seen.0 != requests {
            *seen = (requests, Instant::now());
        }
        seen.1.elapsed() < QUIET
    }

    /// Fills the start of the buffer, and lets go of what was read.
    fn read(&self, client: &Client, offset: u64, buffer: &mut Buffer, len: usize) -> Result<()> {
        let mut at = 0;
        while at < len {
            let is_busy = self.guests_are_busy();
            let stop = if is_busy { (at + BESIDE_GUESTS).min(len) } else { len };
            let turn = is_busy.then(|| lock(&self.turn));
            let began = Instant::now();
            client.read_part(offset + at as u64, buffer, at..stop)?;
            // Guests need not wait for it any more.
            client.discard(offset + at as u64, (stop - at) as u64)?;
            if turn.is_some() {
                // Most of the time the storage is the guests' alone, and so are the processors: what is not read is not
                // hashed, compressed and written either.
                std::thread::sleep((began.elapsed() * PAUSE).min(LONGEST_PAUSE));
            }
            at = stop;
        }
        Ok(())
    }
}
