//! A directory of backups that other programs can use as they are: for each disk a full image, and for each later backup
//! a qcow2 image over the one before.
//!
//! An image has its name when it is whole and durable; its manifest comes after that, and tells what each part of it was
//! when it was read. An image without a manifest is whole, but no backup: nothing builds on it.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use vbd_core::Session;
use vbd_core::client::Buffer;
use vbd_formats::{Format, ImageSpec, Kind, NewImage};

use super::instant::{self, Bitmaps};
use super::manifest::{About, Hash, Manifest, StoredImage, count};
use super::reading::{self, Target};
use super::run::{Backup, Done};
use super::store::{Listed, check_names, entries, is_name, listed, random_hex, read, write_whole};
use crate::journal::sync_directory;
use crate::ranges::lock;
use crate::zeroes::{are_zero, runs};
use crate::{Error, Image, Progress, Result};

/// Says that a directory holds chains.
const MARK: &str = "vbd-chain.json";
const VERSION: u32 = 1;
/// What manifests' names end with.
const END: &str = "backup";
/// What is read and written at once at most, in bytes.
const PIECE: u64 = 1 << 20;
/// The least that is told apart, in bytes: a cluster.
const CLUSTER: u64 = 64 << 10;
/// The most parts of a disk that are told apart, until each has [`PIECE`].
const PARTS: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
struct Mark {
    version: u32,
    /// A number by chance: bitmaps are named after it.
    id: String,
}

/// An open directory of chains.
pub struct Chain {
    path: PathBuf,
    id: String,
}

impl Chain {
    /// Whether a directory holds chains.
    pub fn is_one(path: &Path) -> bool {
        path.join(MARK).exists()
    }

    /// Opens a directory of chains.
    ///
    /// # Errors
    /// It is none, or cannot be read.
    pub fn open(path: &Path) -> Result<Chain> {
        let mark = path.join(MARK);
        let text = read(&mark).map_err(Error::io(&mark, "read it"))?;
        let damaged = |what: &str| Error::Refused(format!("{}: {what}", mark.display()));
        let Mark { version, id } =
            serde_json::from_slice(&text).map_err(|error| damaged(&error.to_string()))?;
        if version != VERSION {
            return Err(damaged(&format!("is of version {version}, and only version {VERSION} is known")));
        }
        if !is_name(&id) {
            return Err(damaged("says what cannot be"));
        }
        Ok(Chain { path: path.to_owned(), id })
    }

    /// The same, and makes one of an empty directory, or of one that is not there yet.
    ///
    /// # Errors
    /// As for [`open`](Self::open), or the directory has something else in it.
    pub fn open_or_create(path: &Path) -> Result<Chain> {
        if !Chain::is_one(path) {
            let io = |doing| Error::io(path, doing);
            fs::create_dir_all(path).map_err(io("make it"))?;
            if fs::read_dir(path).map_err(io("look into it"))?.next().is_some() {
                let message =
                    format!("{}: is neither empty nor a directory of chains of backups", path.display());
                return Err(Error::Refused(message));
            }
            let id = random_hex().map_err(io("choose a number for it"))?;
            let mark = serde_json::to_vec(&Mark { version: VERSION, id }).map_err(io::Error::from);
            mark.and_then(|mark| write_whole(&path.join(MARK), &mark)).map_err(io("write to it"))?;
        }
        Chain::open(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name of the bitmap for what changes after this backup.
    pub fn bitmap_name(&self, backup: &str) -> String {
        format!("backup-{}-{backup}", &self.id[..self.id.len().min(8)])
    }

    fn disk(&self, disk: &str) -> Result<PathBuf> {
        check_names(&[disk])?;
        Ok(self.path.join(disk))
    }

    /// The backups there are, of one disk or of all, oldest first. What cannot be read is told of in the log.
    ///
    /// # Errors
    /// The directories cannot be read.
    pub fn list(&self, disk: Option<&str>) -> Result<Vec<Listed>> {
        let directories = match disk {
            Some(disk) => vec![self.disk(disk)?],
            None => entries(&self.path)?,
        };
        let mut all = Vec::new();
        for directory in directories.iter().filter(|directory| directory.is_dir()) {
            let manifests = entries(directory)?.into_iter();
            all.extend(manifests.filter(|path| path.extension().is_some_and(|end| end == END)));
        }
        Ok(listed(&all))
    }

    /// Reads a backup's manifest.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn manifest(&self, disk: &str, name: &str) -> Result<Manifest> {
        check_names(&[name])?;
        let path = self.disk(disk)?.join(format!("{name}.{END}"));
        if !path.exists() {
            let message = format!("{}: has no backup `{name}` of `{disk}`", self.path.display());
            return Err(Error::Refused(message));
        }
        let bytes = read(&path).map_err(Error::io(&path, "read it"))?;
        let refused = |error: String| Error::Refused(format!("{}: {error}", path.display()));
        let manifest = Manifest::parse(&bytes).map_err(|error| refused(error.to_string()))?;
        match &manifest.about.image {
            Some(image) if is_name(&image.file) => Ok(manifest),
            _ => Err(refused("does not say which image it is of".into())),
        }
    }

    /// The image of a backup, with those that it stands on.
    ///
    /// # Errors
    /// The manifest does not say which, or of a format that is none.
    pub fn image(&self, manifest: &Manifest) -> Result<ImageSpec> {
        let refused = |what: String| Error::Refused(format!("the backup `{}` {what}", manifest.about.name));
        let image = manifest.about.image.as_ref().ok_or_else(|| refused("has no image".into()))?;
        let format = image.format.parse::<Format>().map_err(|error| refused(error.to_string()))?;
        let path = self.disk(&manifest.about.disk)?.join(&image.file);
        Ok(ImageSpec::new(path, format).read_only())
    }

    /// Compares every part of a backup's image that the backup has written with what was read then. Gives the bytes.
    ///
    /// # Errors
    /// It is something else, or cannot be read.
    pub fn verify(&self, manifest: &Manifest, progress: &dyn Progress) -> Result<u64> {
        let spec = self.image(manifest)?;
        let structure = vbd_formats::check(&spec, None);
        let wrong = match &structure {
            Ok(checked) => (checked.errors > 0).then(|| checked.findings.join("; ")),
            // There is nothing to be checked in a raw image.
            Err(_) if spec.format == Format::Raw => None,
            Err(error) => Some(error.to_string()),
        };
        if let Some(wrong) = wrong {
            return Err(Error::Refused(format!("{}: is damaged: {wrong}", spec.path.display())));
        }
        let disk = Image::of(vbd_formats::open(&spec)?)?;
        let mut buffer = Buffer::new(manifest.chunk as usize);
        let mut bytes = 0;
        progress.step("verifying", manifest.size);
        for (index, hash) in manifest.chunks.iter().enumerate() {
            if progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let len = manifest.len(index);
            if *hash != Hash::ELSEWHERE {
                let offset = index as u64 * u64::from(manifest.chunk);
                disk.read(offset, &mut buffer, len)?;
                let is_good = match *hash {
                    Hash::ZEROES => are_zero(&buffer[..len]),
                    hash => Hash::of(&buffer[..len]) == hash,
                };
                if !is_good {
                    let message =
                        format!("is damaged: byte {offset} and those behind it are not what was backed up");
                    return Err(Error::Refused(format!("{}: {message}", spec.path.display())));
                }
                bytes += len as u64;
            }
            progress.advance(len as u64);
        }
        Ok(bytes)
    }
}

/// What belongs to a backup that is being taken; gone when it is dropped.
struct Incoming {
    directory: PathBuf,
    draft: PathBuf,
    /// Keeps a second backup of the disk away.
    _lock: File,
}

impl Incoming {
    /// Begins one. What others have left that were stopped goes.
    fn begin(directory: &Path) -> Result<Incoming> {
        fs::create_dir_all(directory).map_err(Error::io(directory, "make it"))?;
        let path = directory.join(".lock");
        let lock =
            File::options().create(true).append(true).open(&path).map_err(Error::io(&path, "open it"))?;
        if flock(lock.as_fd(), FlockOperation::NonBlockingLockExclusive).is_err() {
            let message = format!("{}: another backup of this disk is being taken", directory.display());
            return Err(Error::Refused(message));
        }
        let incoming = Incoming {
            directory: directory.join(".incoming"),
            draft: directory.join(".incoming.image"),
            _lock: lock,
        };
        incoming.clear();
        fs::create_dir(&incoming.directory).map_err(Error::io(&incoming.directory, "make it"))?;
        Ok(incoming)
    }

    fn clear(&self) {
        for result in [fs::remove_dir_all(&self.directory), fs::remove_file(&self.draft)] {
            if let Err(error) = result
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!("{}: {error}", self.directory.display());
            }
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Backs up the disk of an open session, as it is at one instant, into an image of its own: one of `format` (raw or qcow2)
/// where everything is read, else a qcow2 image over that of the backup before.
///
/// # Errors
/// As [`backup`](super::backup()); there is no image then, and the bitmap of the backup before has gone on.
pub fn backup_to_chain(
    session: &Arc<dyn Session>,
    chain: &Chain,
    format: Format,
    backup: &Backup,
    progress: &dyn Progress,
) -> Result<Done> {
    let track = instant::track(session)?;
    let (milliseconds, mut name) = backup.named();
    if backup.name.is_none() {
        name = name.replace(':', "");
    }
    check_names(&[&backup.disk, &name])?;
    if let Some(named) = [&backup.disk, &name].into_iter().find(|named| named.contains(':')) {
        // QEMU takes what is before it for a protocol.
        return Err(Error::Refused(format!(
            "`{named}`: files are named after it, and others do not take a `:`"
        )));
    }
    let directory = chain.disk(&backup.disk)?;
    let incoming = Incoming::begin(&directory)?;
    let parent = match backup.parent_name(|| chain.list(Some(&backup.disk)))? {
        Some(parent) => Some(backup.usable_parent(chain.manifest(&backup.disk, &parent)?, track)?),
        None => None,
    };
    let format = if parent.is_some() { Format::Qcow2 } else { format };
    if !matches!(format, Format::Raw | Format::Qcow2) {
        return Err(Error::Refused(format!("a backup is a raw or a qcow2 image, not {format}")));
    }
    let file = format!("{name}.{format}");
    let (image, manifest_path) = (directory.join(&file), directory.join(format!("{name}.{END}")));
    // Also one that was left without a manifest, whatever its format.
    let others = [Format::Raw, Format::Qcow2].map(|format| directory.join(format!("{name}.{format}")));
    if let Some(there) = others.iter().chain([&manifest_path]).find(|path| path.exists()) {
        return Err(Error::Refused(format!("{}: is there already", there.display())));
    }
    let bitmap = backup.checkpoint.then(|| chain.bitmap_name(&name));
    let old = parent.as_ref().and_then(|parent| parent.about.bitmap.clone());
    let bitmaps = Bitmaps { old: old.as_deref(), new: bitmap.as_deref() };
    let size = session.geometry().size;
    let unit = size.div_ceil(PARTS).next_power_of_two().clamp(CLUSTER, PIECE);
    instant::at_one(session, &backup.disk, &bitmaps, &incoming.directory, unit, &backup.cost, |frozen| {
        let size = frozen.geometry().size;
        if parent.as_ref().is_some_and(|parent| parent.size > size) {
            return Err(Error::Refused("the disk has become smaller: make a full backup".into()));
        }
        let chunk = u32::try_from(unit).unwrap_or(u32::MAX);
        let parts = count(size, chunk).map_err(|error| Error::Refused(format!("the disk {error}")))?;
        create(&incoming.draft, format, size, parent.as_ref())?;
        let disk = Image::of(vbd_formats::open(&ImageSpec::new(&incoming.draft, format))?)?;
        let unread = if parent.is_some() { Hash::ELSEWHERE } else { Hash::ZEROES };
        let chunks = Mutex::new(vec![unread; parts]);
        let target = Layer { disk: &disk, unit, covers: parent.is_some(), chunks };
        let read = reading::read(frozen, unit, PIECE, &backup.cost, &target, progress)?;
        let chunks = target.chunks.into_inner().unwrap_or_else(PoisonError::into_inner);
        progress.step("making it durable", 0);
        disk.flush()?;
        // Closed, before it gets its name.
        drop(disk);
        let durable = || {
            File::open(&incoming.draft)?.sync_all()?;
            fs::rename(&incoming.draft, &image)?;
            sync_directory(&image)
        };
        durable().map_err(Error::io(&image, "make it durable"))?;
        let stored = std::os::unix::fs::MetadataExt::blocks(
            &image.metadata().map_err(Error::io(&image, "look at it"))?,
        ) * 512;
        let about = About {
            disk: backup.disk.clone(),
            name: name.clone(),
            milliseconds,
            parent: parent.as_ref().map(|parent| parent.about.name.clone()),
            bitmap: bitmap.clone(),
            read,
            stored,
            image: Some(StoredImage { file, format: format.to_string() }),
        };
        let manifest = Manifest { size, chunk, about, chunks };
        let written = manifest.encode().and_then(|bytes| write_whole(&manifest_path, &bytes));
        written.map_err(Error::io(&manifest_path, "write it")).inspect_err(|_| {
            // Whole, and of no use: nobody knows of it.
            let _ = fs::remove_file(&image);
        })?;
        let Manifest { about, .. } = manifest;
        Ok(Done { name: about.name, size, read, stored, parent: about.parent })
    })
}

/// Makes the empty image.
fn create(draft: &Path, format: Format, size: u64, parent: Option<&Manifest>) -> Result<()> {
    let mut new = NewImage { replace: true, ..NewImage::new(format, size)? };
    if let (Kind::Qcow2(options), Some(image)) =
        (&mut new.kind, parent.and_then(|parent| parent.about.image.as_ref()))
    {
        let (name, format) = (image.file.clone().into_bytes(), image.format.clone());
        options.backing = Some(vbd_qcow2::Backing { name, format });
    }
    Ok(vbd_formats::create(draft, &new)?)
}

/// An image that a backup is written to.
struct Layer<'a> {
    disk: &'a Image,
    /// The bytes of a part that is told apart.
    unit: u64,
    /// It stands on another, which zeroes have to hide.
    covers: bool,
    chunks: Mutex<Vec<Hash>>,
}

impl Layer<'_> {
    fn set(&self, offset: u64, hash: Hash) {
        let index = usize::try_from(offset / self.unit).unwrap_or(usize::MAX);
        if let Some(chunk) = lock(&self.chunks).get_mut(index) {
            *chunk = hash;
        }
    }
}

impl Target for Layer<'_> {
    fn content(&self, offset: u64, buffer: &mut Buffer, len: usize) -> Result<()> {
        let unit = usize::try_from(self.unit).unwrap_or(usize::MAX);
        for (part, bytes) in (offset..).step_by(unit).zip(buffer[..len].chunks(unit)) {
            self.set(part, if are_zero(bytes) { Hash::ZEROES } else { Hash::of(bytes) });
        }
        let cluster = usize::try_from(CLUSTER).unwrap_or(usize::MAX);
        let content = runs(len, cluster, |part| !are_zero(&buffer[part]));
        if self.covers {
            for part in runs(len, cluster, |part| are_zero(&buffer[part])) {
                self.disk.zero(offset + part.start as u64, part.len() as u64, true)?;
            }
        }
        for part in content {
            self.disk.write_part(offset + part.start as u64, buffer, part)?;
        }
        Ok(())
    }

    fn empty(&self, offset: u64, len: u64) -> Result<()> {
        let unit = usize::try_from(self.unit).unwrap_or(usize::MAX);
        (offset..offset + len).step_by(unit).for_each(|part| self.set(part, Hash::ZEROES));
        if self.covers {
            self.disk.zero(offset, len, true)?;
        }
        Ok(())
    }
}
