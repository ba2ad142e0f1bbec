//! The lease: who may read or write an image file now.
//!
//! A [`Lease`] is made of the lock bytes of QEMU, so QEMU's programs and vbd exclude each other both ways. The locks
//! belong to the open file description (`F_OFD_SETLK`): they end with the last descriptor of it, however a process
//! ends, and not before the last operation that the kernel still does for it has ended. A lease that could be taken is
//! therefore the proof that the previous holder's writes have landed. `docs/lease.md` tells the whole story.

mod bytes;
mod process;
mod record;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::host;
use crate::open::{self, OpenError};

/// How often a lease that is not free is tried again while there is time left.
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// What a lease is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Reading, shared with other readers; nobody may write meanwhile.
    Read,
    /// Writing, alone.
    Write,
}

/// How a lease is asked for. The default: exclusive as its [`Mode`] says, and answered at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Share the file with writers that share it too, as Xen's `w!` does, and go on in spite of every other use, which
    /// is logged. For guests that agree among themselves (a cluster filesystem), and for looking at a disk in use.
    pub override_: bool,
    /// How long a lease that is held is tried again. After kill -9 of the previous holder the kernel keeps its file
    /// open until its last I/O has ended, and at a migration the source hands over late.
    pub wait: Duration,
}

/// Somebody who uses a file. What is not known is `None`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// What the file is used for.
    pub mode: Mode,
    /// The process, on `host`.
    pub pid: Option<u32>,
    /// The name of its program, or its whole command.
    pub command: Option<String>,
    /// The host's name.
    pub host: Option<String>,
    /// Since when (RFC 3339, UTC): of the lease if its record says so, otherwise the start of the process.
    pub since: Option<String>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(pid) = self.pid else {
            return f
                .write_str("a process that cannot be seen from here (another user's or host's, or ending)");
        };
        // Records and process names are others' words: what could steer a terminal is shown as a question mark.
        let plain = |text: &str| -> String {
            text.chars().take(120).map(|c| if c.is_control() { '?' } else { c }).collect()
        };
        write!(f, "\"{}\" (process {pid}", plain(self.command.as_deref().unwrap_or("unknown")))?;
        if let Some(host) = &self.host {
            write!(f, " on {}", plain(host))?;
        }
        f.write_str(if self.mode == Mode::Write { ", writing" } else { ", reading" })?;
        if let Some(since) = &self.since {
            write!(f, " since {}", plain(since))?;
        }
        f.write_str(")")
    }
}

/// Why a lease was not given.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Somebody else holds it.
    #[error("cannot {} {}: in use by {}; end that first", verb(*.wanted), .path.display(), list(.holders))]
    InUse {
        /// The file.
        path: PathBuf,
        /// What the lease was to be for.
        wanted: Mode,
        /// Who is in the way: at least one.
        holders: Vec<Holder>,
    },
    /// The host itself uses the file: mounted, attached to a loop device, or a block device that is in use.
    #[error(transparent)]
    Host(#[from] host::InUse),
    /// The filesystem that the file is on knows no locks.
    #[error(
        "{}: its filesystem has no locks ({error}), so nothing would keep a second writer out; keep the file \
         elsewhere, or share it at your own risk (w!)", .path.display()
    )]
    NoLocks {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// Anything else that failed.
    #[error("{}: cannot take its lease: {error}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
}

fn verb(mode: Mode) -> &'static str {
    match mode {
        Mode::Read => "read",
        Mode::Write => "write to",
    }
}

fn list(holders: &[Holder]) -> String {
    holders.iter().map(Holder::to_string).collect::<Vec<_>>().join(", ")
}

/// The right to read or write a file, until dropped.
///
/// It holds a duplicate of the descriptor it was taken with, and is a property of that open file description: whoever
/// does I/O through the same description (a ring, too) keeps it alive. Take one lease per description; two of the same
/// do not exclude each other, and the first to go takes the other with it.
#[derive(Debug)]
pub struct Lease {
    file: File,
    path: PathBuf,
    mode: Mode,
    record: Option<record::Record>,
}

impl Lease {
    /// Take the lease of the file that `file` is open on; it has to be open for reading at least. `path` is its name,
    /// for messages and for the record beside it.
    ///
    /// Acquire it late, when I/O is to start, rather than when the file is opened: a migration's destination opens
    /// while the source still writes. Blocks for `options.wait` at most (and a few milliseconds).
    pub fn acquire(
        file: BorrowedFd<'_>,
        path: &Path,
        mode: Mode,
        options: Options,
    ) -> Result<Lease, LeaseError> {
        let failed = |error| LeaseError::Io { path: path.to_owned(), error };
        let file = File::from(file.try_clone_to_owned().map_err(failed)?);
        let claim = bytes::Claim::new(mode, options.override_);
        let deadline = Instant::now() + options.wait;
        loop {
            match take(&file, claim, options.override_) {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) if no_locks(&error) && options.override_ => {
                    tracing::warn!("{}: its filesystem has no locks ({error})", path.display());
                    break;
                }
                Err(error) if no_locks(&error) => {
                    return Err(LeaseError::NoLocks { path: path.to_owned(), error });
                }
                Err(error) => return Err(failed(error)),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let holders = name_holders(&file, path, Some(mode)).map_err(failed)?;
                return Err(LeaseError::InUse { path: path.to_owned(), wanted: mode, holders });
            }
            std::thread::sleep(left.min(TRY_AGAIN));
        }
        let mut lease = Lease { file, path: path.to_owned(), mode, record: None };
        match host::usage(&lease.file, path).map_err(failed)? {
            Some(used) if mode == Mode::Write && !options.override_ => return Err(used.into()),
            Some(used) => {
                tracing::warn!("{} is {}; its contents may change at any time", path.display(), used.facts())
            }
            None => {}
        }
        lease.enter_record(options.override_);
        Ok(lease)
    }

    /// What the lease is for.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The file, as it was named when the lease was taken.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Say beside a regular file who holds it. Block devices have no record: their directory is the system's.
    fn enter_record(&mut self, shared: bool) {
        if !self.file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            return;
        }
        match record::Record::write(&self.path, self.mode, self.mode == Mode::Write && !shared) {
            Ok(record) => self.record = Some(record),
            Err(error) => tracing::debug!("{}: no record of the lease: {error}", self.path.display()),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // While the lease is still held, so that the next holder's entry cannot be meant.
        if let Some(Err(error)) = self.record.as_ref().map(record::Record::remove) {
            tracing::debug!("{}: the record of the lease stays: {error}", self.path.display());
        }
        // Others may have the same description open, so closing is not enough.
        if let Err(error) = bytes::unlock(self.file.as_fd()) {
            tracing::debug!("{}: cannot unlock: {error}", self.path.display());
        }
    }
}

/// One attempt. Nothing stays locked unless it is `Ok(true)`.
fn take(file: &File, claim: bytes::Claim, shared: bool) -> io::Result<bool> {
    // Asked first, so that one that waits is not in the way of others who try meanwhile.
    if !shared && claim.conflicts(file.as_fd())? {
        return Ok(false);
    }
    let attempt = || Ok(claim.lock(file.as_fd())? && (shared || !claim.conflicts(file.as_fd())?));
    let result = attempt();
    if !matches!(result, Ok(true)) {
        // The failure itself is what counts; where there are no locks there is none to release.
        let _ = bytes::unlock(file.as_fd());
    }
    result
}

/// Whether an error means that the filesystem has no locks at all.
fn no_locks(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL))
}

/// Who uses the file: from the records and from /proc; somebody unknown if neither knows. `against` leaves out those
/// that would not be in the way of such a lease.
fn name_holders(file: &File, path: &Path, against: Option<Mode>) -> io::Result<Vec<Holder>> {
    let metadata = file.metadata()?;
    let mut holders = record::holders(path);
    for found in process::lock_holders(metadata.dev(), metadata.ino()) {
        if !holders.iter().any(|known| known.pid == found.pid && known.host == found.host) {
            holders.push(found);
        }
    }
    if against == Some(Mode::Read) && holders.iter().any(|holder| holder.mode == Mode::Write) {
        holders.retain(|holder| holder.mode == Mode::Write);
    }
    if holders.is_empty() {
        let mode = bytes::used_by_others(file.as_fd())?.unwrap_or(Mode::Write);
        holders.push(Holder { mode, pid: None, command: None, host: None, since: None });
    }
    Ok(holders)
}

/// Who holds a lease, vbd's or QEMU's, of the file at `path`: nobody if the list is empty. The locks decide, records
/// only name. Where the filesystem has no locks nobody does.
pub fn holders(path: &Path) -> Result<Vec<Holder>, OpenError> {
    let image = open::open(path)?;
    let failed = |error| OpenError::Io { path: path.to_owned(), error };
    match bytes::used_by_others(image.file.as_fd()) {
        Ok(Some(_)) => name_holders(&image.file, path, None).map_err(failed),
        Ok(None) => Ok(Vec::new()),
        Err(error) if no_locks(&error) => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}
