//! What was on a disk before a write: copied away while a backup needs it.

use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use vbd_ring::Local;

use crate::ask::{Ask, ask};
use crate::bitmap::Bitmap;
use crate::file::Backend;
use crate::memory::Buffer;
use crate::range_lock::RangeLocks;
use crate::{Channel, Error, ErrorKind, ExtentKind, Operation, Request, Result};

/// The most that is copied at once, in bytes: a power of two. What a request is longer waits step by step.
const STEP: u64 = 1 << 20;
/// For each of these in its length a request may be held up once more.
const LONG: u64 = 16 << 20;

/// What a backup needs of a disk's content.
pub(super) struct Wanted {
    /// Blocks whose content at the instant is needed and is still where it was.
    todo: Bitmap,
    /// Blocks whose content at the instant is in the store.
    kept: Bitmap,
}

/// A running copy-before-write.
pub(super) struct Preserve {
    pub(super) size: u64,
    store: Arc<Backend>,
    /// The most bytes in the store.
    limit: u64,
    kept_bytes: AtomicU64,
    longest_delay: Duration,
    locks: Arc<RangeLocks>,
    /// Known when the writes from before the instant have ended.
    wanted: OnceLock<Wanted>,
    waiting: Mutex<Vec<Waker>>,
    over: AtomicBool,
    failure: Mutex<Option<String>>,
}

impl Preserve {
    /// Nothing may be overwritten until [`begin`](Self::begin).
    pub(super) fn new(size: u64, store: Arc<Backend>, limit: u64, longest_delay: Duration) -> Self {
        Preserve {
            size,
            store,
            limit,
            kept_bytes: AtomicU64::new(0),
            longest_delay,
            locks: Arc::default(),
            wanted: OnceLock::new(),
            waiting: Mutex::default(),
            over: AtomicBool::new(false),
            failure: Mutex::default(),
        }
    }

    /// No write from before the instant is under way: these blocks are needed, in units of the bitmap.
    pub(super) fn begin(&self, todo: Bitmap) -> Result<()> {
        let kept = Bitmap::new(todo.size(), todo.granularity());
        let kept = kept.map_err(|error| Error::new(ErrorKind::Unsupported, error.to_string()))?;
        let _ = self.wanted.set(Wanted { todo, kept });
        self.wake();
        Ok(())
    }

    /// Nobody needs anything any more.
    pub(super) fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// The backup has failed, and guests go on; the first reason counts.
    pub(super) fn fail(&self, reason: impl Into<String>) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.is_none() && !self.over.load(Ordering::SeqCst) {
            let reason = reason.into();
            tracing::warn!("a backup fails: {reason}");
            *failure = Some(reason);
        }
        drop(failure);
        self.end();
    }

    /// An error where the backup has failed.
    pub(super) fn check(&self) -> Result<()> {
        if !self.over.load(Ordering::SeqCst) {
            return Ok(());
        }
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        let reason = failure.as_deref().unwrap_or("it has ended");
        Err(Error::new(ErrorKind::Cancelled, format!("the backup has failed: {reason}")))
    }

    fn wake(&self) {
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        waiting.into_iter().for_each(Waker::wake);
    }

    /// A way to the store.
    pub(super) fn store(&self, local: &Local) -> Rc<dyn Channel> {
        self.store.clone().channel(local, Arc::new(()))
    }

    /// Bytes in the store now.
    pub(super) fn kept_bytes(&self) -> u64 {
        self.kept_bytes.load(Ordering::Relaxed)
    }

    /// Whether a write to this range would destroy something.
    pub(super) fn concerns(&self, offset: u64, len: u64) -> bool {
        // The order matters: what is over may have let go of blocks.
        !self.over.load(Ordering::SeqCst)
            && self.wanted.get().is_none_or(|wanted| wanted.todo.any(offset, len))
    }

    /// The whole blocks of a range.
    fn blocks(&self, wanted: &Wanted, range: Range<u64>) -> Range<u64> {
        let block = wanted.todo.granularity();
        let end = range.end.min(self.size);
        range.start / block * block..end.next_multiple_of(block).min(self.size)
    }

    /// Waits until it is known what is wanted; none where it is over.
    async fn wanted(&self) -> Option<&Wanted> {
        poll_fn(|context| {
            if self.over.load(Ordering::SeqCst) {
                return Poll::Ready(None);
            }
            if let Some(wanted) = self.wanted.get() {
                return Poll::Ready(Some(wanted));
            }
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.push(context.waker().clone());
            drop(waiting);
            // Set since it was looked at.
            match (self.over.load(Ordering::SeqCst), self.wanted.get()) {
                (false, None) => Poll::Pending,
                (true, _) => Poll::Ready(None),
                (false, wanted) => Poll::Ready(wanted),
            }
        })
        .await
    }

    /// Copies away what a write to this range would destroy, for as long as a guest may be made to wait; after that the
    /// backup has failed. The write may then be done in any case.
    pub(super) async fn before(
        &self,
        disk: &Rc<dyn Channel>,
        store: &Rc<dyn Channel>,
        local: &Local,
        request: &Request,
    ) {
        let (offset, len) = (request.offset, request.len);
        let times = u32::try_from(1 + len / LONG).unwrap_or(u32::MAX);
        let longest = self.longest_delay.saturating_mul(times);
        let mut late = pin!(local.sleep(longest));
        let mut copying = pin!(self.copy_away(disk, store, local, offset, len));
        let result = poll_fn(|context| match copying.as_mut().poll(context) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            Poll::Pending => late.as_mut().poll(context).map(|()| None),
        });
        match result.await {
            Some(Ok(())) => {}
            Some(Err(error)) => self.fail(error.to_string()),
            None => self.fail(format!(
                "a write of the guest would have had to wait longer than {} ms; allow more, or back up when there is less to do",
                longest.as_millis()
            )),
        }
    }

    async fn copy_away(
        &self,
        disk: &Rc<dyn Channel>,
        store: &Rc<dyn Channel>,
        local: &Local,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let Some(wanted) = self.wanted().await else { return Ok(()) };
        let mut left = self.blocks(wanted, offset..offset.saturating_add(len));
        let step = STEP.max(wanted.todo.granularity());
        while let Some(run) = wanted.todo.next_run(left.clone()) {
            let run = run.start..run.end.min(run.start / step * step + step);
            left.start = run.end;
            // Against the backup's own reading, and other writes of the same block.
            let _alone = self.locks.lock(run.clone()).await;
            for part in wanted.todo.runs(run) {
                if self.over.load(Ordering::SeqCst) {
                    return Ok(());
                }
                self.copy_part(wanted, disk, store, local, part, len > STEP).await?;
            }
        }
        Ok(())
    }

    /// Copies blocks away; whoever calls has them locked.
    async fn copy_part(
        &self,
        wanted: &Wanted,
        disk: &Rc<dyn Channel>,
        store: &Rc<dyn Channel>,
        local: &Local,
        part: Range<u64>,
        look_for_holes: bool,
    ) -> Result<()> {
        let len = part.end - part.start;
        if look_for_holes {
            // Long requests are zeroes for the most part, and often of what is empty: the store is so already.
            let extents = ask(disk, Ask::new(Operation::Extents, part.start, len), local.now()).await?;
            if extents.first().is_some_and(|first| first.kind != ExtentKind::Data && first.len >= len) {
                wanted.kept.mark(part.start, len);
                wanted.todo.unmark(part.start, len);
                return Ok(());
            }
        }
        if self.kept_bytes.fetch_add(len, Ordering::Relaxed) + len > self.limit {
            let message = format!(
                "more than {} bytes were overwritten before they could be saved; allow more",
                self.limit
            );
            return Err(Error::new(ErrorKind::NoSpace, message));
        }
        let buffer = Arc::new(Buffer::new(usize::try_from(len).unwrap_or(usize::MAX)));
        for (channel, operation) in [(disk, Operation::Read), (store, Operation::Write)] {
            let transfer = Ask::transfer(operation, part.start, vec![buffer.whole()], Some(buffer.clone()));
            ask(channel, transfer, local.now()).await?;
        }
        wanted.kept.mark(part.start, len);
        wanted.todo.unmark(part.start, len);
        Ok(())
    }

    /// The next part of a range at the instant: where it is, and how long.
    fn part(&self, wanted: &Wanted, range: Range<u64>) -> (Place, u64) {
        let starts = |bitmap: &Bitmap| bitmap.next_run(range.clone()).filter(|run| run.start == range.start);
        if let Some(run) = starts(&wanted.kept) {
            return (Place::Store, run.end - run.start);
        }
        if let Some(run) = starts(&wanted.todo) {
            return (Place::Disk, run.end - run.start);
        }
        let next = |bitmap: &Bitmap| bitmap.next_run(range.clone()).map_or(range.end, |run| run.start);
        (Place::Gone, next(&wanted.kept).min(next(&wanted.todo)) - range.start)
    }

    /// Carries out a read or extents request for the disk as it was.
    pub(super) async fn look(
        &self,
        disk: &Rc<dyn Channel>,
        store: &Rc<dyn Channel>,
        local: &Local,
        request: &mut Request,
    ) -> Result<()> {
        let Some(wanted) = self.wanted().await else { return self.check() };
        let end = request.offset.checked_add(request.len).filter(|end| *end <= self.size);
        let Some(end) = end else {
            return Err(Error::new(ErrorKind::OutOfRange, format!("the disk ended at {}", self.size)));
        };
        let _alone = self.locks.lock(self.blocks(wanted, request.offset..end)).await;
        let mut at = request.offset;
        while at < end {
            let (place, len) = self.part(wanted, at..end);
            let channel = match place {
                Place::Store => store,
                Place::Disk => disk,
                Place::Gone if request.operation == Operation::Extents => {
                    request.extents.push(crate::Extent { len, kind: ExtentKind::Data });
                    break;
                }
                Place::Gone => {
                    let message = format!("{len} bytes at {at} are not part of this backup, or were let go");
                    return Err(Error::new(ErrorKind::Unsupported, message));
                }
            };
            if request.operation == Operation::Extents {
                request.extents = ask(channel, Ask::new(Operation::Extents, at, len), local.now()).await?;
                // The disk may have told more than it was asked.
                let mut left = len;
                for extent in &mut request.extents {
                    extent.len = extent.len.min(left);
                    left -= extent.len;
                }
                break;
            }
            let (skip, most) = (usize::try_from(at - request.offset), usize::try_from(len));
            let (skip, most) = (skip.unwrap_or(usize::MAX), most.unwrap_or(usize::MAX));
            let (pieces, _) = crate::memory::slice(&request.memory, skip, most, usize::MAX);
            let read = Ask::transfer(Operation::Read, at, pieces, request.guard.clone());
            ask(channel, read, local.now()).await?;
            at += len;
        }
        // Where it has failed meanwhile, a guest may have been let through.
        self.check()
    }

    /// The whole blocks of a range are not needed any more.
    pub(super) async fn let_go(&self, store: &Rc<dyn Channel>, local: &Local, offset: u64, len: u64) {
        let Some(wanted) = self.wanted().await else { return };
        let block = wanted.todo.granularity();
        let start = offset.next_multiple_of(block);
        let end = offset.saturating_add(len).min(self.size);
        let end = if end == self.size { end } else { end / block * block };
        if start >= end {
            return;
        }
        let _alone = self.locks.lock(start..end).await;
        wanted.todo.unmark(start, end - start);
        let kept: Vec<_> = wanted.kept.runs(start..end).collect();
        for run in kept {
            let len = run.end - run.start;
            wanted.kept.unmark(run.start, len);
            // Advice: where it is not taken, the store is as large as what was overwritten.
            if ask(store, Ask::new(Operation::Discard, run.start, len), local.now()).await.is_ok() {
                let less = |kept: u64| Some(kept.saturating_sub(len));
                let _ = self.kept_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            }
        }
    }
}

/// Where a block's content at the instant is.
enum Place {
    Store,
    Disk,
    Gone,
}
