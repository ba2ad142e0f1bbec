//! What was on a disk before a write: copied away while a backup needs it.

use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::sync::{Arc, OnceLock, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use vbd_ring::Local;
use vbd_ring::sync::Mutex;
use vbd_ring::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::ask::{Ask, ask};
use crate::bitmap::Bitmap;
use crate::file::Backend;
use crate::range_lock::RangeLocks;
use crate::{Channel, Error, ErrorKind, Extent, ExtentKind, Operation, Request, Result};

use super::aside::{Aside, Found};

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
    aside: Arc<Aside>,
    /// The most bytes that are copied away and still needed.
    limit: u64,
    kept_bytes: AtomicU64,
    /// What guests have asked since the instant.
    requests: AtomicU64,
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
    pub(super) fn new(
        size: u64,
        store: Arc<Backend>,
        aside: Arc<Aside>,
        limit: u64,
        longest_delay: Duration,
    ) -> Self {
        Preserve {
            size,
            store,
            aside,
            limit,
            kept_bytes: AtomicU64::new(0),
            requests: AtomicU64::new(0),
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
        self.aside.end();
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

    /// A guest has asked for something.
    pub(super) fn count_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// How much guests have asked for since the instant.
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Where memory for what is copied away runs short, has some of it written to the store.
    pub(super) fn make_room(self: &Arc<Self>, store: &Rc<dyn Channel>, local: &Local) {
        if !self.aside.is_short() {
            return;
        }
        let (this, store, inside) = (self.clone(), store.clone(), local.clone());
        local.spawn(async move {
            if let Err(error) = this.aside.spill(&store, &inside).await {
                this.fail(format!("what was overwritten cannot be kept: {error}"));
            }
        });
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
        self: &Arc<Self>,
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
        self: &Arc<Self>,
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
        self: &Arc<Self>,
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
        let block = wanted.todo.granularity();
        // The disk's last block takes a whole slot, too.
        let taken = len.next_multiple_of(block);
        if self.kept_bytes.fetch_add(taken, Ordering::Relaxed) + taken > self.limit {
            let message = format!(
                "more than {} bytes were overwritten before they could be saved; allow more",
                self.limit
            );
            return Err(Error::new(ErrorKind::NoSpace, message));
        }
        self.make_room(store, local);
        let room = self.aside.room(taken / block).await?;
        let (memory, guard) = room.memory();
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let (memory, _) = crate::memory::slice(&memory, 0, len, usize::MAX);
        ask(disk, Ask::transfer(Operation::Read, part.start, memory, Some(guard)), local.now()).await?;
        room.filled(part.start);
        wanted.kept.mark(part.start, part.end - part.start);
        wanted.todo.unmark(part.start, part.end - part.start);
        self.make_room(store, local);
        Ok(())
    }

    /// The next part of a range at the instant: where it is, and how long.
    fn part(&self, wanted: &Wanted, range: Range<u64>) -> (Place, u64) {
        let starts = |bitmap: &Bitmap| bitmap.next_run(range.clone()).filter(|run| run.start == range.start);
        if let Some(run) = starts(&wanted.kept) {
            return (Place::Aside, run.end - run.start);
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
        match request.operation {
            Operation::Extents => self.tell(wanted, disk, local, request, end).await?,
            _ => self.fetch(wanted, disk, store, local, request, end).await?,
        }
        // Where it has failed meanwhile, a guest may have been let through.
        self.check()
    }

    /// What the start of a range consists of; it is locked.
    async fn tell(
        &self,
        wanted: &Wanted,
        disk: &Rc<dyn Channel>,
        local: &Local,
        request: &mut Request,
        end: u64,
    ) -> Result<()> {
        let at = request.offset;
        if at >= end {
            return Ok(());
        }
        let (place, len) = self.part(wanted, at..end);
        request.extents = match place {
            Place::Disk => ask(disk, Ask::new(Operation::Extents, at, len), local.now()).await?,
            Place::Gone => vec![Extent { len, kind: ExtentKind::Data }],
            Place::Aside => {
                let block = wanted.todo.granularity();
                let is_hole = |at| matches!(self.aside.find(at), Found::Zeroes);
                let (hole, mut stop) = (is_hole(at), (at / block + 1) * block);
                while stop < at + len && is_hole(stop) == hole {
                    stop += block;
                }
                let kind = if hole { ExtentKind::Hole } else { ExtentKind::Data };
                vec![Extent { len: stop.min(at + len) - at, kind }]
            }
        };
        // The disk may have told more than it was asked.
        let mut left = len;
        for extent in &mut request.extents {
            extent.len = extent.len.min(left);
            left -= extent.len;
        }
        Ok(())
    }

    /// Reads a range as it was; it is locked.
    async fn fetch(
        &self,
        wanted: &Wanted,
        disk: &Rc<dyn Channel>,
        store: &Rc<dyn Channel>,
        local: &Local,
        request: &mut Request,
        end: u64,
    ) -> Result<()> {
        let start = request.offset;
        let (mut aside, mut on_disk, mut at) = (Vec::new(), None, start);
        while at < end {
            let (place, len) = self.part(wanted, at..end);
            match place {
                Place::Aside => aside.push(at..at + len),
                Place::Disk => on_disk = Some((on_disk.map_or(at, |(first, _)| first), at + len)),
                Place::Gone => {
                    let message = format!("{len} bytes at {at} are not part of this backup, or were let go");
                    return Err(Error::new(ErrorKind::Unsupported, message));
                }
            }
            at += len;
        }
        // At once, with what was overwritten in between: that is put right afterwards.
        if let Some((first, last)) = on_disk {
            let pieces = part_of(request, first, last - first);
            let read = Ask::transfer(Operation::Read, first, pieces, request.guard.clone());
            ask(disk, read, local.now()).await?;
        }
        let block = wanted.todo.granularity();
        for run in aside {
            let mut at = run.start;
            while at < run.end {
                let mut stop = ((at / block + 1) * block).min(run.end);
                let skip = usize::try_from(at - start).unwrap_or(usize::MAX);
                let bytes = |stop| usize::try_from(stop - at).unwrap_or(usize::MAX);
                match self.aside.find(at) {
                    // SAFETY: the request's pieces are valid until it is completed, which is not before this returns.
                    Found::Zeroes => unsafe { crate::memory::zero(&request.memory, skip, bytes(stop)) },
                    Found::Memory(memory, from) => {
                        let flat = memory.piece(from, bytes(stop));
                        // SAFETY: the same; and the buffer is held.
                        unsafe { crate::memory::copy(flat, &request.memory, skip, true) };
                    }
                    Found::File(from) => {
                        // Neighbours were often overwritten one after the other.
                        while stop < run.end
                            && matches!(self.aside.find(stop), Found::File(next) if next.checked_sub(from) == Some(stop - at))
                        {
                            stop = (stop + block).min(run.end);
                        }
                        let pieces = part_of(request, at, stop - at);
                        let read = Ask::transfer(Operation::Read, from, pieces, request.guard.clone());
                        ask(store, read, local.now()).await?;
                    }
                }
                at = stop;
            }
        }
        Ok(())
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
        wanted.kept.unmark(start, end - start);
        let (bytes, empty) = self.aside.forget(start..end);
        self.kept_bytes.fetch_sub(bytes, Ordering::Relaxed);
        for part in empty {
            // Advice: where it is not taken, the file is as large as what was overwritten.
            let discard = Ask::new(Operation::Discard, part.start, part.end - part.start);
            let _ = ask(store, discard, local.now()).await;
        }
    }
}

/// The pieces of a request's memory for a part of its range.
fn part_of(request: &Request, offset: u64, len: u64) -> Vec<vbd_ring::IoVec> {
    let bytes = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    crate::memory::slice(&request.memory, bytes(offset - request.offset), bytes(len), usize::MAX).0
}

/// Where a block's content at the instant is.
enum Place {
    Aside,
    Disk,
    Gone,
}
