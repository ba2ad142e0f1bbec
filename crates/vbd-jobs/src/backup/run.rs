//! Taking a backup.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vbd_core::bitmap::{Bitmap, DEFAULT_GRANULARITY};
use vbd_core::client::Buffer;
use vbd_core::file::{Backend, Cache, Options};
use vbd_core::track::{Freeze, Frozen, Track};
use vbd_core::{Client, ErrorKind, Session};
use vbd_image::clock::rfc3339;
use vbd_ring::{Reactor, Settings};

use super::manifest::{About, Hash, Manifest, count};
use super::store::Store;
use crate::ranges::{Chunk, Chunks, Extents, Turns, each, lock};
use crate::zeroes::are_zero;
use crate::{Error, Progress, Result};

/// After which backup to read only what has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Since {
    /// None: everything is read.
    #[default]
    Beginning,
    /// The last one of this disk.
    Last,
    /// This one of this disk.
    Backup(String),
}

/// What a backup may cost guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// The longest that a write may be held up (for long ones, for each 16 MiB); after that the backup fails.
    pub longest_delay: Duration,
    /// The most bytes of overwritten content that are kept aside; beyond that the backup fails.
    pub most_kept: u64,
    /// Threads that read and compress.
    pub threads: usize,
}

impl Default for Cost {
    fn default() -> Self {
        Cost { longest_delay: Duration::from_secs(2), most_kept: u64::MAX, threads: 2 }
    }
}

/// What to back up.
#[derive(Clone, Debug)]
pub struct Backup {
    /// The disk's name in the store.
    pub disk: String,
    /// The backup's name; the time where none is given.
    pub name: Option<String>,
    /// What to read.
    pub since: Since,
    /// Have a bitmap begin, for the next backup to read only what has changed. One that was made for the backup before
    /// goes then.
    pub checkpoint: bool,
    /// The level of zstd's compression.
    pub level: i32,
    /// What it may cost.
    pub cost: Cost,
}

impl Backup {
    /// Everything of a disk, with the defaults.
    pub fn new(disk: impl Into<String>) -> Self {
        Backup {
            disk: disk.into(),
            name: None,
            since: Since::Beginning,
            checkpoint: false,
            level: 3,
            cost: Cost::default(),
        }
    }
}

/// What a backup has done. Bytes.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Done {
    /// Its name.
    pub name: String,
    /// The disk's size.
    pub size: u64,
    /// What was read of the disk.
    pub read: u64,
    /// What was new to the store, compressed.
    pub stored: u64,
    /// The backup that it was made after.
    pub parent: Option<String>,
}

/// Backs up the disk of an open session, as it is at one instant, while others write to it.
///
/// # Errors
/// The disk has no bitmaps, the one before has left none, the disk or the store fails, or guests would have had to wait
/// too long. The store is then as it was, and the bitmap of the backup before has gone on.
pub fn backup(
    session: &Arc<dyn Session>,
    store: &Store,
    backup: &Backup,
    progress: &dyn Progress,
) -> Result<Done> {
    let none = || Error::Refused("the disk has no bitmaps, so it cannot be backed up".into());
    let track = session.track().ok_or_else(none)?.clone();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let stamp = rfc3339(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
    let name = backup
        .name
        .clone()
        .unwrap_or_else(|| format!("{}.{:03}", stamp.trim_end_matches('Z'), now.subsec_millis()));
    let adding = store.begin(&backup.disk, &name, backup.level)?;
    let parent = parent(store, backup, &track)?;
    let bitmap = backup.checkpoint.then(|| store.bitmap_name(&name));
    let old = parent.as_ref().and_then(|parent| parent.about.bitmap.clone());
    let aside = aside(adding.directory(), session.geometry().size)?;
    let freeze = Freeze {
        since: old.as_deref(),
        retire: false,
        start: bitmap.as_deref().map(|name| (name, DEFAULT_GRANULARITY, true)),
        block: DEFAULT_GRANULARITY,
        widen: store.chunk_size().into(),
        store: aside,
        limit: backup.cost.most_kept,
        longest_delay: backup.cost.longest_delay,
    };
    let (frozen, _) = Frozen::new(session, &freeze)?;
    // From here on there is a bitmap to take back where the backup fails.
    let fill = || -> Result<Done> {
        match session.keep_bitmaps().map_err(|error| (error.kind(), error)) {
            Err((ErrorKind::Unsupported, error)) if bitmap.is_some() => {
                // Of use until the disk is closed.
                tracing::warn!("{}: {error}", backup.disk);
            }
            Err((_, error)) if bitmap.is_some() => return Err(error.into()),
            _ => {}
        }
        let (chunks, read) = read(&frozen, &adding, store, parent.as_ref(), backup, progress)?;
        let about = About {
            disk: backup.disk.clone(),
            name: name.clone(),
            milliseconds: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            parent: parent.as_ref().map(|parent| parent.about.name.clone()),
            bitmap: bitmap.clone(),
            read,
            stored: adding.stored(),
        };
        let manifest = Manifest { size: frozen.geometry().size, chunk: store.chunk_size(), about, chunks };
        progress.step("making it durable", 0);
        adding.finish(&manifest)?;
        let Manifest { size, about, .. } = manifest;
        Ok(Done { name: about.name, size, read, stored: about.stored, parent: about.parent })
    };
    let done = fill();
    // Guests need not wait any more.
    drop(frozen);
    // Whichever is of no use any more: the one that began, or the one of before.
    let superfluous = match (&done, &bitmap) {
        (Err(_), Some(new)) => Some(new),
        (Ok(_), Some(_)) => old.as_ref(),
        _ => None,
    };
    if let Some(name) = superfluous {
        let removed = track.remove(name).map_err(|error| error.to_string());
        if let Err(error) = removed.and_then(|()| session.keep_bitmaps().map_err(|error| error.to_string())) {
            tracing::warn!("the bitmap `{name}` stays: {error}");
        }
    }
    done
}

/// The backup to begin from, which has left a bitmap.
fn parent(store: &Store, backup: &Backup, track: &Track) -> Result<Option<Manifest>> {
    let disk = &backup.disk;
    let name = match &backup.since {
        Since::Beginning => return Ok(None),
        Since::Backup(name) => name.clone(),
        Since::Last => {
            let last = store.list(Some(disk))?.pop();
            let none =
                || Error::Refused(format!("there is no backup of `{disk}` yet: make a full one first"));
            last.ok_or_else(none)?.about.name
        }
    };
    let manifest = store.manifest(disk, &name)?;
    let without = |why: &str| {
        let message = format!("the backup `{name}` of `{disk}` {why}: make a full one with --checkpoint");
        Err(Error::Refused(message))
    };
    match &manifest.about.bitmap {
        None => without("was made without a checkpoint, so what has changed since is not known"),
        Some(bitmap) if track.bitmap(bitmap).is_err() => without("has its bitmap no more"),
        Some(_) => Ok(Some(manifest)),
    }
}

/// A file of holes, as long as the disk, for what guests overwrite; nobody else has it.
fn aside(directory: &Path, size: u64) -> Result<Arc<Backend>> {
    let path = directory.join("overwritten");
    let make = || File::create_new(&path)?.set_len(size.max(1));
    make().map_err(Error::io(&path, "make it"))?;
    let backend = Backend::open(&path, Options { cache: Cache::Writeback, ..Options::default() })?;
    // With the last that uses it, its room is free again.
    std::fs::remove_file(&path).map_err(Error::io(&path, "remove it"))?;
    Ok(backend)
}

/// What the disk consists of, as far as it is wanted.
struct Wanted<'a> {
    client: &'a Client,
    bitmap: &'a Bitmap,
}

impl Extents for Wanted<'_> {
    fn extents(&self, offset: u64, len: u64) -> Result<Vec<(u64, bool)>> {
        let end = offset + len;
        match self.bitmap.next_run(offset..end) {
            // What is not wanted is passed over like a hole; the caller tells them apart.
            None => Ok(vec![(len, false)]),
            Some(run) if run.start > offset => Ok(vec![(run.start - offset, false)]),
            Some(run) => Extents::extents(self.client, offset, run.end - offset),
        }
    }
}

/// Reads what is wanted into the store; the rest is what the backup before has. Gives all chunks, and the bytes read.
fn read(
    frozen: &Arc<Frozen>,
    adding: &super::Adding<'_>,
    store: &Store,
    parent: Option<&Manifest>,
    backup: &Backup,
    progress: &dyn Progress,
) -> Result<(Vec<Hash>, u64)> {
    let size = frozen.geometry().size;
    let refused = |error: super::ManifestError| Error::Refused(format!("the disk {error}"));
    let count = count(size, store.chunk_size()).map_err(refused)?;
    let mut chunks = parent.map(|parent| parent.chunks.clone()).unwrap_or_default();
    if let Some(parent) = parent {
        // A last chunk that was shorter is another one now, and its blocks may never have been written.
        let last = parent.chunks.len().wrapping_sub(1);
        if parent.size < size && parent.len(last) < store.chunk_size() as usize {
            let start = last as u64 * u64::from(store.chunk_size());
            if !frozen.wanted().is_marked(start) {
                let grown = grown_chunk(store, parent, last, size)?;
                chunks[last] = if are_zero(&grown) { Hash::ZEROES } else { adding.put(&grown)? };
            }
        }
    }
    if parent.is_some_and(|parent| parent.size > size) {
        return Err(Error::Refused("the disk has become smaller: make a full backup".into()));
    }
    chunks.resize(count, Hash::ZEROES);
    let chunks = Mutex::new(chunks);
    let read = AtomicU64::new(0);

    let reactor = Reactor::spawn("vbd-backup", Settings::default());
    let reactor = reactor.map_err(Error::io("vbd-backup".as_ref(), "start a thread"))?;
    let client = Client::new(&reactor.handle(), frozen.clone())?;
    progress.step("reading", size);
    let unit = u64::from(store.chunk_size());
    let wanted = frozen.wanted();
    let extents = Wanted { client: &client, bitmap: wanted };
    let pieces = Chunks::new(&extents, 0, size, unit, unit);
    let own = || Buffer::new(store.chunk_size() as usize);
    each(pieces, backup.cost.threads, &Turns::default(), progress, own, |buffer, piece| {
        if !piece.data {
            return pass(&client, wanted, piece, unit, &chunks);
        }
        let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
        client.read(piece.offset, buffer, len)?;
        // Guests need not wait for it any more.
        client.discard(piece.offset, piece.len)?;
        read.fetch_add(piece.len, Ordering::Relaxed);
        let hash = if are_zero(&buffer[..len]) { Hash::ZEROES } else { adding.put(&buffer[..len])? };
        lock(&chunks)[usize::try_from(piece.offset / unit).unwrap_or(usize::MAX)] = hash;
        Ok(true)
    })?;
    frozen.check()?;
    let chunks = chunks.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok((chunks, read.into_inner()))
}

/// A part of the disk without data: where it is wanted, it has become zeroes.
fn pass(
    client: &Client,
    wanted: &Bitmap,
    piece: Chunk,
    unit: u64,
    chunks: &Mutex<Vec<Hash>>,
) -> Result<bool> {
    for run in wanted.runs(piece.offset..piece.end()) {
        let indices = run.start / unit..run.end.div_ceil(unit);
        for index in indices {
            if let Some(hash) = lock(chunks).get_mut(usize::try_from(index).unwrap_or(usize::MAX)) {
                *hash = Hash::ZEROES;
            }
        }
        client.discard(run.start, run.end - run.start)?;
    }
    Ok(true)
}

/// The last chunk of a disk that has grown since.
fn grown_chunk(store: &Store, parent: &Manifest, index: usize, size: u64) -> Result<Vec<u8>> {
    let len = Manifest { size, chunks: Vec::new(), ..parent.clone() }.len(index);
    let mut bytes = match parent.chunks[index] {
        Hash::ZEROES => Vec::new(),
        hash => store.get(&hash, parent.len(index))?,
    };
    bytes.resize(len, 0);
    Ok(bytes)
}
