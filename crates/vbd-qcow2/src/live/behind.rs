//! The image behind this one, which may become another while nobody uses it.

use std::rc::Rc;
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use vbd_core::{Capabilities, Channel, Error, ErrorKind, Geometry, Request, Result, Session};
use vbd_ring::Local;
use vbd_ring::sync::atomic::{AtomicU64, Ordering};
use vbd_ring::sync::{Mutex, MutexGuard};

use super::image::Image;
use super::io::Io;
use super::session::geometry;
use super::snapshot::Alone;

/// How long the last owner of an image behind may take to let go of it.
const LETTING_GO: Duration = Duration::from_secs(2);

/// The image behind.
pub(super) struct Behind {
    session: Mutex<Option<Arc<dyn Session>>>,
    /// How many bytes it has: 0 where there is none.
    size: AtomicU64,
}

impl Behind {
    pub(super) fn new(session: Option<Arc<dyn Session>>) -> Self {
        let size = AtomicU64::new(size_of(session.as_ref()));
        Behind { session: Mutex::new(session), size }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<dyn Session>>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its size in bytes.
    #[inline]
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// It, where there is one.
    pub(super) fn session(&self) -> Option<Arc<dyn Session>> {
        self.lock().clone()
    }

    /// A way to it.
    pub(super) fn channel(&self, local: &Local) -> Result<Option<Rc<dyn Channel>>> {
        // Not with the lock held: making one may take long.
        let session = self.session();
        session.map(|session| session.channel(local)).transpose()
    }

    fn set(&self, session: Option<Arc<dyn Session>>) {
        self.size.store(size_of(session.as_ref()), Ordering::Release);
        *self.lock() = session;
    }
}

fn size_of(session: Option<&Arc<dyn Session>>) -> u64 {
    session.map_or(0, |session| session.geometry().size)
}

impl Image {
    /// Puts what `open` gives behind the image in place of what is there, which is closed before. Where that fails
    /// there is [`Lost`] instead: nothing reads as if it were zeroes.
    pub(super) async fn exchange_below(
        &self,
        io: &Io,
        _alone: &Alone,
        open: impl FnOnce() -> Result<Option<Arc<dyn Session>>> + Send + 'static,
    ) -> Result<()> {
        self.members.leave_below().await;
        let before = self.below.lock().take();
        let size = self.below.size();
        let opened = io.local.unblock(move || {
            close(before)?;
            open()
        });
        let (now, result) = match opened.await {
            Ok(now) => (now, Ok(())),
            Err(error) => {
                let lost: Arc<dyn Session> = Arc::new(Lost { size });
                (Some(lost), Err(error))
            }
        };
        self.below.set(now);
        result
    }

    /// Has the image behind grow to this size at least. Nobody uses it.
    pub(super) async fn grow_below(&self, io: &Io, _alone: &Alone, size: u64) -> Result<()> {
        let Some(below) = self.below.session().filter(|below| below.geometry().size < size) else {
            return Ok(());
        };
        let grown = below.clone();
        io.local.unblock(move || grown.grow(size)).await?;
        self.below.set(Some(below));
        Ok(())
    }
}

/// Drops a session, and waits until its other owners have done so.
fn close(session: Option<Arc<dyn Session>>) -> Result<()> {
    let Some(session) = session else { return Ok(()) };
    let left: Weak<dyn Session> = Arc::downgrade(&session);
    drop(session);
    let until = Instant::now() + LETTING_GO;
    while left.strong_count() > 0 {
        if Instant::now() > until {
            return Err(Error::new(ErrorKind::Busy, "something else still uses the image behind"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn error() -> Error {
    let message = "the backing file was closed, and could not be opened again; stop and start the disk";
    Error::new(ErrorKind::Io, message)
}

/// In place of an image behind that could not be opened again: every request fails.
struct Lost {
    size: u64,
}

impl Session for Lost {
    fn geometry(&self) -> Geometry {
        geometry(self.size, 0, 512)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { read_only: true, write_cache: false, discard: false, fast_zeroes: false, grow: false }
    }

    fn channel(self: Arc<Self>, _: &Local) -> Result<Rc<dyn Channel>> {
        Ok(Rc::new(Missing))
    }

    fn grow(&self, _: u64) -> Result<()> {
        Err(error())
    }
}

/// The way to an image behind that is not there now.
pub(super) struct Missing;

impl Channel for Missing {
    fn submit(self: Rc<Self>, request: Request) {
        request.fail(error());
    }
}
