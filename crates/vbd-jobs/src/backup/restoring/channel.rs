//! A queue's way to a disk that is being restored.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vbd_core::ask::{Ask, Pending, ask};
use vbd_core::memory::Buffer;
use vbd_core::{Channel, Error, ErrorKind, Extent, ExtentKind, Guard, Operation, Request, Result};
use vbd_ring::Local;

use super::Shared;
use crate::backup::Hash;
use crate::ranges::lock;

pub(super) struct RestoringChannel {
    shared: Arc<Shared>,
    image: Rc<dyn Channel>,
    local: Local,
    /// Keeps the session.
    _owner: Guard,
}

impl RestoringChannel {
    pub(super) fn new(shared: &Arc<Shared>, image: Rc<dyn Channel>, local: &Local, owner: Guard) -> Rc<Self> {
        Rc::new(RestoringChannel { shared: shared.clone(), image, local: local.clone(), _owner: owner })
    }

    /// The chunks of a request's range that have a mark.
    fn chunks(&self, marks: &vbd_core::bitmap::Bitmap, request: &Request) -> Vec<u64> {
        let chunk = marks.granularity();
        let end = request.offset.saturating_add(request.len);
        let runs = marks.runs(request.offset..end);
        runs.flat_map(|run| run.start / chunk..run.end.div_ceil(chunk)).collect()
    }

    async fn work(&self, request: &mut Request) -> Result<()> {
        match request.operation {
            Operation::Flush => self.record().await,
            Operation::Read => {
                for chunk in self.chunks(&self.shared.missing, request) {
                    self.bring(chunk).await?;
                }
                Ok(())
            }
            // Of what guests do not need, and what the store has: told as it is, or left as it is.
            Operation::Extents | Operation::Discard => Ok(()),
            Operation::Write | Operation::WriteZeroes => {
                for chunk in self.chunks(&self.shared.missing, request) {
                    if let Err(error) = self.bring(chunk).await {
                        self.give_up(chunk, request, error)?;
                    }
                }
                // Before a guest's bytes are in a chunk it is known, durably, that the store's are not to come again.
                self.record().await
            }
        }
    }

    /// A chunk that cannot be had is not needed where all of it is overwritten.
    fn give_up(&self, chunk: u64, request: &Request, error: Error) -> Result<()> {
        let range = self.shared.range(chunk);
        if request.offset > range.start || request.offset + request.len < range.end {
            return Err(error);
        }
        self.shared.missing.unmark(range.start, 1);
        lock(&self.shared.damaged).remove(&chunk);
        Ok(())
    }

    /// Copies a chunk into the image, unless it is there.
    async fn bring(&self, chunk: u64) -> Result<()> {
        let shared = &self.shared;
        let range = shared.range(chunk);
        let _alone = shared.locks.lock(range.clone()).await;
        if !shared.missing.is_marked(range.start) {
            return Ok(());
        }
        let fetching = shared.clone();
        // Reading, unpacking and hashing: other queues go on meanwhile.
        let buffer = self.local.unblock(move || fetching.fetch(chunk)).await?;
        let buffer = Arc::new(buffer);
        let write = Ask::transfer(Operation::Write, range.start, vec![buffer.whole()], Some(buffer.clone()));
        ask(&self.image, write, self.local.now()).await?;
        shared.missing.unmark(range.start, 1);
        Ok(())
    }

    /// Makes durable that the chunks in the image are its own, and everything else that has completed.
    async fn record(&self) -> Result<()> {
        let shared = &self.shared;
        // One at a time: others find nothing left to do.
        let _alone = shared.recording.lock(0..1).await;
        let done: Vec<u64> = shared.unrecorded();
        ask(&self.image, Ask::flush(), self.local.now()).await?;
        if done.is_empty() {
            return Ok(());
        }
        let recording = shared.clone();
        let result = self.local.unblock(move || recording.record(&done)).await;
        result.map_err(|error| Error::io("cannot write the journal of the restore", error))
    }

    /// Tells of content that is in the store; of the rest the image knows.
    async fn extents(&self, request: &mut Request) -> Result<()> {
        let (start, end) = (request.offset, request.offset.saturating_add(request.len));
        let next = self.shared.missing.next_run(start..end);
        match next {
            Some(Range { start: first, end }) if first <= start => {
                request.extents.push(Extent { len: end - start, kind: ExtentKind::Data });
            }
            _ => {
                let stop = next.map_or(end, |run| run.start);
                let question = Ask::new(Operation::Extents, start, stop - start);
                let mut left = stop - start;
                for mut extent in ask(&self.image, question, self.local.now()).await? {
                    extent.len = extent.len.min(left);
                    left -= extent.len;
                    if extent.len > 0 {
                        request.extents.push(extent);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Channel for RestoringChannel {
    fn submit(self: Rc<Self>, request: Request) {
        let shared = &self.shared;
        let concerns = !shared.complete.load(Ordering::Acquire)
            && match request.operation {
                Operation::Flush => true,
                Operation::Read | Operation::Extents => shared.missing.any(request.offset, request.len),
                _ => shared.pending.any(request.offset, request.len),
            };
        if !concerns {
            return self.image.clone().submit(request);
        }
        if request.operation == Operation::Discard {
            // Advice, which would cost more than it gives.
            return request.complete(Ok(()));
        }
        let local = self.local.clone();
        local.spawn(async move {
            let mut pending = Pending::new(request);
            let request = pending.request();
            if request.operation == Operation::Extents {
                let told = self.extents(request).await;
                return pending.complete(told);
            }
            match self.work(request).await {
                Ok(()) if request.operation == Operation::Flush => pending.complete(Ok(())),
                Ok(()) => self.image.clone().submit(pending.take()),
                Err(error) => pending.complete(Err(error)),
            }
        });
    }

    fn cancel_waiting(&self) {
        self.image.cancel_waiting();
    }
}

impl Shared {
    /// Reads a chunk from the store and compares it with its name. Blocks.
    fn fetch(&self, chunk: u64) -> Result<Buffer> {
        let index = usize::try_from(chunk).unwrap_or(usize::MAX);
        let hash = self.manifest.chunks.get(index).copied().unwrap_or(Hash::ZEROES);
        let len = self.manifest.len(index);
        let failed = |problem: String| {
            let first = lock(&self.damaged).insert(chunk, problem.clone()).is_none();
            if first {
                let at = self.range(chunk).start;
                tracing::error!("{}: {len} bytes at {at} cannot be restored: {problem}", self.name);
            }
            Error::new(ErrorKind::Io, problem)
        };
        let store = lock(&self.store).clone();
        let store = store.ok_or_else(|| failed("the store is not there any more".into()))?;
        let bytes = store.get(&hash, len).map_err(|error| failed(error.to_string()))?;
        let mut buffer = Buffer::new(len);
        buffer.bytes_mut().copy_from_slice(&bytes);
        // It may have come back.
        lock(&self.damaged).remove(&chunk);
        Ok(buffer)
    }
}
