//! An image of another program as a disk that can be read.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use vbd_core::file::{Backend, Cache, Faults, Options};
use vbd_core::{
    Capabilities, Channel, Disk, Error, ErrorKind, Event, Geometry, Result, Session, Statistics, Watchers,
};
use vbd_image::lease::{self, Lease, LeaseError, Mode};
use vbd_ring::Local;

use crate::channel::ForeignChannel;
use crate::layout::Layout;
use crate::{Format, FormatError, read};

/// How to serve an image, for reading.
#[derive(Clone)]
pub struct ForeignOptions {
    /// The file.
    pub path: PathBuf,
    /// Its format, as it was told.
    pub format: Format,
    /// The disk's name.
    pub name: String,
    /// Go on although others use the file.
    pub share: bool,
    /// Use of the host's page cache.
    pub cache: Cache,
    /// How long to wait for a lease that somebody else holds.
    pub lease_wait: Duration,
    /// Errors to inject below the channel, for tests.
    pub faults: Option<Arc<dyn Faults>>,
}

impl ForeignOptions {
    /// The defaults for this file: O_DIRECT, named as the file.
    pub fn new(path: impl Into<PathBuf>, format: Format) -> Self {
        let path = path.into();
        let name = path.file_name().map_or_else(|| "disk".into(), |name| name.to_string_lossy().into_owned());
        let lease_wait = Duration::from_secs(2);
        ForeignOptions { path, format, name, share: false, cache: Cache::None, lease_wait, faults: None }
    }

    fn label(&self) -> String {
        self.path.display().to_string()
    }

    fn backend(&self) -> Result<Arc<Backend>> {
        let options =
            Options { read_only: true, cache: self.cache, keep_space: true, faults: self.faults.clone() };
        Backend::open(&self.path, options)
    }

    /// The tables of the file that the backend has open.
    fn layout(&self, backend: &Backend) -> Result<Box<dyn Layout>> {
        let image = vbd_image::open::open(&self.path)
            .map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
        let of = |error: rustix::io::Errno| Error::io("cannot look at it", error.into()).of(self.label());
        let (mine, its) = (
            rustix::fs::fstat(&image.file).map_err(of)?,
            rustix::fs::fstat(backend.descriptor().as_fd()).map_err(of)?,
        );
        if (mine.st_dev, mine.st_ino) != (its.st_dev, its.st_ino) {
            return Err(Error::new(ErrorKind::Corrupt, "was replaced while it was opened").of(self.label()));
        }
        read(self.format, &image.file, image.size).map_err(|error| match error {
            FormatError::Io(error) => Error::io("cannot read it", error).of(self.label()),
            FormatError::Unsupported(message) => Error::new(ErrorKind::Unsupported, message).of(self.label()),
            other => Error::new(ErrorKind::Corrupt, other.to_string()).of(self.label()),
        })
    }
}

/// A disk in an image of another program.
pub struct Foreign {
    options: ForeignOptions,
    statistics: Statistics,
    watchers: Watchers,
    session: Mutex<Weak<ForeignSession>>,
}

/// What channels share.
pub(crate) struct Image {
    pub(crate) backend: Arc<Backend>,
    pub(crate) label: String,
    pub(crate) layout: Box<dyn Layout>,
    _lease: Lease,
}

struct ForeignSession {
    image: Arc<Image>,
}

impl Foreign {
    /// A disk on the file that `options` name. Nothing is opened yet.
    pub fn new(options: ForeignOptions) -> Arc<Self> {
        Arc::new(Foreign {
            options,
            statistics: Statistics::default(),
            watchers: Watchers::default(),
            session: Mutex::default(),
        })
    }

    fn open_image(&self) -> Result<Image> {
        let options = &self.options;
        let backend = options.backend()?;
        let wanted = lease::Options { override_: options.share, wait: options.lease_wait };
        let lease = Lease::acquire(backend.descriptor().as_fd(), &options.path, Mode::Read, wanted);
        let lease = lease.map_err(lease_error)?;
        backend.refresh()?;
        let layout = options.layout(&backend)?;
        backend.drop_cached();
        Ok(Image { backend, label: options.label(), layout, _lease: lease })
    }
}

impl Disk for Foreign {
    fn name(&self) -> &str {
        &self.options.name
    }

    fn open(&self) -> Result<Arc<dyn Session>> {
        let mut current = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = current.upgrade() {
            return Ok(session);
        }
        let session = Arc::new(ForeignSession { image: Arc::new(self.open_image()?) });
        *current = Arc::downgrade(&session);
        Ok(session)
    }

    fn inspect(&self) -> Result<(Geometry, Capabilities)> {
        let current = self.session.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(session) = current {
            return Ok((session.geometry(), session.capabilities()));
        }
        let backend = self.options.backend()?;
        let layout = self.options.layout(&backend)?;
        Ok((geometry(&backend, layout.size()), capabilities(&backend)))
    }

    fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    fn watch(&self, watcher: Box<dyn Fn(Event) + Send + Sync>) -> Arc<dyn Send + Sync> {
        self.watchers.add(watcher)
    }
}

fn geometry(backend: &Backend, size: u64) -> Geometry {
    Geometry { size, ..backend.geometry() }
}

fn capabilities(backend: &Backend) -> Capabilities {
    Capabilities { grow: false, ..backend.capabilities_for(true) }
}

impl Session for ForeignSession {
    fn geometry(&self) -> Geometry {
        geometry(&self.image.backend, self.image.layout.size())
    }

    fn capabilities(&self) -> Capabilities {
        capabilities(&self.image.backend)
    }

    fn channel(self: Arc<Self>, local: &Local) -> Result<Rc<dyn Channel>> {
        Ok(ForeignChannel::new(self.image.clone(), self, local))
    }

    fn grow(&self, _size: u64) -> Result<()> {
        let message = "can be read only: convert it to a format that can be written";
        Err(Error::new(ErrorKind::ReadOnly, message).of(&self.image.label))
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
