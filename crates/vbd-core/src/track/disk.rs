//! A disk whose changes are tracked.

use std::rc::Rc;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use vbd_ring::Local;
use vbd_ring::sync::{Condvar, Mutex, MutexGuard};

use super::channel::TrackChannel;
use super::{Track, TrackError};
use crate::{
    Capabilities, Channel, Commit, Disk, Error, ErrorKind, Event, Geometry, LayerExtent, Live, Result,
    Session, Snapshot, Statistics, Watch,
};

/// How long closing may take before whoever waits for it goes on.
const CLOSE_WITHIN: Duration = Duration::from_secs(60);

/// Keeps bitmaps from one session to the next.
pub trait Keeper: Send + Sync {
    /// The disk has been opened, and has no channel yet: brings the bitmaps back. Before it returns, what is kept says
    /// durably that it is in use.
    ///
    /// # Errors
    /// The disk must not be written to; it is closed again.
    fn opened(&self, session: &dyn Session, track: &Arc<Track>) -> Result<()>;

    /// The list of bitmaps has changed while the disk is open.
    ///
    /// # Errors
    /// It cannot be kept.
    fn changed(&self, session: &dyn Session, track: &Track) -> Result<()>;

    /// Whether [`closed`](Self::closed) has something to do.
    fn has_work(&self, track: &Track) -> bool;

    /// The last channel is gone: keeps the bitmaps. Everything has been written; it is not flushed. May block.
    fn closed(&self, session: &dyn Session, track: &Track);
}

/// A disk with bitmaps in front.
pub struct Tracked {
    disk: Arc<dyn Disk>,
    inside: Arc<Inside>,
}

struct Inside {
    keeper: Option<Box<dyn Keeper>>,
    state: Mutex<State>,
    closed: Condvar,
    /// Of the session there is: apart from the state, which whoever opens the disk holds for as long as that takes.
    track: Mutex<Weak<Track>>,
}

#[derive(Default)]
struct State {
    session: Weak<TrackedSession>,
    /// There is a session, or one is being closed.
    open: bool,
}

impl Inside {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a session that is being closed.
    fn wait<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while state.open && state.session.strong_count() == 0 {
            let (next, late) =
                self.closed.wait_timeout(state, CLOSE_WITHIN).unwrap_or_else(PoisonError::into_inner);
            state = next;
            if late.timed_out() {
                break;
            }
        }
        state
    }

    fn end(&self) {
        self.state().open = false;
        self.closed.notify_all();
    }
}

impl Tracked {
    /// Puts bitmaps in front of `disk`; `keeper` keeps them between sessions.
    pub fn new(disk: Arc<dyn Disk>, keeper: Option<Box<dyn Keeper>>) -> Arc<Self> {
        let inside =
            Inside { keeper, state: Mutex::default(), closed: Condvar::new(), track: Mutex::default() };
        Arc::new(Tracked { disk, inside: Arc::new(inside) })
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        // The process may end next.
        drop(self.inside.wait(self.inside.state()));
    }
}

impl Disk for Tracked {
    fn name(&self) -> &str {
        self.disk.name()
    }

    fn open(&self) -> Result<Arc<dyn Session>> {
        let mut state = self.inside.wait(self.inside.state());
        if let Some(session) = state.session.upgrade() {
            return Ok(session);
        }
        if state.open {
            let message = "is still being closed: the storage takes too long to take its bitmaps";
            return Err(Error::new(ErrorKind::Busy, message).of(self.name()));
        }
        let inner = self.disk.open()?;
        let track = Track::new(inner.geometry().size);
        let _ = track.inner.set(Arc::downgrade(&inner));
        let writable = !inner.capabilities().read_only;
        if let Some(keeper) = self.inside.keeper.as_ref().filter(|_| writable) {
            keeper.opened(&*inner, &track)?;
        }
        *self.inside.track.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&track);
        let session =
            Arc::new(TrackedSession { session: Some(inner), track, inside: self.inside.clone(), writable });
        state.session = Arc::downgrade(&session);
        state.open = true;
        Ok(session)
    }

    fn inspect(&self) -> Result<(Geometry, Capabilities)> {
        self.disk.inspect()
    }

    fn statistics(&self) -> &Statistics {
        self.disk.statistics()
    }

    fn track(&self) -> Option<Arc<Track>> {
        self.inside.track.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }

    fn watch(&self, watcher: Box<dyn Fn(Event) + Send + Sync>) -> Arc<dyn Send + Sync> {
        self.disk.watch(watcher)
    }
}

struct TrackedSession {
    /// There until the end.
    session: Option<Arc<dyn Session>>,
    track: Arc<Track>,
    inside: Arc<Inside>,
    writable: bool,
}

impl TrackedSession {
    fn inner(&self) -> &Arc<dyn Session> {
        self.session.as_ref().expect("there until it is dropped")
    }

    fn inner_live(&self) -> Result<&dyn Live> {
        let none = || Error::new(ErrorKind::Unsupported, "the format has no snapshots");
        self.inner().live().ok_or_else(none)
    }
}

fn failed(error: &TrackError) -> Error {
    Error::new(ErrorKind::Unsupported, error.to_string())
}

impl Session for TrackedSession {
    fn geometry(&self) -> Geometry {
        self.inner().geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner().capabilities()
    }

    fn channel(self: Arc<Self>, local: &Local) -> Result<Rc<dyn Channel>> {
        let inner = self.inner().clone().channel(local)?;
        Ok(TrackChannel::new(&self.track.clone(), inner, local, self))
    }

    fn grow(&self, size: u64) -> Result<()> {
        self.track.grow(size).map_err(|error| failed(&error))?;
        self.inner().grow(size)
    }

    fn keeps_unflushed(&self) -> bool {
        self.inner().keeps_unflushed()
    }

    fn live(&self) -> Option<&dyn Live> {
        self.inner().live().map(|_| self as &dyn Live)
    }

    fn track(&self) -> Option<&Arc<Track>> {
        Some(&self.track)
    }

    fn keep_bitmaps(&self) -> Result<()> {
        match &self.inside.keeper {
            Some(keeper) => keeper.changed(&**self.inner(), &self.track),
            None => {
                let message = "the format has no place for bitmaps: they go when the disk is closed";
                Err(Error::new(ErrorKind::Unsupported, message))
            }
        }
    }
}

/// Passed on; what changes the content without a write is marked all the same.
impl Live for TrackedSession {
    fn snapshots(&self) -> Result<Vec<Snapshot>> {
        self.inner_live()?.snapshots()
    }

    fn create_snapshot(&self, name: &str) -> Result<Snapshot> {
        self.inner_live()?.create_snapshot(name)
    }

    fn apply_snapshot(&self, snapshot: &str) -> Result<()> {
        let live = self.inner_live()?;
        self.track.changes(0..u64::MAX, || live.apply_snapshot(snapshot)).map_err(|error| failed(&error))?
    }

    fn delete_snapshot(&self, snapshot: &str) -> Result<()> {
        self.inner_live()?.delete_snapshot(snapshot)
    }

    fn layer(&self, offset: u64, len: u64) -> Result<Vec<LayerExtent>> {
        self.inner_live()?.layer(offset, len)
    }

    fn compressed_unit(&self) -> Option<u64> {
        self.inner().live()?.compressed_unit()
    }

    fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<bool> {
        let live = self.inner_live()?;
        let range = offset..offset.saturating_add(data.len() as u64);
        self.track.changes(range, || live.write_compressed(offset, data)).map_err(|error| failed(&error))?
    }

    fn flatten(&self, watch: &dyn Watch) -> Result<u64> {
        self.inner_live()?.flatten(watch)
    }

    fn commit(&self, commit: Commit, watch: &dyn Watch) -> Result<u64> {
        let track = Some(self.track.clone());
        self.inner_live()?.commit(Commit { track, ..commit }, watch)
    }

    fn compact(&self, watch: &dyn Watch) -> Result<(u64, u64)> {
        self.inner_live()?.compact(watch)
    }
}

impl Drop for TrackedSession {
    fn drop(&mut self) {
        let Some(session) = self.session.take() else { return };
        let (inside, track) = (self.inside.clone(), self.track.clone());
        let works = self.writable && inside.keeper.as_ref().is_some_and(|keeper| keeper.has_work(&track));
        if !works {
            drop(session);
            return inside.end();
        }
        let closing = Closing { session: Some(session), track, inside };
        // The last owner may be a channel on a reactor, whose other disks must not wait for this one's files. Where there
        // is no thread to be had, the work is dropped and so done here.
        let _ = vbd_ring::sync::thread::Builder::new().name("vbd-close".into()).spawn(move || drop(closing));
    }
}

/// Puts the bitmaps away, and then lets go of the disk, when it is dropped.
struct Closing {
    session: Option<Arc<dyn Session>>,
    track: Arc<Track>,
    inside: Arc<Inside>,
}

impl Drop for Closing {
    fn drop(&mut self) {
        if let (Some(session), Some(keeper)) = (self.session.take(), &self.inside.keeper) {
            keeper.closed(&*session, &self.track);
        }
        self.inside.end();
    }
}
