//! A disk behind which another one is encrypted.

mod channel;

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use vbd_core::{
    Capabilities, Channel, Client, Disk, Error, ErrorKind, Event, Geometry, Result, Session, Statistics,
};
use vbd_ring::{Local, Reactor, Settings};

use crate::{Encrypted, Header, LuksError, Secret};
use channel::LuksChannel;

/// The longest zeroing in one request, in bytes: zeroes are encrypted and written as everything else.
const MOST_ZEROES: u64 = 32 << 20;

/// How to open an encrypted disk.
#[derive(Clone)]
pub struct LuksOptions {
    /// The disk that holds header and data: a raw one, as a rule.
    pub inner: Arc<dyn Disk>,
    /// Its file, for a look at the header that takes no lease.
    pub path: PathBuf,
    /// What unlocks it.
    pub secret: Secret,
}

/// An encrypted disk.
pub struct Luks {
    options: LuksOptions,
    session: Arc<Mutex<Weak<LuksSession>>>,
}

struct LuksSession {
    inner: Arc<dyn Session>,
    data: Arc<Encrypted>,
    /// The data's length, where it does not go on to the end.
    len: Option<u64>,
}

/// The part of a disk that its data has.
#[derive(Clone, Copy)]
struct Part {
    offset: u64,
    len: Option<u64>,
    sector_size: u32,
}

impl Part {
    /// The size of the disk that guests see, where the one below has this.
    fn size(self, below: u64) -> u64 {
        let rest = below.saturating_sub(self.offset);
        let sector = u64::from(self.sector_size);
        self.len.map_or(rest, |len| len.min(rest)) / sector * sector
    }

    fn geometry(self, below: Geometry) -> Geometry {
        let sector = self.sector_size.max(below.physical_block_size);
        Geometry {
            size: self.size(below.size),
            physical_block_size: sector,
            max_zeroes: MOST_ZEROES,
            ..below
        }
    }
}

/// Discards are not passed on: what was given back would read as noise, and which parts are in use would be told.
fn capabilities(below: Capabilities, part: Part) -> Capabilities {
    Capabilities { discard: false, fast_zeroes: false, grow: below.grow && part.len.is_none(), ..below }
}

impl Luks {
    /// A disk on another one. Nothing is opened yet.
    pub fn new(options: LuksOptions) -> Arc<Self> {
        Arc::new(Luks { options, session: Arc::default() })
    }

    fn error(&self, error: LuksError) -> Error {
        error.of(&self.options.path.display().to_string())
    }

    /// Reads the header through the disk below, which holds the lease, and unlocks it.
    fn unlock(&self, inner: &Arc<dyn Session>) -> Result<(Arc<Encrypted>, Option<u64>)> {
        let label = self.options.path.display().to_string();
        let reactor = Reactor::spawn("luks", Settings::default())
            .map_err(|error| Error::io("cannot start a reactor", error).of(&label))?;
        let client = Client::new(&reactor.handle(), inner.clone())?;
        let header = Header::read(&client).map_err(|error| self.error(error))?;
        let unlocked = header.unlock(&client, &self.options.secret).map_err(|error| self.error(error))?;
        let (offset, len) = (unlocked.payload_offset, unlocked.payload_len);
        if inner.geometry().size <= offset {
            let message = "ends before its data begins: it was truncated, or has a header alone";
            return Err(Error::new(ErrorKind::Corrupt, message).of(label));
        }
        Ok((Encrypted::new(unlocked.cipher, offset, unlocked.first_number, label), len))
    }
}

impl Disk for Luks {
    fn name(&self) -> &str {
        self.options.inner.name()
    }

    fn open(&self) -> Result<Arc<dyn Session>> {
        let mut current = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = current.upgrade() {
            return Ok(session);
        }
        let inner = self.options.inner.open()?;
        let (data, len) = self.unlock(&inner)?;
        let session = Arc::new(LuksSession { inner, data, len });
        *current = Arc::downgrade(&session);
        Ok(session)
    }

    fn inspect(&self) -> Result<(Geometry, Capabilities)> {
        let current = self.session.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(session) = current {
            return Ok((session.geometry(), session.capabilities()));
        }
        let image = vbd_image::open::open(&self.options.path)
            .map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
        let header = Header::read(&image.file).map_err(|error| self.error(error))?;
        let part = Part {
            offset: header.payload_offset(),
            len: header.payload_len(),
            sector_size: header.sector_size(),
        };
        let (geometry, below) = self.options.inner.inspect()?;
        Ok((part.geometry(geometry), capabilities(below, part)))
    }

    fn statistics(&self) -> &Statistics {
        self.options.inner.statistics()
    }

    fn watch(&self, watcher: Box<dyn Fn(Event) + Send + Sync>) -> Arc<dyn Send + Sync> {
        let current = self.session.clone();
        // Told only while it is open, as it is then that it can grow.
        self.options.inner.watch(Box::new(move |event| {
            let Event::Resized(below) = event;
            let session = current.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
            if let Some(session) = session {
                watcher(Event::Resized(session.part().size(below)));
            }
        }))
    }
}

impl LuksSession {
    fn part(&self) -> Part {
        let sector_size = u32::try_from(self.data.sector_size()).expect("4096 at most");
        Part { offset: self.data.offset(), len: self.len, sector_size }
    }
}

impl Session for LuksSession {
    fn geometry(&self) -> Geometry {
        self.part().geometry(self.inner.geometry())
    }

    fn capabilities(&self) -> Capabilities {
        capabilities(self.inner.capabilities(), self.part())
    }

    fn channel(self: Arc<Self>, local: &Local) -> Result<Rc<dyn Channel>> {
        let inner = self.inner.clone().channel(local)?;
        Ok(LuksChannel::new(self, inner, local))
    }

    fn keeps_unflushed(&self) -> bool {
        self.inner.keeps_unflushed()
    }

    fn grow(&self, size: u64) -> Result<()> {
        if self.len.is_some() || !size.is_multiple_of(self.data.sector_size()) {
            let message = "its data has a fixed length, or the size is no multiple of its sectors";
            return Err(Error::new(ErrorKind::Unsupported, message).of(self.data.label()));
        }
        self.inner.grow(size.saturating_add(self.data.offset()))
    }
}
