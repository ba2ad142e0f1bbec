//! Bringing what has changed in memory to the disk, in an order that a power cut cannot turn into damage.
//!
//! One commit runs at a time; who needs one meanwhile waits for the next, which serves all who wait. Its steps:
//!
//! 1. Dirty pieces of L2 tables are copied, with the references that were given up before.
//! 2. Refcounts are written, which know of everything that those pieces lead to; then a sync, which makes guest data,
//!    tables' clusters and refcounts durable.
//! 3. The pieces are written, and L1 entries; where an L1 entry leads to a table whose cluster held something else, a
//!    sync comes between the two. Then a sync.
//! 4. The references given up are durably gone: their clusters go on to [`reclaim`](Image::reclaim).
//!
//! So an entry on disk leads to nothing that is not durable, and a refcount falls only when nothing on disk leads to its
//! cluster. What a power cut leaves behind is a cluster whose refcount is too high.

use std::collections::BTreeMap;
use std::sync::Arc;

use vbd_core::memory::Buffer;
use vbd_core::range_lock::{RangeGuard, RangeLocks};
use vbd_core::{Error, ErrorKind, Guard, Result};
use vbd_ring::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::counts::Freed;
use super::image::Image;
use super::io::{Io, Writes, all};
use super::map::{L1, PIECE, Table};

/// So many references given up are reason enough for a commit.
const MANY_FREED: usize = 4096;

/// How far changes have come.
#[derive(Default)]
pub(super) struct Progress {
    /// Counts changes of tables in memory.
    changes: AtomicU64,
    /// The changes that are durable.
    durable: AtomicU64,
    /// Counts those who asked for a commit, and those whom one has served.
    tickets: AtomicU64,
    served: AtomicU64,
    /// Held by the commit that runs, until its last write has ended.
    turn: Arc<RangeLocks>,
    /// Held by each task that gives clusters back, at its own number.
    reclaiming: Arc<RangeLocks>,
    reclaims: AtomicU64,
    /// A commit failed in a way that nothing mends.
    lost: AtomicBool,
    /// A commit was started because much has changed.
    started: AtomicBool,
}

impl Progress {
    /// Something has changed in memory, and is marked as dirty.
    pub(super) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether all that has changed is durable.
    pub(super) fn is_clean(&self) -> bool {
        self.durable.load(Ordering::SeqCst) == self.changes.load(Ordering::SeqCst)
    }

    /// An error where an earlier commit has failed.
    pub(super) fn check(&self) -> Result<()> {
        if self.lost.load(Ordering::SeqCst) {
            let message = "an earlier flush has failed, so writes may be lost; check the storage, then open the disk anew";
            return Err(Error::new(ErrorKind::FlushLost, message));
        }
        Ok(())
    }

    /// What is on disk is not known any more.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::SeqCst);
    }

    /// Whether nothing was ever changed.
    pub(super) fn is_untouched(&self) -> bool {
        self.changes.load(Ordering::SeqCst) == 0
    }
}

/// No commit runs while this lives, nor any write of one.
pub(super) struct Quiet(Guard);

impl Quiet {
    pub(super) async fn new(image: &Image) -> Self {
        Quiet(Arc::new(image.progress.turn.lock(0..1).await))
    }

    /// For a commit of one's own.
    pub(super) fn guard(&self) -> Guard {
        self.0.clone()
    }
}

/// What a commit has taken on; put back where it does not succeed.
struct Taken<'a> {
    image: &'a Image,
    l1: BTreeMap<u64, bool>,
    tables: Vec<(Arc<Table>, Vec<std::ops::Range<usize>>)>,
    freed: Vec<u64>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        for (table, runs) in &self.tables {
            runs.iter().cloned().flatten().for_each(|piece| table.dirty.mark(piece));
        }
        let mut pending = self.image.pending();
        for (index, needs_sync) in std::mem::take(&mut self.l1) {
            *pending.l1.entry(index).or_default() |= needs_sync;
        }
        pending.freed.append(&mut self.freed);
        for (table, runs) in self.tables.drain(..) {
            if !runs.is_empty() && !table.listed.swap(true, Ordering::SeqCst) {
                pending.tables.push(table);
            }
        }
    }
}

impl Image {
    /// Makes everything durable that had completed when this was called.
    ///
    /// # Errors
    /// What writing meets. Where there was no room the next commit may succeed; after any other failure none will.
    pub(super) async fn commit(self: &Arc<Self>, io: &Io) -> Result<()> {
        let progress = &self.progress;
        let ticket = progress.tickets.fetch_add(1, Ordering::SeqCst) + 1;
        loop {
            progress.check()?;
            let turn = progress.turn.lock(0..1).await;
            if progress.served.load(Ordering::SeqCst) >= ticket {
                return Ok(());
            }
            progress.check()?;
            self.commit_now(io, Arc::new(turn)).await?;
            self.start_reclaim(io);
        }
    }

    /// Commits; `turn` is given back when the last write has ended.
    pub(super) async fn commit_now(self: &Arc<Self>, io: &Io, turn: Guard) -> Result<()> {
        let progress = &self.progress;
        let changes = progress.changes.load(Ordering::SeqCst);
        let tickets = progress.tickets.load(Ordering::SeqCst);
        let notes = self.log.mark();
        let result = self.carry_out(io, &turn).await;
        match result {
            Ok(()) => {
                self.log.committed(notes);
                progress.durable.store(changes, Ordering::SeqCst);
                progress.served.store(tickets, Ordering::SeqCst);
                drop(turn);
                Ok(())
            }
            Err(error) => {
                if !matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Cancelled) {
                    progress.lost.store(true, Ordering::SeqCst);
                }
                Err(error.of(&self.label))
            }
        }
    }

    /// Takes on what is dirty of the mapping, with copies of it as it is now: pieces of L2 tables with their places in the
    /// file, and parts of the L1 table with those in the table.
    fn take_on(&self) -> (Taken<'_>, Vec<Part>, Vec<Part>) {
        let l1 = self.l1();
        let (mut taken, tables, parts) = {
            // With the lock, under which entries are set: what is set later must not reach the disk by this commit.
            let mut pending = self.pending();
            let parts = l1_parts(&l1, pending.l1.keys().copied());
            let taken = Taken {
                image: self,
                l1: std::mem::take(&mut pending.l1),
                tables: Vec::new(),
                freed: std::mem::take(&mut pending.freed),
            };
            (taken, std::mem::take(&mut pending.tables), parts)
        };
        let mut pieces = Vec::new();
        for table in tables {
            table.listed.store(false, Ordering::SeqCst);
            let runs = table.dirty.take();
            let offset = l1.get(table.index).offset();
            for run in &runs {
                let (from, buffer) = table.copy(&self.layout, run.clone());
                pieces.push((offset + from, buffer));
            }
            taken.tables.push((table, runs));
        }
        (taken, pieces, parts)
    }

    /// Writes entries that lead nowhere new, those whose flags alone have changed: in any order, and not durably. Nobody
    /// else uses the image.
    pub(super) async fn write_entries(&self, io: &Io, turn: &Guard) -> Result<()> {
        let (mut taken, pieces, l1_parts) = self.take_on();
        let offset = self.header().l1_offset;
        let mut writes = Writes::default();
        let l1_parts = l1_parts.into_iter().map(|(at, part)| (offset + at, part));
        for (offset, buffer) in pieces.into_iter().chain(l1_parts) {
            writes.add(buffer.len(), || io.write(offset, buffer, turn.clone())).await;
        }
        // Whatever was not written waits for a commit.
        writes.end().await.inspect_err(|_| self.progress.changed())?;
        taken.l1.clear();
        taken.tables.clear();
        Ok(())
    }

    async fn carry_out(&self, io: &Io, turn: &Guard) -> Result<()> {
        let (mut taken, pieces, l1_parts) = self.take_on();
        self.write_counts(io).await?;
        io.sync().await?;
        let changed = !pieces.is_empty() || !taken.l1.is_empty();
        all(pieces.into_iter().map(|(offset, buffer)| io.write(offset, buffer, turn.clone())).collect())
            .await?;
        if !taken.l1.is_empty() {
            if taken.l1.values().any(|needs_sync| *needs_sync) {
                self.sync_file(io).await?;
            }
            let offset = self.header().l1_offset;
            all(l1_parts.into_iter().map(|(at, part)| io.write(offset + at, part, turn.clone())).collect())
                .await?;
        }
        if changed {
            self.sync_file(io).await?;
        }
        taken.l1.clear();
        taken.tables.clear();
        let freed = std::mem::take(&mut taken.freed);
        if !freed.is_empty() {
            self.pending().reclaimable.extend(freed);
        }
        Ok(())
    }

    /// Gives clusters back whose last reference is durably gone, once nobody uses them, in a task of its own. Where
    /// somebody is alone with the image or about to be, that is left to them.
    fn start_reclaim(self: &Arc<Self>, io: &Io) {
        let number = self.progress.reclaims.fetch_add(1, Ordering::SeqCst);
        let Some(turn) = self.progress.reclaiming.try_lock(number..number + 1) else { return };
        let clusters = std::mem::take(&mut self.pending().reclaimable);
        if clusters.is_empty() {
            return;
        }
        // Made here: a task that is dropped before it begins is to put them back too.
        let freed = Freed::new(self, clusters);
        let (image, task) = (self.clone(), io.clone());
        io.local.spawn(async move {
            image.members.grace().await;
            if let Err(error) = image.reclaim(&task, freed).await {
                tracing::warn!("{}: cannot give space back now: {error}", image.label);
            }
            drop(turn);
        });
    }

    /// Gives back what waits for that, and waits until it is done, durably.
    pub(super) async fn reclaim_all(self: &Arc<Self>, io: &Io) -> Result<()> {
        // Those that others do are waited for as well.
        let turn = self.hold_reclaims().await;
        let freed = Freed::new(self, std::mem::take(&mut self.pending().reclaimable));
        self.members.grace().await;
        self.reclaim(io, freed).await?;
        drop(turn);
        self.progress.changed();
        self.commit(io).await
    }

    /// Waits for the tasks that give clusters back, and keeps others from being started.
    pub(super) async fn hold_reclaims(&self) -> RangeGuard {
        self.progress.reclaiming.lock(0..u64::MAX).await
    }

    /// Starts a commit where so much has changed that the next flush would take long, or memory is short.
    pub(super) fn commit_if_much(self: &Arc<Self>, io: &Io) {
        // Not with the other lock held: whoever notes takes it second.
        let long = self.log.is_long();
        let much = {
            let pending = self.pending();
            long || pending.freed.len() > MANY_FREED || pending.tables.len() > self.tables.bound()
        };
        if !much || self.progress.started.swap(true, Ordering::SeqCst) {
            return;
        }
        let (image, task) = (self.clone(), io.clone());
        io.local.spawn(async move {
            let result = image.commit(&task).await;
            image.progress.started.store(false, Ordering::SeqCst);
            if let Err(error) = result {
                error.log();
            }
        });
    }
}

/// Bytes on their way to the disk, and where they go.
type Part = (u64, Buffer);

/// The parts of the L1 table that these entries are in, as they are now, each with its place in the table (bytes).
fn l1_parts(l1: &L1, indices: impl Iterator<Item = u64>) -> Vec<Part> {
    let mut parts: Vec<u64> = indices.map(|index| index * 8 / PIECE as u64).collect();
    parts.dedup();
    let part = |part: u64| {
        let first = part * PIECE as u64 / 8;
        let count = (l1.len() as u64 - first).min(PIECE as u64 / 8);
        let mut buffer = Buffer::new(super::io::bytes(count * 8));
        for (index, bytes) in (first..).zip(buffer.bytes_mut().chunks_exact_mut(8)) {
            bytes.copy_from_slice(&l1.get(index).0.to_be_bytes());
        }
        (first * 8, buffer)
    };
    parts.into_iter().map(part).collect()
}
