//! The record beside a leased file: who holds it.
//!
//! A lock of an open file description does not know its process, so whoever has taken the lease says so in
//! `.NAME.lease`, a line of JSON. It serves messages only: where it cannot be written or read, or lies, nothing depends
//! on it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::process::{self, Place};
use super::{Holder, Mode};
use crate::clock::timestamp;

/// Far above what any number of readers needs: a record is not to cost memory.
const MAX_LENGTH: u64 = 64 * 1024;
/// How often, and at which distance, a record that another process is writing at this moment is tried.
const TRIES: u32 = 20;
const TRY_AGAIN: Duration = Duration::from_millis(5);

/// One holder in a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    pid: u32,
    /// Start of the process, in ticks since the boot.
    start: u64,
    namespace: String,
    boot: String,
    host: String,
    command: String,
    since: String,
    mode: Mode,
}

impl Entry {
    /// Whether the process is known to be gone. One of another host or container cannot be looked up.
    fn stale(&self, here: &Place) -> bool {
        if self.boot == here.boot {
            self.namespace == here.namespace && process::start_ticks(self.pid) != Some(self.start)
        } else {
            self.host == here.host
        }
    }
}

/// The contents of a record.
#[derive(Default, Serialize, Deserialize)]
struct Entries {
    holders: Vec<Entry>,
}

/// An entry in the record of a file; [`Record::remove`] takes it out again.
#[derive(Debug)]
pub(super) struct Record {
    path: PathBuf,
    entry: Entry,
}

impl Record {
    /// Enter this process into the record of the file at `path`. `alone`: the lock excludes every other writer and
    /// reader, so that whoever else is in the record is gone.
    pub(super) fn write(path: &Path, mode: Mode, alone: bool) -> io::Result<Self> {
        let here = Place::here();
        let pid = std::process::id();
        let entry = Entry {
            pid,
            start: process::start_ticks(pid).unwrap_or(0),
            command: process::own_command(),
            since: timestamp(SystemTime::now()),
            mode,
            namespace: here.namespace.clone(),
            boot: here.boot.clone(),
            host: here.host.clone(),
        };
        let path = record_path(path)?;
        change(&path, true, |entries| {
            entries.retain(|other| !alone && !other.stale(&here));
            entries.push(entry.clone());
        })?;
        Ok(Record { path, entry })
    }

    /// Take this process out of the record; the last one removes the file.
    pub(super) fn remove(&self) -> io::Result<()> {
        change(&self.path, false, |entries| {
            if let Some(index) = entries.iter().position(|entry| *entry == self.entry) {
                entries.remove(index);
            }
        })
    }
}

/// The holders in the record of the file at `path` that are not known to be gone.
pub(super) fn holders(path: &Path) -> Vec<Holder> {
    let read = || {
        let file = open(&record_path(path)?, OpenOptions::new().read(true))?;
        lock(&file, FlockOperation::NonBlockingLockShared)?;
        parse(&file)
    };
    let here = Place::here();
    let entries = read().unwrap_or_default().holders;
    entries
        .into_iter()
        .filter(|entry| !entry.stale(&here))
        .map(|entry| Holder {
            mode: entry.mode,
            pid: Some(entry.pid),
            command: Some(entry.command),
            host: Some(entry.host),
            since: Some(entry.since),
        })
        .collect()
}

/// `.NAME.lease` beside the file. Symbolic links are followed first, so that all names lead to the same record.
fn record_path(path: &Path) -> io::Result<PathBuf> {
    let path = path.canonicalize()?;
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut record = std::ffi::OsString::from(".");
    record.push(name);
    record.push(".lease");
    Ok(path.with_file_name(record))
}

/// Change the record under its own lock (flock, held only here).
fn change(path: &Path, create: bool, edit: impl FnOnce(&mut Vec<Entry>)) -> io::Result<()> {
    let file = open(path, OpenOptions::new().read(true).write(true).create(create).mode(0o644))?;
    lock(&file, FlockOperation::NonBlockingLockExclusive)?;
    let mut entries = parse(&file)?;
    // Removed by another holder between the opening and the locking: this file has no name any more.
    if file.metadata()?.nlink() == 0 {
        return if create { change(path, create, edit) } else { Ok(()) };
    }
    edit(&mut entries.holders);
    if entries.holders.is_empty() {
        return std::fs::remove_file(path);
    }
    let mut text = serde_json::to_vec(&entries)?;
    text.push(b'\n');
    file.write_all_at(&text, 0)?;
    file.set_len(text.len() as u64)
}

/// Open a record: the directory may belong to somebody else, so nothing but a plain file of one name will do.
fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.nlink() > 1 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a record of a lease"));
    }
    Ok(file)
}

fn lock(file: &File, operation: FlockOperation) -> io::Result<()> {
    for _ in 0..TRIES {
        match flock(file, operation) {
            Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(TRY_AGAIN),
            other => return Ok(other?),
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

/// Read the record. One that is empty or all zero was cut off by a crash of the host and counts as empty; anything
/// else that is no record is somebody's own file, and an error.
fn parse(file: &File) -> io::Result<Entries> {
    let mut text = Vec::new();
    file.take(MAX_LENGTH).read_to_end(&mut text)?;
    if text.iter().all(|byte| *byte == 0) {
        return Ok(Entries::default());
    }
    Ok(serde_json::from_slice(&text)?)
}
