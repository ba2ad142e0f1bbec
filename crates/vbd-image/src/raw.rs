//! The raw format: virtual range and file range are the same.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use vbd_core::file::{Backend, Cache, Faults, Options};
use vbd_core::{
    Capabilities, Channel, Disk, Error, ErrorKind, Event, Geometry, Reader, Result, Session, Statistics,
    Watchers,
};
use vbd_ring::Local;

use crate::lease::{self, Lease, LeaseError, Mode};

/// How to serve a raw file or block device.
#[derive(Clone)]
pub struct RawOptions {
    /// The file.
    pub path: PathBuf,
    /// The disk's name.
    pub name: String,
    /// Refuse writes, and share the file with other readers.
    pub read_only: bool,
    /// Go on although others use the file (`w!`).
    pub share: bool,
    /// Use of the host's page cache.
    pub cache: Cache,
    /// Give no space back when the guest discards.
    pub keep_space: bool,
    /// How long to wait for a lease that somebody else holds.
    pub lease_wait: Duration,
    /// Errors to inject below the channel, for tests.
    pub faults: Option<Arc<dyn Faults>>,
}

impl RawOptions {
    /// The defaults for this file: read and write, O_DIRECT, named as the file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let name = path.file_name().map_or_else(|| "disk".into(), |name| name.to_string_lossy().into_owned());
        RawOptions {
            path,
            name,
            read_only: false,
            share: false,
            cache: Cache::None,
            keep_space: false,
            lease_wait: Duration::from_secs(2),
            faults: None,
        }
    }

    fn open(&self, read_only: bool) -> Result<Arc<Backend>> {
        let options = Options {
            read_only,
            cache: self.cache,
            keep_space: self.keep_space,
            faults: self.faults.clone(),
        };
        Backend::open(&self.path, options)
    }
}

/// A disk in the raw format.
pub struct Raw {
    options: RawOptions,
    shared: Arc<Shared>,
    session: Mutex<Weak<RawSession>>,
}

/// What outlives sessions.
#[derive(Default)]
struct Shared {
    statistics: Statistics,
    watchers: Watchers,
}

struct RawSession {
    backend: Arc<Backend>,
    shared: Arc<Shared>,
    _lease: Lease,
}

impl Raw {
    /// A disk on the file that `options` name. Nothing is opened yet.
    pub fn new(options: RawOptions) -> Arc<Self> {
        Arc::new(Raw { options, shared: Arc::default(), session: Mutex::default() })
    }

    /// Whether the page cache is passed by: what was found when the disk was opened last, `None` before that.
    pub fn is_direct(&self) -> Option<bool> {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner).upgrade()?;
        Some(session.backend.is_direct() || session.backend.is_in_memory())
    }
}

impl Disk for Raw {
    fn name(&self) -> &str {
        &self.options.name
    }

    fn open(&self) -> Result<Arc<dyn Session>> {
        let mut current = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = current.upgrade() {
            return Ok(session);
        }
        let options = &self.options;
        let backend = options.open(options.read_only)?;
        let mode = if options.read_only { Mode::Read } else { Mode::Write };
        // On the descriptor that data goes through: its lock outlives a kill until the last write has landed.
        let wanted = lease::Options { override_: options.share, wait: options.lease_wait };
        let lease =
            Lease::acquire(backend.descriptor().as_fd(), &options.path, mode, wanted).map_err(lease_error)?;
        // The file may have grown while its lease was waited for.
        backend.refresh()?;
        backend.drop_cached();
        if options.cache == Cache::None && !backend.is_direct() && !backend.is_in_memory() {
            tracing::warn!(
                "{}: the filesystem has no O_DIRECT; going through the page cache",
                options.path.display()
            );
        }
        let session = Arc::new(RawSession { backend, shared: self.shared.clone(), _lease: lease });
        *current = Arc::downgrade(&session);
        Ok(session)
    }

    fn inspect(&self) -> Result<(Geometry, Capabilities)> {
        let current = self.session.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(session) = current {
            return Ok((session.geometry(), session.capabilities()));
        }
        let backend = self.options.open(true)?;
        Ok((backend.geometry(), backend.capabilities_for(self.options.read_only)))
    }

    fn statistics(&self) -> &Statistics {
        &self.shared.statistics
    }

    fn watch(&self, watcher: Box<dyn Fn(Event) + Send + Sync>) -> Arc<dyn Send + Sync> {
        self.shared.watchers.add(watcher)
    }
}

impl Session for RawSession {
    fn geometry(&self) -> Geometry {
        self.backend.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.backend.capabilities()
    }

    fn channel(self: Arc<Self>, local: &Local) -> Result<Rc<dyn Channel>> {
        Ok(self.backend.clone().channel(local, self))
    }

    fn grow(&self, size: u64) -> Result<()> {
        self.backend.grow(size)?;
        self.shared.watchers.tell(Event::Resized(self.backend.size()));
        Ok(())
    }

    fn reader(self: Arc<Self>) -> Option<Arc<dyn Reader>> {
        (self.backend.capabilities().read_only && self.backend.can_read_cached())
            .then_some(self as Arc<dyn Reader>)
    }
}

impl Reader for RawSession {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.backend.read_cached(offset, buffer)
    }
}

fn lease_error(error: LeaseError) -> Error {
    let kind = match error {
        LeaseError::InUse { .. } | LeaseError::Host(_) => ErrorKind::Busy,
        LeaseError::NoLocks { .. } => ErrorKind::Unsupported,
        LeaseError::Io { .. } => ErrorKind::Io,
    };
    Error::new(kind, error.to_string())
}
