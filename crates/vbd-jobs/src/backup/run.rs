//! Taking a backup.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vbd_core::Session;
use vbd_core::client::Buffer;
use vbd_core::track::{Frozen, Track};
use vbd_image::clock::rfc3339;

use super::instant::{self, Bitmaps};
use super::manifest::{About, Hash, Manifest, count};
use super::reading::{self, Target};
use super::store::{Listed, Store};
use crate::ranges::lock;
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
    /// Bytes of memory for such content; beyond half of it, it goes to a file.
    pub memory: u64,
    /// Threads that read and compress.
    pub threads: usize,
}

impl Default for Cost {
    fn default() -> Self {
        Cost { longest_delay: Duration::from_secs(2), most_kept: u64::MAX, memory: 128 << 20, threads: 2 }
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
    let track = instant::track(session)?;
    let (milliseconds, name) = backup.named();
    let adding = store.begin(&backup.disk, &name, backup.level)?;
    let parent = match backup.parent_name(|| store.list(Some(&backup.disk)))? {
        Some(parent) => Some(backup.usable_parent(store.manifest(&backup.disk, &parent)?, track)?),
        None => None,
    };
    let bitmap = backup.checkpoint.then(|| store.bitmap_name(&name));
    let old = parent.as_ref().and_then(|parent| parent.about.bitmap.clone());
    let bitmaps = Bitmaps { old: old.as_deref(), new: bitmap.as_deref() };
    let directory = adding.directory().to_owned();
    let unit = store.chunk_size().into();
    instant::at_one(session, &backup.disk, &bitmaps, &directory, unit, &backup.cost, |frozen| {
        let (chunks, read) = read(frozen, &adding, store, parent.as_ref(), backup, progress)?;
        let about = About {
            disk: backup.disk.clone(),
            name,
            milliseconds,
            parent: parent.as_ref().map(|parent| parent.about.name.clone()),
            bitmap: bitmap.clone(),
            read,
            stored: adding.stored(),
            image: None,
        };
        let manifest = Manifest { size: frozen.geometry().size, chunk: store.chunk_size(), about, chunks };
        progress.step("making it durable", 0);
        adding.finish(&manifest)?;
        let Manifest { size, about, .. } = manifest;
        Ok(Done { name: about.name, size, read, stored: about.stored, parent: about.parent })
    })
}

impl Backup {
    /// Now, in milliseconds since 1970, and the backup's name.
    pub(super) fn named(&self) -> (u64, String) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let stamp = rfc3339(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        let time = || format!("{}.{:03}", stamp.trim_end_matches('Z'), now.subsec_millis());
        let milliseconds = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        (milliseconds, self.name.clone().unwrap_or_else(time))
    }

    /// The name of the backup to begin from, if any; `list` gives those there are.
    pub(super) fn parent_name(&self, list: impl FnOnce() -> Result<Vec<Listed>>) -> Result<Option<String>> {
        let disk = &self.disk;
        match &self.since {
            Since::Beginning => Ok(None),
            Since::Backup(name) => Ok(Some(name.clone())),
            Since::Last => {
                let none =
                    || Error::Refused(format!("there is no backup of `{disk}` yet: make a full one first"));
                Ok(Some(list()?.pop().ok_or_else(none)?.about.name))
            }
        }
    }

    /// The same backup, if it has left a bitmap.
    pub(super) fn usable_parent(&self, manifest: Manifest, track: &Track) -> Result<Manifest> {
        let (name, disk) = (&manifest.about.name, &self.disk);
        let without = |why: &str| {
            let message = format!("the backup `{name}` of `{disk}` {why}: make a full one with --checkpoint");
            Err(Error::Refused(message))
        };
        match &manifest.about.bitmap {
            None => without("was made without a checkpoint, so what has changed since is not known"),
            Some(bitmap) if track.bitmap(bitmap).is_err() => without("has its bitmap no more"),
            Some(_) => Ok(manifest),
        }
    }
}

/// The chunks of a backup that is being taken.
struct Chunked<'a, 'b> {
    adding: &'a super::Adding<'b>,
    unit: u64,
    chunks: Mutex<Vec<Hash>>,
}

impl Chunked<'_, '_> {
    fn set(&self, index: u64, hash: Hash) {
        if let Some(chunk) = lock(&self.chunks).get_mut(usize::try_from(index).unwrap_or(usize::MAX)) {
            *chunk = hash;
        }
    }
}

impl Target for Chunked<'_, '_> {
    fn content(&self, offset: u64, buffer: &mut Buffer, len: usize) -> Result<()> {
        let bytes = &buffer[..len];
        self.set(offset / self.unit, if are_zero(bytes) { Hash::ZEROES } else { self.adding.put(bytes)? });
        Ok(())
    }

    fn empty(&self, offset: u64, len: u64) -> Result<()> {
        let indices = offset / self.unit..(offset + len).div_ceil(self.unit);
        indices.for_each(|index| self.set(index, Hash::ZEROES));
        Ok(())
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
    let unit = u64::from(store.chunk_size());
    let target = Chunked { adding, unit, chunks: Mutex::new(chunks) };
    let read = reading::read(frozen, unit, unit, &backup.cost, &target, progress)?;
    let chunks = target.chunks.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok((chunks, read))
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
