//! A directory with the backups of many disks: chunks that they share, and a manifest for each backup.
//!
//! A chunk is whole when it has its name: new ones lie apart until all of them are durable, and the manifest comes last.
//! Whoever reads or adds holds the store's lock shared; taking chunks away needs it alone.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::chain::Chain;
use super::manifest::{self, About, Hash, Manifest};
use crate::ranges::lock;
use crate::{Error, Result};

/// Says that a directory is a store.
const MARK: &str = "vbd-store.json";
const VERSION: u32 = 1;
/// Bytes of a chunk in a new store.
const CHUNK: u32 = 1 << 20;
/// The longest file of the store that is read at once, in bytes.
const LONGEST: u64 = 4 << 30;
/// What manifests' names end with.
const END: &str = "backup";

#[derive(Serialize, Deserialize)]
struct Mark {
    version: u32,
    /// Bytes of each chunk.
    chunk: u32,
    /// A number by chance: bitmaps are named after it.
    id: String,
}

/// An open store.
pub struct Store {
    path: PathBuf,
    chunk: u32,
    id: String,
    lock: File,
}

/// A backup as it is listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// The disk's size in bytes.
    pub size: u64,
    /// What is told of it.
    #[serde(flatten)]
    pub about: About,
}

/// How the store may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// With others, to read and to add.
    Shared,
    /// Alone, to take away.
    Alone,
}

impl Store {
    /// Opens the store in this directory.
    ///
    /// # Errors
    /// There is none, or others have it in a way that does not go with `how`.
    pub fn open(path: &Path, how: Use) -> Result<Store> {
        let mark = path.join(MARK);
        let text = match fs::read(&mark) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let what =
                    if Chain::is_one(path) { "is for chains: say --chain" } else { "holds no backups" };
                let message = format!("{}: {what} (there is no {MARK})", path.display());
                return Err(Error::Refused(message));
            }
            Err(error) => return Err(Error::io(&mark, "read it")(error)),
        };
        let damaged = |what: &str| Error::Refused(format!("{}: {what}", mark.display()));
        let Mark { version, chunk, id } =
            serde_json::from_slice(&text).map_err(|error| damaged(&error.to_string()))?;
        if version != VERSION {
            return Err(damaged(&format!("is of version {version}, and only version {VERSION} is known")));
        }
        if !chunk.is_power_of_two() || !manifest::CHUNKS.contains(&chunk) || !is_name(&id) {
            return Err(damaged("says what cannot be"));
        }
        let lock = path.join("lock");
        let file = File::options().create(true).append(true).open(&lock);
        let file = file.map_err(Error::io(&lock, "open it"))?;
        let wanted = match how {
            Use::Shared => FlockOperation::NonBlockingLockShared,
            Use::Alone => FlockOperation::NonBlockingLockExclusive,
        };
        if flock(file.as_fd(), wanted).is_err() {
            let message = match how {
                Use::Shared => "somebody is taking old backups away: try again when that is done",
                Use::Alone => "somebody is using the store: try again when that is done",
            };
            return Err(Error::Refused(format!("{}: {message}", path.display())));
        }
        Ok(Store { path: path.to_owned(), chunk, id, lock: file })
    }

    /// The same, and makes a store of an empty directory, or of one that is not there yet.
    ///
    /// # Errors
    /// As for [`open`](Self::open), or the directory has something else in it.
    pub fn open_or_create(path: &Path) -> Result<Store> {
        if path.join(MARK).exists() {
            return Store::open(path, Use::Shared);
        }
        let io = |doing| Error::io(path, doing);
        fs::create_dir_all(path).map_err(io("make it"))?;
        if fs::read_dir(path).map_err(io("look into it"))?.next().is_some() {
            let message = format!("{}: is neither empty nor a store of backups", path.display());
            return Err(Error::Refused(message));
        }
        for directory in ["chunks", "backups"] {
            fs::create_dir_all(path.join(directory)).map_err(io("make directories in it"))?;
        }
        let id = random_hex().map_err(io("choose a number for it"))?;
        let mark = serde_json::to_vec(&Mark { version: VERSION, chunk: CHUNK, id }).map_err(io::Error::from);
        mark.and_then(|mark| write_whole(&path.join(MARK), &mark)).map_err(io("write to it"))?;
        Store::open(path, Use::Shared)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of each chunk.
    pub fn chunk_size(&self) -> u32 {
        self.chunk
    }

    /// The name of the bitmap for what changes after this backup.
    pub fn bitmap_name(&self, backup: &str) -> String {
        format!("backup-{}-{backup}", &self.id[..self.id.len().min(8)])
    }

    fn chunk_path(&self, hash: &Hash) -> PathBuf {
        let name = hash.hex();
        let mut path = self.path.join("chunks");
        path.push(&name[..2]);
        path.push(&name[2..]);
        path
    }

    fn manifest_path(&self, disk: &str, name: &str) -> Result<PathBuf> {
        check_names(&[disk, name])?;
        Ok(self.path.join("backups").join(disk).join(format!("{name}.{END}")))
    }

    /// The backups there are, of one disk or of all, oldest first. What cannot be read is told of in the log.
    ///
    /// # Errors
    /// The directories cannot be read.
    pub fn list(&self, disk: Option<&str>) -> Result<Vec<Listed>> {
        Ok(listed(&self.manifests(disk)?))
    }

    /// The files of all manifests, or of those of a disk.
    fn manifests(&self, disk: Option<&str>) -> Result<Vec<PathBuf>> {
        let backups = self.path.join("backups");
        let directories = match disk {
            Some(disk) => vec![backups.join(disk)],
            None => entries(&backups)?,
        };
        let mut all = Vec::new();
        for directory in directories.iter().filter(|directory| directory.is_dir()) {
            all.extend(
                entries(directory)?.into_iter().filter(|path| path.extension().is_some_and(|end| end == END)),
            );
        }
        Ok(all)
    }

    /// Reads a backup's manifest.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn manifest(&self, disk: &str, name: &str) -> Result<Manifest> {
        let path = self.manifest_path(disk, name)?;
        if !path.exists() {
            let message = format!("{}: has no backup `{name}` of `{disk}`", self.path.display());
            return Err(Error::Refused(message));
        }
        self.read_manifest(&path)
    }

    fn read_manifest(&self, path: &Path) -> Result<Manifest> {
        let bytes = read(path).map_err(Error::io(path, "read it"))?;
        let refused = |error: String| Error::Refused(format!("{}: {error}", path.display()));
        let manifest = Manifest::parse(&bytes).map_err(|error| refused(error.to_string()))?;
        if manifest.chunk != self.chunk {
            return Err(refused("has chunks of another size than the store".into()));
        }
        Ok(manifest)
    }

    /// Reads a chunk of `len` bytes, and makes sure that it is the right one.
    ///
    /// # Errors
    /// It is missing or damaged.
    pub fn get(&self, hash: &Hash, len: usize) -> Result<Vec<u8>> {
        let path = self.chunk_path(hash);
        let bytes = read(&path).map_err(Error::io(&path, "read this chunk"))?;
        // No longer than it may be, whatever the frame says.
        let bytes = zstd::bulk::decompress(&bytes, len).map_err(Error::io(&path, "unpack this chunk"))?;
        if bytes.len() != len || Hash::of(&bytes) != *hash {
            let message =
                format!("{}: is damaged: its bytes are not those it is named after", path.display());
            return Err(Error::Refused(message));
        }
        Ok(bytes)
    }

    /// Begins to add a backup.
    ///
    /// # Errors
    /// There is one of that name, or the name is none.
    pub fn begin(&self, disk: &str, name: &str, level: i32) -> Result<Adding<'_>> {
        let manifest = self.manifest_path(disk, name)?;
        if manifest.exists() {
            return Err(Error::Refused(format!("there is a backup `{name}` of `{disk}` already")));
        }
        let number = random_hex().map_err(Error::io(&self.path, "choose a name"))?;
        let incoming = self.path.join(format!("incoming-{number}"));
        fs::create_dir(&incoming).map_err(Error::io(&incoming, "make it"))?;
        Ok(Adding {
            store: self,
            manifest,
            incoming,
            level,
            new: Mutex::default(),
            stored: AtomicU64::new(0),
        })
    }

    /// Takes backups away and every chunk that none needs any more; gives the bytes that were freed.
    ///
    /// # Errors
    /// The store is not held [alone](Use::Alone), a backup is not there, or one that stays cannot be read: then nothing
    /// is known to be superfluous.
    pub fn prune(&self, remove: &[(String, String)]) -> Result<u64> {
        if flock(self.lock.as_fd(), FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(Error::Refused(format!("{}: somebody is using the store", self.path.display())));
        }
        let remove = remove.iter().map(|(disk, name)| self.manifest_path(disk, name));
        let remove: HashSet<PathBuf> = remove.collect::<Result<_>>()?;
        let mut needed = HashSet::new();
        for path in self.manifests(None)?.into_iter().filter(|path| !remove.contains(path)) {
            needed.extend(self.read_manifest(&path)?.chunks);
        }
        for path in &remove {
            fs::remove_file(path).map_err(Error::io(path, "remove it"))?;
        }
        // Before the chunks, or a backup would be there without them.
        sync_all(&self.path)?;
        let mut freed = 0;
        for directory in entries(&self.path.join("chunks"))? {
            let head = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
            for path in entries(&directory)? {
                let tail = path.file_name().unwrap_or_default().to_string_lossy();
                if Hash::from_hex(&format!("{head}{tail}")).is_some_and(|hash| !needed.contains(&hash)) {
                    freed += fs::metadata(&path).map_or(0, |metadata| metadata.len());
                    fs::remove_file(&path).map_err(Error::io(&path, "remove it"))?;
                }
            }
        }
        // Those that add hold the lock: whoever has left these is gone.
        let left = entries(&self.path)?.into_iter();
        for path in left.filter(|path| {
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"incoming-"))
        }) {
            fs::remove_dir_all(&path).map_err(Error::io(&path, "remove it"))?;
        }
        Ok(freed)
    }
}

/// A backup that is being added. Where it is dropped, what was stored for it is taken away.
pub struct Adding<'a> {
    store: &'a Store,
    manifest: PathBuf,
    incoming: PathBuf,
    level: i32,
    new: Mutex<HashSet<Hash>>,
    stored: AtomicU64,
}

impl Adding<'_> {
    /// Stores a chunk, unless it is there.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn put(&self, bytes: &[u8]) -> Result<Hash> {
        let hash = Hash::of(bytes);
        // Whoever is first stores it.
        if self.store.chunk_path(&hash).exists() || !lock(&self.new).insert(hash) {
            return Ok(hash);
        }
        let path = self.incoming.join(hash.hex());
        let packed = zstd::bulk::compress(bytes, self.level).map_err(Error::io(&path, "compress it"))?;
        fs::write(&path, &packed).map_err(Error::io(&path, "write it"))?;
        self.stored.fetch_add(packed.len() as u64, Ordering::Relaxed);
        Ok(hash)
    }

    /// Bytes that were new to the store until now, compressed.
    pub fn stored(&self) -> u64 {
        self.stored.load(Ordering::Relaxed)
    }

    /// Where this backup's own files are until it is whole.
    pub fn directory(&self) -> &Path {
        &self.incoming
    }

    /// Makes the backup durable: all of it or nothing.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn finish(self, manifest: &Manifest) -> Result<()> {
        let store = self.store;
        sync_all(&self.incoming)?;
        for hash in lock(&self.new).iter() {
            let (from, to) = (self.incoming.join(hash.hex()), store.chunk_path(hash));
            let rename = || match fs::rename(&from, &to) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    fs::create_dir_all(to.parent().unwrap_or(&store.path))?;
                    fs::rename(&from, &to)
                }
                other => other,
            };
            rename().map_err(Error::io(&to, "give this chunk its name"))?;
        }
        sync_all(&store.path)?;
        let write = || {
            fs::create_dir_all(self.manifest.parent().unwrap_or(&store.path))?;
            write_whole(&self.manifest, &manifest.encode()?)
        };
        write().map_err(Error::io(&self.manifest, "write it"))?;
        sync_all(&store.path)
    }
}

impl Drop for Adding<'_> {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.incoming) {
            tracing::warn!("{}: {error}", self.incoming.display());
        }
    }
}

/// What these manifests tell, oldest first. What cannot be read is told of in the log.
pub(super) fn listed(manifests: &[PathBuf]) -> Vec<Listed> {
    let mut list = Vec::new();
    for path in manifests {
        match read(path).map_err(Error::io(path, "read it")).and_then(|bytes| {
            let about = Manifest::about(&bytes);
            about.map_err(|error| Error::Refused(format!("{}: {error}", path.display())))
        }) {
            Ok((size, about)) => list.push(Listed { size, about }),
            Err(error) => tracing::warn!("{error}"),
        }
    }
    list.sort_by(|a, b| (a.about.milliseconds, &a.about.name).cmp(&(b.about.milliseconds, &b.about.name)));
    list
}

/// Refuses what is no name for a disk or a backup: files are named after them.
pub(super) fn check_names(names: &[&str]) -> Result<()> {
    match names.iter().find(|name| !is_name(name)) {
        None => Ok(()),
        Some(name) => {
            let shown = name.escape_debug();
            let message = format!(
                "`{shown}` is no name for a disk or a backup: up to 128 letters, digits, `-`, `_`, `.`, `:` and `@`, and not `.` at the start"
            );
            Err(Error::Refused(message))
        }
    }
}

pub(super) fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "-_.:@".contains(c);
    (1..=128).contains(&name.len()) && !name.starts_with('.') && name.chars().all(good)
}

pub(super) fn random_hex() -> io::Result<String> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

pub(super) fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let list = fs::read_dir(directory).and_then(|list| list.map(|entry| Ok(entry?.path())).collect());
    list.map_err(Error::io(directory, "look into it"))
}

pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(LONGEST).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes a file that is there as a whole or not at all.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("new");
    let write = || {
        let mut file = File::create(&draft)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&draft, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&draft);
    })?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// Makes everything in the filesystem of this directory durable: cheaper than file by file.
fn sync_all(path: &Path) -> Result<()> {
    let sync = || rustix::fs::syncfs(File::open(path)?).map_err(io::Error::from);
    sync().map_err(Error::io(path, "make it durable"))
}
