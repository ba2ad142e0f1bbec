//! A disk that is used while it is being restored.
//!
//! A chunk comes from the store when a guest first touches it, or when its turn has come. What a guest writes goes into the
//! new image alone. Until the image is whole it has another name, and a journal beside it says which chunks are its own:
//!
//! - a chunk's bit is set when its content is durable in the image;
//! - a guest's write to a chunk is passed on when its bit is durable.
//!
//! So whatever is interrupted, a chunk without a bit has nothing of a guest's in it, and is fetched again.

mod channel;
mod journal;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vbd_core::bitmap::Bitmap;
use vbd_core::client::Buffer;
use vbd_core::range_lock::RangeLocks;
use vbd_core::{
    Capabilities, Channel, Client, Disk, Error as DiskError, ErrorKind, Event, Geometry, Session, Statistics,
};
use vbd_formats::{Format, NewImage};
use vbd_image::create;
use vbd_image::raw::{Raw, RawOptions};
use vbd_ring::{Local, Reactor, Settings};

use self::channel::RestoringChannel;
use self::journal::Journal;
use super::{Hash, Manifest, Store};
use crate::journal::sync_directory;
use crate::ranges::lock;
use crate::{Error, Progress, Result};

/// After how many chunks it is made durable that they are there: whoever is interrupted fetches no more than these again.
const RECORD_AFTER: usize = 64;

/// What all channels share.
pub(super) struct Shared {
    name: String,
    manifest: Manifest,
    /// Until everything is there.
    store: Mutex<Option<Arc<Store>>>,
    /// Chunks whose content is only in the store.
    missing: Bitmap,
    /// Chunks that are not known, durably, to be in the image: these, and some that came a moment ago.
    pending: Bitmap,
    /// What the journal says.
    done: Bitmap,
    journal: Journal,
    locks: Arc<RangeLocks>,
    recording: Arc<RangeLocks>,
    /// Chunks that could not be had, and why.
    damaged: Mutex<BTreeMap<u64, String>>,
    /// Nothing is pending.
    complete: AtomicBool,
}

impl Shared {
    /// The bytes of a chunk.
    fn range(&self, chunk: u64) -> std::ops::Range<u64> {
        let size = u64::from(self.manifest.chunk);
        chunk * size..((chunk + 1) * size).min(self.manifest.size)
    }

    /// Chunks that have come and are not recorded.
    fn unrecorded(&self) -> Vec<u64> {
        let chunk = u64::from(self.manifest.chunk);
        let pending = self.pending.runs(0..self.manifest.size);
        let pending = pending.flat_map(|run| run.start / chunk..run.end.div_ceil(chunk));
        pending.filter(|index| !self.missing.is_marked(index * chunk)).collect()
    }

    /// These are durable in the image.
    fn record(&self, chunks: &[u64]) -> std::io::Result<()> {
        self.journal.record(&self.done, chunks)?;
        for chunk in chunks {
            self.pending.unmark(self.range(*chunk).start, 1);
        }
        Ok(())
    }
}

/// A disk that is being restored: a raw image, and a store for what is not in it yet.
pub struct Restoring {
    raw: Arc<Raw>,
    /// Held from beginning to end: the file changes its name in between.
    session: Arc<dyn Session>,
    shared: Arc<Shared>,
    draft: PathBuf,
    journal: PathBuf,
    target: PathBuf,
    replace: bool,
}

/// What has become of a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Bytes that were copied in the end.
    pub bytes: u64,
    /// What could not be had: where, in bytes, and why. The image keeps its other name until it is whole.
    pub damaged: Vec<(u64, String)>,
}

fn beside(target: &Path, end: &str) -> PathBuf {
    let mut name = std::ffi::OsString::from(".vbd-");
    name.push(target.file_name().unwrap_or_default());
    name.push(end);
    target.with_file_name(name)
}

impl Restoring {
    /// Begins to restore a backup as the raw image `target`, or goes on where that was interrupted; `restart` begins anew in
    /// any case.
    ///
    /// # Errors
    /// There is such a file and it is not to be replaced, what was interrupted was another backup, or the files cannot be
    /// made.
    pub fn begin(
        store: Store,
        manifest: Manifest,
        target: &Path,
        name: &str,
        replace: bool,
        restart: bool,
    ) -> Result<Arc<Restoring>> {
        create::may_publish(target, replace)?;
        let (draft, journal) = (beside(target, ".restoring"), beside(target, ".restored"));
        if restart {
            for path in [&journal, &draft] {
                match fs::remove_file(path) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(Error::io(path, "remove it")(error));
                    }
                    _ => {}
                }
            }
        }
        let bitmap = || {
            Bitmap::new(manifest.size, manifest.chunk.into())
                .map_err(|error| Error::Refused(format!("the backup: {error}")))
        };
        let (missing, pending, done) = (bitmap()?, bitmap()?, bitmap()?);
        let journaled = if journal.exists() {
            let opened = Journal::open(&journal, &manifest, &done)?;
            if !draft.exists() {
                let message = format!(
                    "{}: is missing, and was being restored: begin anew with --restart",
                    draft.display()
                );
                return Err(Error::Refused(message));
            }
            opened
        } else {
            // The image first: one without a journal is nobody's.
            let new = NewImage { replace: true, ..NewImage::new(Format::Raw, manifest.size)? };
            vbd_formats::create(&draft, &new)?;
            let durable = fs::File::open(&draft).and_then(|file| file.sync_all());
            durable.map_err(Error::io(&draft, "make it durable"))?;
            Journal::create(&journal, &manifest)?
        };
        for (index, hash) in (0u64..).zip(&manifest.chunks) {
            let start = index * u64::from(manifest.chunk);
            if *hash != Hash::ZEROES && !done.is_marked(start) {
                missing.mark(start, 1);
                pending.mark(start, 1);
            }
        }
        let raw = Raw::new(RawOptions { name: name.to_owned(), ..RawOptions::new(&draft) });
        let session = raw.open()?;
        let shared = Shared {
            name: name.to_owned(),
            manifest,
            store: Mutex::new(Some(Arc::new(store))),
            missing,
            pending,
            done,
            journal: journaled,
            locks: Arc::default(),
            recording: Arc::default(),
            damaged: Mutex::default(),
            complete: AtomicBool::new(false),
        };
        Ok(Arc::new(Restoring {
            raw,
            session,
            shared: Arc::new(shared),
            draft,
            journal,
            target: target.to_owned(),
            replace,
        }))
    }

    /// Brings everything that is still missing, and gives the image its name when it is whole. Blocks.
    ///
    /// # Errors
    /// The image cannot be written or renamed, or this was stopped: then it is gone on with the next time.
    pub fn fill(&self, progress: &dyn Progress) -> Result<Restored> {
        let shared = &self.shared;
        let reactor = Reactor::spawn("vbd-restore", Settings::default());
        let reactor = reactor.map_err(Error::io(&self.target, "start a thread"))?;
        let client = Client::new(&reactor.handle(), self.open()?)?;
        let mut restored = Restored::default();
        let mut buffer = Buffer::new(512);
        let chunk = u64::from(shared.manifest.chunk);
        progress.step("restoring", shared.missing.marked_bytes());
        let (mut at, mut since) = (0, 0);
        while let Some(run) = shared.missing.next_run(at..shared.manifest.size) {
            if progress.is_cancelled() {
                client.flush()?;
                return Err(Error::Cancelled);
            }
            let range = shared.range(run.start / chunk);
            at = range.end;
            // The first sector brings the rest with it.
            match client.read(range.start, &mut buffer, 512) {
                Ok(()) => restored.bytes += range.end - range.start,
                Err(error) if shared.missing.is_marked(range.start) => {
                    // Told of at the end; the rest is of use.
                    tracing::debug!("{error}");
                }
                Err(error) => return Err(error.into()),
            }
            progress.advance(range.end - range.start);
            since += 1;
            if since == RECORD_AFTER {
                client.flush()?;
                since = 0;
            }
        }
        progress.step("flushing", 0);
        client.flush()?;
        restored.damaged = lock(&shared.damaged)
            .iter()
            .map(|(chunk, why)| (shared.range(*chunk).start, why.clone()))
            .collect();
        if restored.damaged.is_empty() && !shared.pending.any(0, shared.manifest.size) {
            self.publish()?;
        }
        Ok(restored)
    }

    /// Everything is in the image, durably.
    fn publish(&self) -> Result<()> {
        self.shared.complete.store(true, Ordering::Release);
        create::publish(&self.draft, &self.target, self.replace)?;
        let durable = || {
            sync_directory(&self.target)?;
            fs::remove_file(&self.journal)?;
            sync_directory(&self.target)
        };
        durable().map_err(Error::io(&self.target, "make its name durable"))?;
        // Whoever prunes the store need not wait any more.
        *lock(&self.shared.store) = None;
        Ok(())
    }

    /// Whether the image is whole and has its name.
    pub fn is_complete(&self) -> bool {
        self.shared.complete.load(Ordering::Acquire)
    }
}

impl Disk for Restoring {
    fn name(&self) -> &str {
        self.raw.name()
    }

    fn open(&self) -> vbd_core::Result<Arc<dyn Session>> {
        Ok(Arc::new(RestoringSession { session: self.session.clone(), shared: self.shared.clone() }))
    }

    fn inspect(&self) -> vbd_core::Result<(Geometry, Capabilities)> {
        let session = self.open()?;
        Ok((session.geometry(), session.capabilities()))
    }

    fn statistics(&self) -> &Statistics {
        self.raw.statistics()
    }

    fn watch(&self, watcher: Box<dyn Fn(Event) + Send + Sync>) -> Arc<dyn Send + Sync> {
        self.raw.watch(watcher)
    }
}

struct RestoringSession {
    session: Arc<dyn Session>,
    shared: Arc<Shared>,
}

impl Session for RestoringSession {
    fn geometry(&self) -> Geometry {
        self.session.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { grow: false, ..self.session.capabilities() }
    }

    fn channel(self: Arc<Self>, local: &Local) -> vbd_core::Result<Rc<dyn Channel>> {
        let image = self.session.clone().channel(local)?;
        Ok(RestoringChannel::new(&self.shared.clone(), image, local, self))
    }

    fn grow(&self, _size: u64) -> vbd_core::Result<()> {
        Err(DiskError::new(ErrorKind::Unsupported, "is served by a restore: stop that, and grow it then"))
    }

    fn keeps_unflushed(&self) -> bool {
        self.session.keeps_unflushed()
    }
}
