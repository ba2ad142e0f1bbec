//! Committing: what an image holds is written to the one behind it, while guests go on.
//!
//! The image behind is opened for writing in the exclusive state, in place of the session that only reads. Then all that the
//! image holds is copied, and what guests have written meanwhile again and again (a bitmap of the disk's says what), until
//! little is left. That is copied in the exclusive state: the image behind has the disk's content of one instant, and is
//! flushed. Only then the image gets an empty L1 table, by a change of one sector of its header. Until that is durable it
//! holds what it held, and afterwards it reads the same from the image behind: whatever interrupts this, the disk's
//! content is whole.

use std::sync::Arc;

use vbd_core::ask::{Ask, ask};
use vbd_core::bitmap::{Bitmap, DEFAULT_GRANULARITY};
use vbd_core::memory::Buffer;
use vbd_core::track::{Track, TrackError};
use vbd_core::{Commit, Disk, Error, ErrorKind, Flags, Operation, Result, Watch};

use super::channel::Qcow2Channel;
use super::flatten::{CHUNK, STRIDE, Step, runs};
use super::image::Image;
use super::io::{Io, Part, all, bytes};
use super::map::{L1, Span};
use super::read::Target;
use super::session::Qcow2Session;
use super::snapshot::Alone;
use super::walk::Walk;
use super::worker::Worker;
use crate::format::{L1Entry, at};

/// What may be left to be copied while guests wait, in bytes.
const FEW: u64 = 4 << 20;
/// How often guests may have written nearly as much again as was copied before that is given up.
const PATIENCE: u32 = 16;
/// The unit in which zeroes are told from data, in bytes.
const UNIT: usize = 4096;

impl Qcow2Session {
    /// Writes what the image holds to the one behind it, which is opened for that, and empties it.
    pub(super) fn commit_while_served(&self, commit: Commit, watch: &dyn Watch) -> Result<u64> {
        let image = self.image();
        image.check_stands_on_something()?;
        let Some(track) = commit.track else {
            let message = "nothing notes which parts of the disk are written to meanwhile";
            return Err(Error::new(ErrorKind::Unsupported, message));
        };
        let Some(reader) = self.shared().backing().clone() else {
            return Err(Error::new(ErrorKind::Unsupported, "stands on no other image"));
        };
        let worker = Worker::new(image)?;
        let (into, again) = (commit.into, reader.clone());
        worker.run(move |channel| async move {
            let image = channel.image.clone();
            let alone = Alone::new(&image, &channel.io).await?;
            let opened = image.exchange_below(&channel.io, &alone, move || into.open().map(Some)).await;
            let ready = match opened {
                Ok(()) => image.grow_below(&channel.io, &alone, image.size()).await,
                refused => refused,
            };
            if ready.is_err() {
                // Before guests go on: they read from it.
                image.read_below(&channel.io, &alone, again).await?;
            }
            ready
        })?;
        let done = self.merge(&worker, &track, watch);
        // Whatever has happened: nobody writes there any more.
        let back = worker.run(move |channel| async move {
            let image = channel.image.clone();
            let alone = Alone::new(&image, &channel.io).await?;
            image.read_below(&channel.io, &alone, reader).await
        });
        let written = done?;
        back?;
        watch.step("giving space back", 0);
        worker.run(|channel| async move { channel.image.reclaim_all(&channel.io).await })?;
        Ok(written)
    }

    fn merge(&self, worker: &Worker, track: &Arc<Track>, watch: &dyn Watch) -> Result<u64> {
        let image = self.image();
        let size = image.size();
        let mut marks = Marks::new(track)?;
        watch.step("committing", size);
        let everything = Bitmap::new(size, DEFAULT_GRANULARITY).map_err(|error| unable(&error))?;
        everything.mark_all();
        let mut written = copy_down(worker, &everything, size, watch)?;
        let (mut left, mut patience) = (u64::MAX, PATIENCE);
        loop {
            let marked = marks.current()?.marked_bytes();
            if marked <= FEW {
                break;
            }
            if marked > left / 4 * 3 {
                patience -= 1;
            }
            if patience == 0 {
                let message = "guests write as fast as the image behind takes it, so this comes to no end: nothing is lost; \
                               try again when they write less";
                return Err(Error::new(ErrorKind::Busy, message));
            }
            left = marked;
            let before = marks.next()?;
            watch.step("committing what was written meanwhile", marked);
            written += copy_down(worker, &before, image.size(), watch)?;
        }
        watch.step("flushing", 0);
        worker.run(|channel| async move { channel.flush_below().await })?;
        // Asked for the last time.
        watch.advance(0, 0)?;
        let (track, name) = (track.clone(), marks.name.clone());
        let rest = worker.run(move |channel| async move {
            let image = channel.image.clone();
            let alone = Alone::new(&image, &channel.io).await?;
            let marked = marked(&track, &name)?;
            channel.finish_commit(&alone, &marked, size).await
        })?;
        Ok(written + rest)
    }
}

/// Copies what is marked, a step at a time.
fn copy_down(worker: &Worker, marked: &Bitmap, size: u64, watch: &dyn Watch) -> Result<u64> {
    let mut written = 0;
    for run in marked.runs(0..size) {
        let (mut at, end) = (run.start, run.end.min(size));
        while at < end {
            let step =
                worker.run(move |channel| async move { channel.begin().await.copy_down(at, end).await })?;
            written += step.written;
            watch.advance(step.next - at, step.written)?;
            at = step.next;
        }
    }
    Ok(written)
}

/// Bitmaps of what guests write, one after the other. The last goes with this.
struct Marks<'a> {
    track: &'a Arc<Track>,
    name: String,
    number: u32,
}

impl<'a> Marks<'a> {
    fn new(track: &'a Arc<Track>) -> Result<Self> {
        let name = name(0);
        track.add(&name, DEFAULT_GRANULARITY, false).map_err(|error| unable(&error))?;
        Ok(Marks { track, name, number: 0 })
    }

    fn current(&self) -> Result<Arc<Bitmap>> {
        marked(self.track, &self.name)
    }

    /// The marks until now; from now on others are made.
    fn next(&mut self) -> Result<Arc<Bitmap>> {
        let new = name(self.number + 1);
        let before = self.track.switch(Some(&self.name), Some((&new, DEFAULT_GRANULARITY, false)));
        let before = before.map_err(|error| unable(&error))?;
        (self.name, self.number) = (new, self.number + 1);
        before.map(|named| named.bitmap).ok_or_else(|| unable(&"a bitmap is gone"))
    }
}

impl Drop for Marks<'_> {
    fn drop(&mut self) {
        // Where writes do not end it stays, and is seen.
        let _ = self.track.remove(&self.name);
    }
}

fn name(number: u32) -> String {
    format!("vbd commit {number}")
}

fn marked(track: &Track, name: &str) -> Result<Arc<Bitmap>> {
    let named = track.named().into_iter().find(|named| named.name == name && named.enabled);
    let gone = || unable(&TrackError::Unknown(name.to_owned()));
    named.map(|named| named.bitmap).ok_or_else(gone)
}

fn unable(error: &dyn std::fmt::Display) -> Error {
    Error::new(ErrorKind::Busy, format!("what guests write meanwhile cannot be noted: {error}"))
}

impl Qcow2Channel {
    /// Writes some of what the image holds of a range to the one behind it.
    async fn copy_down(&self, from: u64, end: u64) -> Result<Step> {
        let (l1, end) = (self.l1(), end.min(from + STRIDE));
        let mut step = Step { next: from, written: 0 };
        while step.next < end && step.written < CHUNK {
            let (span, len) = self.image.span(&self.io, &l1, step.next, end - step.next).await?;
            let len = match span {
                Span::Below => {
                    step.next += len;
                    continue;
                }
                Span::Bad(error) => return Err(self.image.corrupted(&self.io, &error.to_string())),
                Span::Zero { .. } => {
                    self.zero_below(step.next, len).await?;
                    len
                }
                Span::Data { .. } | Span::Compressed { .. } => {
                    let len = len.min(CHUNK);
                    self.copy_down_data(step.next, len).await?;
                    step.written += len;
                    len
                }
            };
            step.next += len;
        }
        Ok(step)
    }

    async fn copy_down_data(&self, offset: u64, len: u64) -> Result<()> {
        let buffer = Arc::new(Buffer::new(bytes(len)));
        let target = Target { memory: vec![buffer.whole()], guard: Some(buffer.clone()) };
        self.read_range(offset, len, &target).await?;
        let mut writes: Vec<Part> = Vec::new();
        let Some(below) = self.below() else { return Err(Error::new(ErrorKind::Io, "nothing is behind it")) };
        for run in runs(&buffer, UNIT, true) {
            let memory = vec![buffer.piece(run.start, run.end - run.start)];
            let (to, guard) = (offset + run.start as u64, Some(buffer.clone() as vbd_core::Guard));
            writes.push(Box::pin(self.io.transfer(&below, Operation::Write, to, memory, guard)));
        }
        all(writes).await?;
        for run in runs(&buffer, UNIT, false) {
            self.zero_below(offset + run.start as u64, (run.end - run.start) as u64).await?;
        }
        Ok(())
    }

    /// Makes a range of the image behind read as zeroes.
    async fn zero_below(&self, mut offset: u64, mut len: u64) -> Result<()> {
        let most = self.image.below.session().map_or(0, |below| below.geometry().max_zeroes);
        let most = if most == 0 { u64::MAX } else { most };
        let Some(below) = self.below() else { return Err(Error::new(ErrorKind::Io, "nothing is behind it")) };
        while len > 0 {
            let part = len.min(most);
            let flags = Flags { may_unmap: true, ..Flags::default() };
            self.io.plain(&below, Operation::WriteZeroes, (offset, part), flags).await?;
            offset += part;
            len -= part;
        }
        Ok(())
    }

    /// Makes durable what was written to the image behind.
    async fn flush_below(&self) -> Result<()> {
        let Some(below) = self.below() else { return Ok(()) };
        ask(&below, Ask::flush(), self.io.local.now()).await.map(drop)
    }

    /// Copies the rest, while nobody uses the disk, and empties the image: the bytes that were written. `size` is what the
    /// disk had when all of it was copied.
    async fn finish_commit(&self, alone: &Alone, marked: &Bitmap, size: u64) -> Result<u64> {
        let (image, io) = (&self.image, &self.io);
        // Again: one may have been made meanwhile.
        image.check_stands_on_something()?;
        image.grow_below(io, alone, image.size()).await?;
        let mut rest: Vec<_> = marked.runs(0..image.size().min(marked.size())).collect();
        // What is new of a disk that has grown was perhaps made to read as zeroes without a write.
        rest.push(size..image.size());
        let mut written = 0;
        for run in rest {
            let (mut at, end) = (run.start, run.end.min(image.size()));
            while at < end {
                let step = self.copy_down(at, end).await?;
                (at, written) = (step.next, written + step.written);
            }
        }
        self.flush_below().await?;
        image.empty(io, alone).await?;
        Ok(written)
    }
}

impl Image {
    /// Has the image behind open for reading again.
    async fn read_below(&self, io: &Io, alone: &Alone, reader: Arc<dyn Disk>) -> Result<()> {
        let back = self.exchange_below(io, alone, move || reader.open().map(Some)).await;
        back.inspect_err(|error| {
            tracing::error!("{}: the image behind is not open for reading again: {error}", self.label);
        })
    }

    /// Has the image hold nothing. What it held is given back later.
    async fn empty(self: &Arc<Self>, io: &Io, alone: &Alone) -> Result<()> {
        let old: Vec<L1Entry> = self.l1().entries().collect();
        let mut given_up: Vec<u64> = Vec::new();
        let mut walk = Walk::active(self, io, &old);
        while let Some(visit) = walk.next().await? {
            given_up.extend(visit.clusters(self, io)?.into_iter().flatten());
            walk.done(visit);
        }
        let (offset, len) = {
            let header = self.header();
            (header.l1_offset, header.l1_bytes())
        };
        let first = offset >> self.layout.cluster_bits;
        given_up.extend(first..first + self.layout.clusters(len));
        let entries = vec![L1Entry(0); old.len()];
        let run = self.write_l1_copy(io, &entries, alone).await?;
        let place = run.start << self.layout.cluster_bits;
        let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        let fields = [&count.to_be_bytes()[..], &place.to_be_bytes()[..]].concat();
        self.switch(io, at::L1, &fields).await?;
        {
            let mut header = self.header();
            (header.l1_entries, header.l1_offset) = (count, place);
        }
        self.tables.clear();
        self.set_l1(L1::new(entries.iter().map(|entry| entry.0)));
        self.pending().reclaimable.append(&mut given_up);
        self.progress.changed();
        Ok(())
    }
}
