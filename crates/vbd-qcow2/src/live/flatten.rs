//! Flattening: what a disk reads from the images behind its own is copied into that, until it needs them no more.
//!
//! The image behind does not change. A part of it is read without a lock, and written with the lock of its clusters held,
//! if it is still missing then: whatever a guest has done meanwhile counts. When nothing is missing any more the image is
//! made to stand alone, while nobody uses it: by then all is durable, so the header may have the name of a backing file
//! or not, and both are right.

use std::sync::Arc;

use vbd_core::memory::Buffer;
use vbd_core::{Error, ErrorKind, ExtentKind, Result, Watch};

use super::channel::Qcow2Channel;
use super::image::Image;
use super::io::{Io, Part, all, bytes, corrupt};
use super::map::Span;
use super::read::Target;
use super::session::Qcow2Session;
use super::snapshot::Alone;
use super::worker::Worker;
use crate::format::Header;
use crate::rewrite::{header_steps, with_backing};

/// Bytes that are copied at once.
pub(super) const CHUNK: u64 = 1 << 20;
/// Bytes that are looked at at once, where little is copied.
pub(super) const STRIDE: u64 = 1 << 30;

/// How far one step of a long copy has come.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Step {
    /// Where the next begins.
    pub(super) next: u64,
    /// Bytes that were written.
    pub(super) written: u64,
}

impl Qcow2Session {
    /// Copies what is missing into the image, and has it stand alone.
    pub(super) fn flatten_while_served(&self, watch: &dyn Watch) -> Result<u64> {
        let image = self.image();
        image.check_stands_on_something()?;
        let worker = Worker::new(image)?;
        let end = image.size().min(image.backing_size());
        watch.step("copying", end);
        let (mut at, mut written) = (0, 0);
        while at < end {
            let step = worker.run(move |channel| async move {
                let busy = channel.begin().await;
                let step = busy.copy_up(at, end).await;
                busy.image.commit_if_much(&busy.io);
                step
            })?;
            written += step.written;
            watch.advance(step.next - at, step.written)?;
            at = step.next;
        }
        watch.step("flushing", 0);
        worker.run(|channel| async move {
            let image = channel.image.clone();
            // Most of what there is to flush, while guests go on.
            image.commit(&channel.io).await?;
            image.stand_alone(&channel.io).await
        })?;
        *self.shared().backing() = None;
        Ok(written)
    }
}

impl Image {
    /// An error where there is nothing to be copied from the image behind, or to it, or where that would harm.
    pub(super) fn check_stands_on_something(&self) -> Result<()> {
        let refused = |message: &str| Err(Error::new(ErrorKind::Unsupported, message));
        if self.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the image is open for reading only"));
        }
        self.check_writable()?;
        if self.below.session().is_none() {
            return refused("stands on no other image");
        }
        if self.header().snapshots > 0 {
            return refused(
                "its snapshots need what the images behind it hold now: delete them first, or convert the image",
            );
        }
        Ok(())
    }

    /// Takes the name of the backing file out of the header, and lets go of the image behind. Nothing may be missing.
    async fn stand_alone(self: &Arc<Self>, io: &Io) -> Result<()> {
        let alone = Alone::new(self, io).await?;
        // Again: one may have been made meanwhile.
        self.check_stands_on_something()?;
        let first = io.read(0, self.layout.cluster_len()).await?;
        let old = Header::parse(&first).map_err(|error| corrupt(error.to_string()))?;
        let new = with_backing(&old, None);
        let steps = header_steps(&old, &new).map_err(|error| Error::io("cannot change its header", error))?;
        for step in steps {
            let write = |(offset, content): (usize, Vec<u8>)| {
                let mut buffer = Buffer::new(content.len());
                buffer.bytes_mut().copy_from_slice(&content);
                io.write(offset as u64, buffer, Arc::new(()))
            };
            all(step.into_iter().map(write).collect()).await?;
            self.sync_file(io).await?;
        }
        *self.header() = new;
        self.exchange_below(io, &alone, || Ok(None)).await
    }
}

impl Qcow2Channel {
    /// Copies some of what is missing in a range.
    async fn copy_up(&self, from: u64, end: u64) -> Result<Step> {
        let (l1, end) = (self.l1(), end.min(from + STRIDE));
        let mut step = Step { next: from, written: 0 };
        let mut looked = 0;
        while step.next < end && looked < CHUNK {
            let (span, len) = self.image.span(&self.io, &l1, step.next, end - step.next).await?;
            match span {
                Span::Below => {}
                Span::Bad(error) => return Err(self.image.corrupted(&self.io, &error.to_string())),
                _ => {
                    step.next += len;
                    continue;
                }
            }
            let mut extents = Vec::new();
            self.extents_below(step.next, len, &mut extents).await?;
            let Some(first) = extents.first() else { break };
            if first.kind != ExtentKind::Data {
                step.next += first.len;
                continue;
            }
            let len = first.len.min(CHUNK);
            looked += len;
            step.written += self.copy_up_data(step.next, step.next + len).await?;
            step.next += len;
        }
        Ok(step)
    }

    /// Copies a range in whole units, but for those that are zeroes: these read the same without the image behind.
    async fn copy_up_data(&self, from: u64, end: u64) -> Result<u64> {
        let unit = self.image.layout.subcluster_size();
        let start = from / unit * unit;
        let end = end.next_multiple_of(unit).min(self.image.size());
        let buffer = Arc::new(Buffer::new(bytes(end - start)));
        let mut parts: Vec<Part> = Vec::new();
        let target = Target { memory: vec![buffer.whole()], guard: Some(buffer.clone()) };
        self.start_below(start, (0, end - start), &target, &mut parts);
        all(parts).await?;
        let mut written = 0;
        for run in runs(&buffer, bytes(unit), true) {
            let len = (run.end - run.start) as u64;
            let memory = vec![buffer.piece(run.start, run.end - run.start)];
            let source = Target { memory, guard: Some(buffer.clone()) };
            written += self.write_if_below(start + run.start as u64, len, &source).await?;
        }
        Ok(written)
    }
}

/// The runs of units of a buffer in which there is something but zeroes, or those in which there is not.
pub(super) fn runs(buffer: &Buffer, unit: usize, data: bool) -> Vec<std::ops::Range<usize>> {
    // SAFETY: what was read into it has ended, and what is written from it changes nothing.
    let content = unsafe { buffer.bytes() };
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (at, piece) in content.chunks(unit).enumerate() {
        if piece.iter().any(|byte| *byte != 0) != data {
            continue;
        }
        let (start, end) = (at * unit, at * unit + piece.len());
        match runs.last_mut() {
            Some(run) if run.end == start => run.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}
