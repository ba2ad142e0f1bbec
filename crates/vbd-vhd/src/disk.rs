//! A VHD as a disk.

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

use crate::check::overlaps;
use crate::format::{FOOTER_LEN, FooterPlace, FormatError, Head, Kind, SizeRule};
use crate::live::{Image, Map, VhdChannel};

/// What a differencing disk lies over.
#[derive(Clone)]
pub struct Parent {
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// Its unique id, where it is a VHD: compared with the one that the image names.
    pub unique_id: Option<[u8; 16]>,
}

/// How to serve a VHD.
#[derive(Clone)]
pub struct VhdOptions {
    /// The file.
    pub path: PathBuf,
    /// The disk's name.
    pub name: String,
    /// Refuse writes, and share the file with other readers.
    pub read_only: bool,
    /// Go on although others use the file.
    pub share: bool,
    /// Use of the host's page cache.
    pub cache: Cache,
    /// Give no space back when the guest discards.
    pub keep_space: bool,
    /// How long to wait for a lease that somebody else holds.
    pub lease_wait: Duration,
    /// Errors to inject below the channel, for tests.
    pub faults: Option<Arc<dyn Faults>>,
    /// For a differencing disk: its parent, opened by whoever may open files. The image names it
    /// ([`Head::parent_names`]), and is not asked here.
    pub parent: Option<Parent>,
    /// Which of its two sizes the disk has.
    pub size_rule: SizeRule,
}

impl VhdOptions {
    /// The defaults for this file: read and write, O_DIRECT, named as the file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let name = path.file_name().map_or_else(|| "disk".into(), |name| name.to_string_lossy().into_owned());
        VhdOptions {
            path,
            name,
            read_only: false,
            share: false,
            cache: Cache::None,
            keep_space: false,
            lease_wait: Duration::from_secs(2),
            faults: None,
            parent: None,
            size_rule: SizeRule::Maker,
        }
    }

    fn backend(&self, read_only: bool) -> Result<Arc<Backend>> {
        let options = Options {
            read_only,
            cache: self.cache,
            keep_space: self.keep_space,
            faults: self.faults.clone(),
        };
        Backend::open(&self.path, options)
    }

    fn label(&self) -> String {
        self.path.display().to_string()
    }

    fn corrupt(&self, message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Corrupt, message).of(self.label())
    }

    fn format_error(&self, error: FormatError) -> Error {
        match error {
            FormatError::Io(error) => Error::io("cannot read it", error).of(self.label()),
            other => self.corrupt(other.to_string()),
        }
    }
}

/// A disk in a VHD.
pub struct Vhd {
    options: VhdOptions,
    shared: Arc<Shared>,
    session: Mutex<Weak<VhdSession>>,
}

/// What outlives sessions.
#[derive(Default)]
struct Shared {
    statistics: Statistics,
    watchers: Watchers,
}

struct VhdSession {
    image: Arc<Image>,
}

impl Vhd {
    /// A disk on the file that `options` name. Nothing is opened yet.
    pub fn new(options: VhdOptions) -> Arc<Self> {
        Arc::new(Vhd { options, shared: Arc::default(), session: Mutex::default() })
    }

    fn open_image(&self) -> Result<Image> {
        let options = &self.options;
        let read_only = options.read_only;
        let backend = options.backend(read_only)?;
        let mode = if read_only { Mode::Read } else { Mode::Write };
        let wanted = lease::Options { override_: options.share, wait: options.lease_wait };
        let lease =
            Lease::acquire(backend.descriptor().as_fd(), &options.path, mode, wanted).map_err(lease_error)?;
        let len =
            backend.length().map_err(|error| Error::io("cannot look at it", error).of(options.label()))?;
        let failed = |error| options.format_error(error);
        let head = Head::read(&*backend, len).map_err(failed)?;
        let size = head.size(options.size_rule).map_err(failed)?;
        if head.footer.saved_state != 0 && !read_only {
            tracing::warn!("{}: a machine in a saved state uses it", options.path.display());
        }
        let (map, parent) = match &head.header {
            None => (None, None),
            Some(header) => {
                let parent = self.parent(&head)?;
                let table = head.table(&*backend).map_err(failed)?;
                let end = head.content_end(&table);
                if !read_only {
                    self.settle(&backend, &head, &table, end)?;
                }
                (Some(Map::new(header, head.footer.clone(), &table, end)), parent)
            }
        };
        backend.refresh()?;
        backend.drop_cached();
        Ok(Image { backend, label: options.label(), size, read_only, map, parent, _lease: lease })
    }

    /// The session of the parent, for a differencing disk.
    fn parent(&self, head: &Head) -> Result<Option<Arc<dyn Session>>> {
        let options = &self.options;
        let Some(header) = head.header.as_ref().filter(|_| head.footer.kind == Kind::Differencing) else {
            return Ok(None);
        };
        let Some(parent) = &options.parent else {
            let message = "is a differencing disk, and no parent was given to it";
            return Err(options.corrupt(message));
        };
        if let Some(id) = parent.unique_id
            && id != header.parent_unique_id
        {
            return Err(options.corrupt(format!(
                "its parent is another disk than {} (the unique ids differ): give it the right one",
                parent.disk.name()
            )));
        }
        parent.disk.open().map(Some)
    }

    /// Puts the end of the file in order before it is written to: the footer behind the content, and nothing else.
    /// After a crash there may be more, which nobody refers to.
    fn settle(&self, file: &Backend, head: &Head, table: &[u32], end: u64) -> Result<()> {
        let options = &self.options;
        let failed = |error| options.format_error(error);
        if head.place == FooterPlace::Differ && !head.is_half_resized(file).map_err(failed)? {
            return Err(options.corrupt(
                "the footer and its copy differ: open it for reading only, or have it repaired by `vbd check`",
            ));
        }
        if let Some(problem) = overlaps(head, table).first() {
            let message = format!("{problem}: open it for reading only, and restore it from a backup");
            return Err(options.corrupt(message));
        }
        let len = end + FOOTER_LEN as u64;
        if head.place == FooterPlace::Good && head.file_len == len {
            return Ok(());
        }
        let footer = head.footer.encode();
        let write = || {
            file.write_all_at(end, &footer)?;
            file.write_all_at(0, &footer)?;
            file.sync()?;
            file.set_length(len)?;
            file.sync()
        };
        write().map_err(|error| Error::io("cannot put its footer in order", error).of(options.label()))
    }
}

impl Disk for Vhd {
    fn name(&self) -> &str {
        &self.options.name
    }

    fn open(&self) -> Result<Arc<dyn Session>> {
        let mut current = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = current.upgrade() {
            return Ok(session);
        }
        let session = Arc::new(VhdSession { image: Arc::new(self.open_image()?) });
        *current = Arc::downgrade(&session);
        Ok(session)
    }

    fn inspect(&self) -> Result<(Geometry, Capabilities)> {
        let current = self.session.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(session) = current {
            return Ok((session.geometry(), session.capabilities()));
        }
        let options = &self.options;
        let backend = options.backend(true)?;
        let len =
            backend.length().map_err(|error| Error::io("cannot look at it", error).of(options.label()))?;
        let failed = |error| options.format_error(error);
        let size =
            Head::read(&*backend, len).and_then(|head| head.size(options.size_rule)).map_err(failed)?;
        Ok((geometry(&backend, size), capabilities(&backend, options.read_only)))
    }

    fn statistics(&self) -> &Statistics {
        &self.shared.statistics
    }

    fn watch(&self, watcher: Box<dyn Fn(Event) + Send + Sync>) -> Arc<dyn Send + Sync> {
        self.shared.watchers.add(watcher)
    }
}

fn geometry(backend: &Backend, size: u64) -> Geometry {
    Geometry { size, ..backend.geometry() }
}

fn capabilities(backend: &Backend, read_only: bool) -> Capabilities {
    Capabilities { grow: false, ..backend.capabilities_for(read_only) }
}

impl Session for VhdSession {
    fn geometry(&self) -> Geometry {
        geometry(&self.image.backend, self.image.size)
    }

    fn capabilities(&self) -> Capabilities {
        capabilities(&self.image.backend, self.image.read_only)
    }

    fn channel(self: Arc<Self>, local: &Local) -> Result<Rc<dyn Channel>> {
        Ok(VhdChannel::new(self.image.clone(), self, local)?)
    }

    fn grow(&self, _size: u64) -> Result<()> {
        let message = "a VHD does not grow while it is served: stop that, and resize it then";
        Err(Error::new(ErrorKind::Unsupported, message).of(&self.image.label))
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
