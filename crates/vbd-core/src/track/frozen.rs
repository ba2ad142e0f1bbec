//! A disk as it was at an instant, while guests write to it: read-only.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use vbd_ring::Local;

use super::aside::Aside;
use super::preserve::Preserve;
use super::{Named, Track, TrackError, check_new, position};
use crate::ask::Pending;
use crate::bitmap::Bitmap;
use crate::file::Backend;
use crate::{Capabilities, Channel, Error, ErrorKind, Geometry, Operation, Request, Result, Session};

/// What to freeze, and at what price.
pub struct Freeze<'a> {
    /// Only what is marked in this bitmap is wanted.
    pub since: Option<&'a str>,
    /// The bitmap `since` ends at the instant: it goes from the list, and comes back with [`Track::restore`].
    pub retire: bool,
    /// A bitmap that begins at the instant: name, granularity in bytes, and whether it is kept.
    pub start: Option<(&'a str, u64, bool)>,
    /// The bytes that are copied away at once before a write: a power of two.
    pub block: u64,
    /// What is wanted is widened to whole multiples of this many bytes, for readers that take no less.
    pub widen: u64,
    /// A file of [`Frozen::store_size`] bytes at least, for what is copied away and does not stay in memory.
    pub store: Arc<Backend>,
    /// The most bytes that are copied away and still needed.
    pub limit: u64,
    /// Bytes of memory that what is copied away may take: beyond half of it, it goes to the store.
    pub memory: u64,
    /// The longest that a write of a guest may be held up; for long ones, for each 16 MiB. After that the frozen disk
    /// fails, and the guest goes on.
    pub longest_delay: Duration,
}

/// A disk at an instant. Reading what was not wanted, or was let go, is an error.
///
/// A discard says that blocks are not needed any more: guests may overwrite them, and the store has room again.
pub struct Frozen {
    /// Keeps the disk, its lease and its bitmaps.
    session: Arc<dyn Session>,
    inner: Arc<dyn Session>,
    track: Arc<Track>,
    preserve: Arc<Preserve>,
    geometry: Geometry,
    wanted: Arc<Bitmap>,
}

impl Frozen {
    /// Freezes the disk of this session, which is a [`Tracked`](super::Tracked) one. Gives the bitmap that was retired, too.
    /// Blocks until the writes from before the instant have ended.
    ///
    /// # Errors
    /// The disk is frozen already, or has no bitmaps; and as for [`Track::switch`]. Everything is as it was then.
    pub fn new(session: &Arc<dyn Session>, freeze: &Freeze) -> Result<(Arc<Frozen>, Option<Named>)> {
        let none = || Error::new(ErrorKind::Unsupported, "the disk has no bitmaps, so it cannot be frozen");
        let track = session.track().ok_or_else(none)?.clone();
        let inner = track.inner().ok_or_else(none)?;
        let changing = track.change_lock();
        let mut geometry = inner.geometry();
        geometry.size = geometry.size.min(track.state().size);
        // Made before anything changes.
        let failed = |error: TrackError| {
            let kind =
                if matches!(error, TrackError::Busy) { ErrorKind::Busy } else { ErrorKind::Unsupported };
            Error::new(kind, error.to_string())
        };
        let todo = Bitmap::new(geometry.size, freeze.block).map_err(|error| failed(error.into()))?;
        if freeze.store.size() < Self::store_size(geometry.size, freeze.block) {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "the file for what is overwritten is smaller than the disk",
            ));
        }
        let aside = Aside::new(freeze.block, freeze.memory);
        let (store, limit, delay) = (freeze.store.clone(), freeze.limit, freeze.longest_delay);
        let preserve = Arc::new(Preserve::new(geometry.size, store, aside, limit, delay));
        let mut old = None;
        track.state().take_on(&preserve).map_err(failed)?;
        let changed = track.change_locked(&changing, |size, named| {
            if let Some(name) = freeze.since {
                let index = position(named, name)?;
                old = Some(named[index].clone());
                if freeze.retire {
                    named.remove(index);
                } else if named[index].enabled {
                    // What is marked from now on is none of this backup's.
                    let fresh = Bitmap::new(size, named[index].bitmap.granularity())?;
                    named[index].bitmap = Arc::new(fresh);
                }
            }
            if let Some((name, granularity, persistent)) = freeze.start {
                check_new(name, named)?;
                named.push(Named::empty(name, size, granularity, persistent)?);
            }
            Ok(())
        });
        if let Err(error) = changed {
            preserve.end();
            track.thaw(&preserve);
            return Err(failed(error));
        }
        match &old {
            Some(old) => {
                let widen = freeze.widen.max(1);
                for run in old.bitmap.runs(0..geometry.size) {
                    let start = run.start / widen * widen;
                    todo.mark(start, run.end.next_multiple_of(widen) - start);
                }
            }
            None => todo.mark_all(),
        }
        if let Some(old) = old.as_ref().filter(|old| !freeze.retire && old.enabled)
            && let Ok(fresh) = track.bitmap(&old.name)
        {
            fresh.merge(&old.bitmap);
        }
        let wanted = todo.resized(geometry.size).map_err(|error| failed(error.into()))?;
        let frozen = Frozen {
            session: session.clone(),
            inner,
            track: track.clone(),
            preserve,
            geometry,
            wanted: Arc::new(wanted),
        };
        frozen.preserve.begin(todo)?;
        Ok((Arc::new(frozen), old.filter(|_| freeze.retire)))
    }

    /// How long the [store](Freeze::store) has to be for a disk of `size` bytes that is copied away in blocks of `block`.
    pub fn store_size(size: u64, block: u64) -> u64 {
        Aside::most(block, size)
    }

    /// How many requests guests have made since the instant: where this stands still, nobody is waiting.
    pub fn requests(&self) -> u64 {
        self.preserve.requests()
    }

    /// The blocks that are wanted.
    pub fn wanted(&self) -> &Arc<Bitmap> {
        &self.wanted
    }

    /// Bytes that were copied away and are still needed.
    pub fn kept_bytes(&self) -> u64 {
        self.preserve.kept_bytes()
    }

    /// An error where the frozen disk has failed: what was read of it until now is good, the rest is lost.
    ///
    /// # Errors
    /// Why.
    pub fn check(&self) -> Result<()> {
        self.preserve.check()
    }

    /// The session of the disk that goes on.
    pub fn session(&self) -> &Arc<dyn Session> {
        &self.session
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.preserve.end();
        self.track.thaw(&self.preserve);
    }
}

impl Session for Frozen {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { read_only: true, grow: false, ..self.inner.capabilities() }
    }

    fn channel(self: Arc<Self>, local: &Local) -> Result<Rc<dyn Channel>> {
        let disk = self.inner.clone().channel(local)?;
        let store = self.preserve.store(local);
        Ok(Rc::new(FrozenChannel { frozen: self, disk, store, local: local.clone() }))
    }

    fn grow(&self, _size: u64) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "a disk as it was does not grow"))
    }
}

struct FrozenChannel {
    frozen: Arc<Frozen>,
    disk: Rc<dyn Channel>,
    store: Rc<dyn Channel>,
    local: Local,
}

impl Channel for FrozenChannel {
    fn submit(self: Rc<Self>, mut request: Request) {
        match request.operation {
            Operation::Flush => return request.complete(Ok(())),
            Operation::Write | Operation::WriteZeroes => {
                return request.fail(Error::new(ErrorKind::ReadOnly, "the disk as it was cannot be changed"));
            }
            Operation::Read | Operation::Extents | Operation::Discard => {}
        }
        let local = self.local.clone();
        request.issued_at = Some(local.now());
        local.spawn(async move {
            let FrozenChannel { frozen, disk, store, local } = &*self;
            let mut pending = Pending::new(request);
            let request = pending.request();
            let result = if request.operation == Operation::Discard {
                frozen.preserve.let_go(store, local, request.offset, request.len).await;
                Ok(())
            } else {
                frozen.preserve.look(disk, store, local, request).await
            };
            pending.complete(result);
        });
    }

    fn cancel_waiting(&self) {
        self.disk.cancel_waiting();
    }
}
