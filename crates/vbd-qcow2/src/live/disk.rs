//! The disk: an image by name, and how it is opened.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use vbd_core::file::{Backend, Cache, Faults, Options};
use vbd_core::{Capabilities, Disk, Error, ErrorKind, Event, Geometry, Result, Session, Statistics};
use vbd_image::lease::{self, Lease, LeaseError, Mode};
use vbd_luks::{Encrypted, LuksError, Secret};
use vbd_ring::sync::Mutex;

use super::counts::Counts;
use super::image::{Image, Parts, whole_blocks};
use super::io::{Io, bytes, corrupt};
use super::map::L1;
use super::service::{self, Place};
use super::session::{Qcow2Session, Shared, geometry};
use super::set::ClusterSet;
use super::snapshot::read_table;
use crate::bitmaps::Kept;
use crate::check::{self, Repair, repair};
use crate::format::{Encryption, Header, L1Entry, RefcountTableEntry, at, autoclear, incompatible, limit};

/// How to serve a qcow2 image.
#[derive(Clone)]
pub struct Qcow2Options {
    /// The image's file.
    pub path: PathBuf,
    /// The disk's name.
    pub name: String,
    /// Refuse writes, and share the file with other readers.
    pub read_only: bool,
    /// Go on although others use the file (`w!`). Two writers of a qcow2 image destroy it, so only for reading.
    pub share: bool,
    /// Use of the host's page cache.
    pub cache: Cache,
    /// Give no space back when the guest discards.
    pub keep_space: bool,
    /// How long to wait for a lease that somebody else holds.
    pub lease_wait: Duration,
    /// Errors to inject below the channel, for tests.
    pub faults: Option<Arc<dyn Faults>>,
    /// The image behind this one, which its header names. This is opened for reading, by whoever may say that it may be.
    pub backing: Option<Arc<dyn Disk>>,
    /// The external data file, where the header has one: a raw disk.
    pub data_file: Option<Arc<dyn Disk>>,
    /// What unlocks it, where it is encrypted.
    pub secret: Option<Secret>,
    /// Bytes that L2 tables in memory may take; none for as many as the image has.
    pub cache_bytes: Option<u64>,
    /// The bitmaps of the image, for those who keep them while it is written to: also the keeper of a
    /// [`vbd_core::track::Tracked`] in front. Without it they become void when the image is opened for writing.
    pub bitmaps: Option<Kept>,
    /// Note changes beside the image, so that a guest goes on over a kill of this process.
    pub notes: bool,
}

impl Qcow2Options {
    /// The defaults for this file: read and write, O_DIRECT, named as the file, with nothing behind it.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let name = path.file_name().map_or_else(|| "disk".into(), |name| name.to_string_lossy().into_owned());
        Qcow2Options {
            path,
            name,
            read_only: false,
            share: false,
            cache: Cache::None,
            keep_space: false,
            lease_wait: Duration::from_secs(2),
            faults: None,
            backing: None,
            data_file: None,
            secret: None,
            cache_bytes: None,
            bitmaps: None,
            notes: true,
        }
    }

    fn label(&self) -> String {
        self.path.display().to_string()
    }
}

/// A disk in a qcow2 image.
pub struct Qcow2 {
    options: Qcow2Options,
    shared: Arc<Shared>,
    session: Mutex<Weak<Qcow2Session>>,
}

impl Qcow2 {
    /// A disk on the image that `options` name. Nothing is opened yet.
    pub fn new(mut options: Qcow2Options) -> Arc<Self> {
        let shared = Arc::new(Shared::new(options.backing.take()));
        Arc::new(Qcow2 { options, shared, session: Mutex::default() })
    }

    fn open_now(&self) -> Result<Arc<Qcow2Session>> {
        let options = &self.options;
        let file = Options {
            read_only: options.read_only,
            cache: options.cache,
            keep_space: options.keep_space,
            faults: options.faults.clone(),
        };
        let backend = Backend::open(&options.path, file)?;
        let mode = if options.read_only { Mode::Read } else { Mode::Write };
        // On the descriptor that data goes through: its lock outlives a kill until the last write has landed.
        let wanted = lease::Options { override_: options.share, wait: options.lease_wait };
        let lease =
            Lease::acquire(backend.descriptor().as_fd(), &options.path, mode, wanted).map_err(lease_error)?;
        if !options.read_only {
            self.mend_if_dirty(&backend).map_err(|error| error.of(options.label()))?;
        }
        // The file may have grown while its lease was waited for.
        backend.refresh()?;
        backend.drop_cached();
        let data_file = options.data_file.as_ref().map(|disk| disk.open()).transpose()?;
        let backing = self.shared.backing().clone();
        let backing = backing.map(|disk| disk.open()).transpose()?;
        // Only tables are read and written while it is opened, which are not encrypted.
        let place = Place {
            backend: backend.clone(),
            data_file: data_file.clone(),
            encrypted: None,
            owner: Arc::new(()),
        };
        let opening = Opening { options: options.clone(), backend, data_file, backing };
        let image = service::run(place, move |io| async move {
            let image = Arc::new(opening.open(&io).await?);
            image.replay(&io).await?;
            Ok(image)
        });
        let image = image.map_err(|error| error.of(options.label()))?;
        Ok(Qcow2Session::new(image, self.shared.clone(), options.bitmaps.clone(), lease))
    }
}

impl Qcow2 {
    /// Makes the refcounts of an image right that says that they may be wrong: a program that writes them late, or one
    /// that was changing snapshots, has not ended as it should. The lease is held.
    fn mend_if_dirty(&self, file: &Backend) -> Result<()> {
        // What is wrong with it otherwise is said when it is opened.
        let Ok(header) = Header::read(file) else { return Ok(()) };
        if !header.has(incompatible::DIRTY)
            || header.has(incompatible::CORRUPT)
            || header.refuse_unknown().is_err()
        {
            return Ok(());
        }
        tracing::warn!("{}: was not closed cleanly; its refcounts are being checked", self.options.label());
        let repaired = repair(file, Repair::All, &check::Options::default())
            .map_err(|error| corrupt(format!("was not closed cleanly, and cannot be repaired: {error}")))?;
        repaired.actions.iter().for_each(|action| tracing::warn!("{}: {action}", self.options.label()));
        if repaired.after.errors > 0 {
            let message =
                "was not closed cleanly, and not all that is wrong could be repaired; see `vbd check`";
            return Err(corrupt(message));
        }
        Ok(())
    }
}

impl Disk for Qcow2 {
    fn name(&self) -> &str {
        &self.options.name
    }

    fn open(&self) -> Result<Arc<dyn Session>> {
        let mut current = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = current.upgrade() {
            return Ok(session);
        }
        let session = self.open_now()?;
        *current = Arc::downgrade(&session);
        Ok(session)
    }

    fn inspect(&self) -> Result<(Geometry, Capabilities)> {
        let current = self.session.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(session) = current {
            return Ok((session.geometry(), session.capabilities()));
        }
        let options = &self.options;
        let failed = |error| Error::io("cannot open", error).of(options.label());
        let file = std::fs::File::open(&options.path).map_err(failed)?;
        let header = Header::read(&file).map_err(|error| corrupt(error.to_string()).of(options.label()))?;
        let size = header.size.next_multiple_of(512);
        let abilities = Capabilities {
            read_only: options.read_only,
            write_cache: options.cache != Cache::Writethrough,
            discard: !options.read_only && !options.keep_space,
            fast_zeroes: !options.read_only && header.version >= 3,
            grow: !options.read_only,
        };
        Ok((geometry(size, header.layout().cluster_size(), 4096), abilities))
    }

    fn statistics(&self) -> &Statistics {
        &self.shared.statistics
    }

    fn watch(&self, watcher: Box<dyn Fn(Event) + Send + Sync>) -> Arc<dyn Send + Sync> {
        self.shared.watchers.add(watcher)
    }
}

/// What an image is opened with.
struct Opening {
    options: Qcow2Options,
    backend: Arc<Backend>,
    data_file: Option<Arc<dyn Session>>,
    backing: Option<Arc<dyn Session>>,
}

impl Opening {
    async fn open(self, io: &Io) -> Result<Image> {
        let mut header = self.header(io).await?;
        self.refuse(&header)?;
        let layout = header.layout();
        let encrypted = self.unlock(io, &header).await?;
        let write = !self.options.read_only;
        if write {
            self.prepare(io, &mut header).await?;
        }
        let l1 = self.entries(io, "the L1 table", header.l1_offset, header.l1_bytes()).await?;
        let mut table = Vec::new();
        let mut metadata = ClusterSet::default();
        if write {
            table = self
                .entries(
                    io,
                    "the refcount table",
                    header.refcount_table_offset,
                    header.refcount_table_bytes(),
                )
                .await?;
            table.iter_mut().for_each(|entry| *entry = RefcountTableEntry(*entry).offset());
        }
        let mut tables = vec![
            (0, 1),
            (header.l1_offset, header.l1_bytes()),
            (header.refcount_table_offset, header.refcount_table_bytes()),
        ];
        tables.extend(header.crypto().map(|keys| (keys.offset, keys.length.min(limit::CRYPTO_BYTES))));
        tables.extend(table.iter().filter(|offset| **offset != 0).map(|offset| (*offset, 1)));
        let leads = |entries: &[u64]| -> Vec<u64> {
            entries.iter().map(|entry| L1Entry(*entry).offset()).filter(|offset| *offset != 0).collect()
        };
        tables.extend(leads(&l1).into_iter().map(|offset| (offset, 1)));
        if write && header.snapshots > 0 {
            let (snapshots, len) = read_table(io, &header, self.backend.size()).await?;
            tables.push((header.snapshots_offset, len));
            for snapshot in snapshots {
                let len = u64::from(snapshot.l1_entries) * 8;
                let entries = self.entries(io, "the L1 table of a snapshot", snapshot.l1_offset, len).await?;
                tables.push((snapshot.l1_offset, len));
                tables.extend(leads(&entries).into_iter().map(|offset| (offset, 1)));
            }
        }
        for (offset, len) in tables {
            let first = offset >> layout.cluster_bits;
            for cluster in first..first + layout.clusters(len) {
                metadata.insert(cluster);
            }
        }
        let known = self.backend.size().div_ceil(layout.cluster_size());
        let counts = Counts::new(layout, table, header.refcount_table_offset, metadata, known);
        Ok(Image::new(Parts {
            label: self.options.label(),
            path: self.options.path.clone(),
            header,
            backend: self.backend,
            read_only: self.options.read_only,
            cache: self.options.cache,
            keep_space: self.options.keep_space,
            data_file: self.data_file,
            backing: self.backing,
            encrypted,
            l1: L1::new(l1.into_iter()),
            counts,
            cache_bytes: self.options.cache_bytes,
            notes: self.options.notes,
        }))
    }

    /// Reads the header.
    async fn header(&self, io: &Io) -> Result<Header> {
        let size = self.backend.size();
        let first = io.read(0, bytes(size.min(512))).await?;
        // As much as a header may have, which its own first bytes tell.
        let cluster_bits =
            first.get(20..24).map_or(9, |bits| u32::from_be_bytes(bits.try_into().expect("four")));
        let len = size.min(1 << cluster_bits.clamp(9, 21));
        let first = io.read(0, bytes(len)).await?;
        Header::parse(&first).map_err(|error| corrupt(error.to_string()))
    }

    /// Refuses an image that cannot be served in this way.
    fn refuse(&self, header: &Header) -> Result<()> {
        let refused = |message: &str| Err(Error::new(ErrorKind::Unsupported, message));
        header.refuse_unknown().map_err(|error| Error::new(ErrorKind::Unsupported, error.to_string()))?;
        let write = !self.options.read_only;
        if header.encryption == Encryption::Aes {
            let message = "the image is encrypted in the old way of qcow2 (AES-CBC), which is not safe and not known here; convert it with qemu-img, to LUKS or to none";
            return refused(message);
        }
        if header.has(incompatible::DATA_FILE) && self.data_file.is_none() {
            return refused("the image has its data in another file, which was not given");
        }
        if header.backing.is_some() && self.backing.is_none() {
            return refused("the image has a backing file, which was not given");
        }
        if write && header.has(incompatible::CORRUPT) {
            let message =
                "the image is marked as corrupt; repair it with `vbd check --repair`, or open it for reading";
            return Err(corrupt(message));
        }
        if write && header.has(incompatible::DIRTY) {
            let message = "the image was not closed cleanly by a program that wrote refcounts late; repair it with `vbd check --repair`, or open it for reading";
            return Err(corrupt(message));
        }
        if write && self.options.share {
            return refused("an image cannot be written to while others write to it: leave out `w!`");
        }
        Ok(())
    }

    /// Unlocks an encrypted image.
    async fn unlock(&self, io: &Io, header: &Header) -> Result<Option<Arc<Encrypted>>> {
        let (Encryption::Luks, Some(place)) = (header.encryption, header.crypto()) else { return Ok(None) };
        let secret = self.options.secret.clone().ok_or_else(|| {
            let message =
                "is encrypted with LUKS: say --key-file FILE or --key-fd N (`key-file` in a configuration)";
            Error::new(ErrorKind::Unsupported, message)
        })?;
        let there = self.backend.size().saturating_sub(place.offset);
        let len = place.length.min(there).min(limit::CRYPTO_BYTES);
        let keys = io.read(place.offset, bytes(len)).await?.to_vec();
        // Takes as long as the header says.
        let unlocked = io.local.unblock(move || {
            let header = vbd_luks::Header::read(&keys[..])?;
            if header.version() != 1 {
                let message = "a qcow2 image holds LUKS version 1, and this one another";
                return Err(LuksError::Unsupported(message.to_owned()));
            }
            header.unlock(&keys[..], &secret)
        });
        let label = self.options.label();
        // Sectors are numbered from the start of the file that holds them: by host offset.
        let unlocked = unlocked.await.map_err(|error| error.of(&label))?;
        Ok(Some(Encrypted::new(unlocked.cipher, 0, 0, label)))
    }

    /// Makes an image ready to be written to.
    async fn prepare(&self, io: &Io, header: &mut Header) -> Result<()> {
        let end =
            whole_blocks(&self.backend, self.backend.size().next_multiple_of(header.layout().cluster_size()));
        if end != self.backend.size() && !self.backend.is_block_device() {
            // A program that wrote part of the last cluster: what is missing reads as zeroes.
            self.backend.grow(end)?;
            io.sync().await?;
            self.backend.drop_cached();
        }
        if let Some(data) = &self.data_file
            && data.geometry().size < header.size
        {
            data.grow(header.size.next_multiple_of(512))?;
        }
        // What is not known here, or not kept, is not true any more once the image is written to.
        let mut kept = header.autoclear & (autoclear::RAW_DATA | autoclear::NOTES);
        if let Some(bitmaps) = &self.options.bitmaps
            && bitmaps.begin(&*self.backend, header)
        {
            kept |= header.autoclear & autoclear::BITMAPS;
        }
        if header.version >= 3 && header.autoclear != kept {
            let mut buffer = vbd_core::memory::Buffer::new(8);
            buffer.bytes_mut().copy_from_slice(&kept.to_be_bytes());
            io.write(at::FEATURES + 16, buffer, Arc::new(())).await?;
            io.sync().await?;
            header.autoclear = kept;
        }
        Ok(())
    }

    /// Reads a table of the image.
    async fn entries(&self, io: &Io, what: &str, offset: u64, len: u64) -> Result<Vec<u64>> {
        if len == 0 {
            return Ok(Vec::new());
        }
        let end = offset.checked_add(len).filter(|end| *end <= self.backend.size());
        if end.is_none() || offset == 0 {
            let size = self.backend.size();
            return Err(corrupt(format!(
                "{what} is {len} bytes at {offset:#x}, and the file ends at {size:#x}: the image is truncated or damaged"
            )));
        }
        let read = io.read(offset, bytes(len)).await?;
        let entry = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
        Ok(read.chunks_exact(8).map(entry).collect())
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
