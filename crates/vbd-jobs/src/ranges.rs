//! A disk's range cut into pieces that threads take one after the other.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use vbd_core::{Client, ExtentKind};

use crate::{Error, Progress, Result};

/// A piece of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// How many came before it.
    pub(crate) number: u64,
    /// Its first byte.
    pub(crate) offset: u64,
    /// Its length in bytes.
    pub(crate) len: u64,
    /// Whether there may be anything but zeroes in it.
    pub(crate) data: bool,
}

impl Chunk {
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// Tells what is in a disk, from somewhere on.
pub(crate) trait Extents: Sync {
    /// At least one extent (bytes, whether it is data) from `offset` on, together at most `len` bytes.
    fn extents(&self, offset: u64, len: u64) -> Result<Vec<(u64, bool)>>;
}

impl Extents for Client {
    fn extents(&self, offset: u64, len: u64) -> Result<Vec<(u64, bool)>> {
        let extents = Client::extents(self, offset, len)?;
        Ok(extents.into_iter().map(|extent| (extent.len, extent.kind == ExtentKind::Data)).collect())
    }
}

/// Cuts a range into chunks: whole units, data at most `most` bytes at once and never across a multiple of that. A unit
/// with any data in it is data.
pub(crate) struct Chunks<'a> {
    disk: &'a dyn Extents,
    at: u64,
    end: u64,
    unit: u64,
    most: u64,
    number: u64,
    /// What is known: where it ends, and what it is.
    known: VecDeque<(u64, bool)>,
    /// Where the last of these ends.
    known_to: u64,
}

impl<'a> Chunks<'a> {
    /// Of `start..end`. `start` is a multiple of `unit`, and `most` too.
    pub(crate) fn new(disk: &'a dyn Extents, start: u64, end: u64, unit: u64, most: u64) -> Self {
        debug_assert!(unit > 0 && start.is_multiple_of(unit) && most.is_multiple_of(unit));
        Chunks { disk, at: start, end, unit, most, number: 0, known: VecDeque::new(), known_to: start }
    }

    /// What is at an offset, and up to where. Offsets never go back.
    fn known(&mut self, offset: u64) -> Result<(bool, u64)> {
        loop {
            while self.known.front().is_some_and(|(end, _)| *end <= offset) {
                self.known.pop_front();
            }
            if let Some((end, data)) = self.known.front() {
                return Ok((*data, *end));
            }
            self.known_to = self.known_to.max(offset);
            for (len, data) in self.disk.extents(self.known_to, self.end - self.known_to)? {
                self.known_to += len;
                match self.known.back_mut() {
                    Some(last) if last.1 == data => last.0 = self.known_to,
                    _ => self.known.push_back((self.known_to, data)),
                }
            }
        }
    }

    /// The end of the whole units before `end` of what is known; that of all at the disk's end.
    fn whole(&self, end: u64) -> u64 {
        if end >= self.end { self.end } else { end / self.unit * self.unit }
    }

    fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        let start = self.at;
        if start >= self.end {
            return Ok(None);
        }
        let (mut data, mut end) = self.known(start)?;
        let mut stop = self.whole(end);
        if data || stop <= start {
            let limit = (start / self.most + 1).saturating_mul(self.most).min(self.end);
            stop = start;
            while stop < limit {
                (data, end) = self.known(stop)?;
                if !data && self.whole(end) > stop {
                    break;
                }
                // A unit that begins with a hole has data further on.
                let end = if data { end.next_multiple_of(self.unit) } else { stop + self.unit };
                stop = end.min(limit);
            }
            data = true;
        }
        self.at = stop;
        self.number += 1;
        Ok(Some(Chunk { number: self.number - 1, offset: start, len: stop - start, data }))
    }
}

impl Iterator for Chunks<'_> {
    type Item = Result<Chunk>;

    fn next(&mut self) -> Option<Result<Chunk>> {
        let next = self.next_chunk();
        if next.is_err() {
            self.at = self.end;
        }
        next.transpose()
    }
}

/// Whose turn it is, where chunks are to be begun in order.
#[derive(Default)]
pub(crate) struct Turns {
    next: Mutex<u64>,
    changed: Condvar,
    stopped: AtomicBool,
}

impl Turns {
    /// Waits until the chunks before this one have passed; false if the job has stopped meanwhile.
    pub(crate) fn wait(&self, number: u64) -> bool {
        let mut next = lock(&self.next);
        while *next != number && !self.stopped.load(Ordering::SeqCst) {
            next = self.changed.wait(next).unwrap_or_else(PoisonError::into_inner);
        }
        !self.stopped.load(Ordering::SeqCst)
    }

    /// Lets the next one come.
    pub(crate) fn pass(&self) {
        *lock(&self.next) += 1;
        self.changed.notify_all();
    }

    fn stop(&self) {
        let _next = lock(&self.next);
        self.stopped.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has several threads take chunks and work on them. Each makes what it needs for itself (buffers) with `own`. `work` gives
/// false to have no later chunks begun. Turns, where there are any, are stopped with the first failure.
pub(crate) fn each<W>(
    chunks: Chunks<'_>,
    threads: usize,
    turns: &Turns,
    progress: &dyn Progress,
    own: impl Fn() -> W + Sync,
    work: impl Fn(&mut W, Chunk) -> Result<bool> + Sync,
) -> Result<()>
where
{
    let chunks = Mutex::new(chunks);
    let failed = Mutex::new(None);
    let ended = AtomicBool::new(false);
    let fail = |error| {
        lock(&failed).get_or_insert(error);
        ended.store(true, Ordering::SeqCst);
        turns.stop();
    };
    let thread = || {
        let mut own = own();
        while !ended.load(Ordering::SeqCst) {
            if progress.is_cancelled() {
                return fail(Error::Cancelled);
            }
            let chunk = match lock(&chunks).next() {
                Some(Ok(chunk)) => chunk,
                Some(Err(error)) => return fail(error),
                None => return,
            };
            match work(&mut own, chunk) {
                Ok(true) => progress.advance(chunk.len),
                Ok(false) => ended.store(true, Ordering::SeqCst),
                Err(error) => return fail(error),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.max(1) {
            scope.spawn(thread);
        }
        thread();
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Below which offset every chunk is done.
pub(crate) struct Low(Mutex<(u64, BTreeMap<u64, u64>)>);

impl Low {
    pub(crate) fn new(start: u64) -> Self {
        Low(Mutex::new((start, BTreeMap::new())))
    }

    pub(crate) fn done(&self, chunk: Chunk) -> u64 {
        let mut state = lock(&self.0);
        let (low, later) = &mut *state;
        later.insert(chunk.offset, chunk.end());
        while let Some(entry) = later.first_entry().filter(|entry| entry.key() == low) {
            *low = entry.remove();
        }
        *low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk of pieces.
    struct Map(Vec<(u64, bool)>);

    impl Extents for Map {
        fn extents(&self, offset: u64, len: u64) -> Result<Vec<(u64, bool)>> {
            let mut start = 0;
            for (piece, data) in &self.0 {
                let end = start + piece;
                if offset < end {
                    return Ok(vec![((end - offset).min(len), *data)]);
                }
                start = end;
            }
            unreachable!("nobody asks beyond the end")
        }
    }

    fn cut(map: &[(u64, bool)], unit: u64, most: u64) -> Vec<(u64, u64, bool)> {
        let end = map.iter().map(|(len, _)| len).sum();
        let map = Map(map.to_vec());
        let chunks = Chunks::new(&map, 0, end, unit, most);
        chunks.map(|chunk| chunk.unwrap()).map(|chunk| (chunk.offset, chunk.len, chunk.data)).collect()
    }

    #[test]
    fn units_with_any_data_are_data_and_chunks_do_not_cross_their_bound() {
        assert_eq!(cut(&[(100, false)], 8, 32), [(0, 100, false)]);
        assert_eq!(cut(&[(70, true)], 8, 32), [(0, 32, true), (32, 32, true), (64, 6, true)]);
        // A byte of data in the middle of a hole.
        assert_eq!(
            cut(&[(13, false), (1, true), (50, false)], 8, 32),
            [(0, 8, false), (8, 8, true), (16, 48, false)]
        );
        // Many within one unit.
        assert_eq!(
            cut(&[(1, true), (2, false), (3, true), (2, false), (8, false)], 8, 16),
            [(0, 8, true), (8, 8, false)]
        );
        // A hole that is too short for a unit, then data across the bound.
        assert_eq!(
            cut(&[(4, true), (10, false), (20, true)], 8, 16),
            [(0, 16, true), (16, 16, true), (32, 2, true)]
        );
        assert_eq!(cut(&[], 8, 16), []);
    }

    #[test]
    fn every_cut_covers_all_in_order_and_loses_no_data() {
        let mut seed = 1u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for _ in 0..500 {
            let map: Vec<_> = (0..random(20)).map(|_| (1 + random(40), random(2) == 1)).collect();
            let unit = 1 << random(5);
            let chunks = cut(&map, unit, unit << random(4));
            let mut at = 0;
            for (offset, len, _) in &chunks {
                assert_eq!((*offset, *len > 0), (at, true), "{map:?} {unit}: {chunks:?}");
                at += len;
            }
            assert_eq!(at, map.iter().map(|(len, _)| len).sum::<u64>());
            let mut start = 0;
            for (len, data) in &map {
                let inside = |chunk: &&(u64, u64, bool)| chunk.0 < start + len && start < chunk.0 + chunk.1;
                assert!(
                    !data || chunks.iter().filter(inside).all(|chunk| chunk.2),
                    "{map:?} {unit}: {chunks:?}"
                );
                start += len;
            }
        }
    }

    #[test]
    fn the_low_mark_waits_for_the_chunk_that_is_late() {
        let low = Low::new(0);
        let chunk = |offset, len| Chunk { number: 0, offset, len, data: true };
        assert_eq!(low.done(chunk(10, 10)), 0);
        assert_eq!(low.done(chunk(20, 5)), 0);
        assert_eq!(low.done(chunk(0, 10)), 25);
        assert_eq!(low.done(chunk(25, 1)), 26);
    }
}
