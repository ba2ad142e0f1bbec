//! Bitmaps and backups of disks that are served, and of those that a command opens for itself.

use std::sync::Arc;
use std::time::Duration;

use vbd_core::Session;
use vbd_core::bitmap::DEFAULT_GRANULARITY;
use vbd_core::track::{Track, TrackError};
use vbd_formats::Format;
use vbd_jobs::backup::{self, Backup, Chain, Cost, Since, Store};

use super::Supervisor;
use crate::control::{BitmapChange, BitmapInfo, JobInfo, NewBackup};
use crate::{Fault, FaultKind};

fn fault(error: &TrackError) -> Fault {
    let kind = match error {
        TrackError::Unknown(_) => FaultKind::Unknown,
        TrackError::Exists(_) => FaultKind::Exists,
        TrackError::Busy | TrackError::Unsettled => FaultKind::Busy,
        TrackError::Name(_) | TrackError::TooMany | TrackError::Bitmap(_) => FaultKind::Invalid,
    };
    Fault::new(kind, error.to_string())
}

fn track(session: &Arc<dyn Session>) -> Result<&Arc<Track>, Fault> {
    session.track().ok_or_else(|| Fault::new(FaultKind::Invalid, "the disk has no bitmaps"))
}

/// The bitmaps of an open disk.
///
/// # Errors
/// It has none.
pub fn bitmaps(session: &Arc<dyn Session>) -> Result<Vec<BitmapInfo>, Fault> {
    Ok(track(session)?.list().into_iter().map(BitmapInfo::from).collect())
}

/// Changes the bitmaps of an open disk, and what is kept of them.
///
/// # Errors
/// The change makes no sense, or cannot be kept: then a new bitmap is gone again.
pub fn change_bitmaps(session: &Arc<dyn Session>, change: &BitmapChange) -> Result<(), Fault> {
    let track = track(session)?;
    if session.capabilities().read_only {
        let message = "the disk is read-only, so nothing changes that bitmaps could tell of";
        return Err(Fault::new(FaultKind::Invalid, message));
    }
    let changed = match change {
        BitmapChange::Add { name, granularity, temporary } => {
            track.add(name, granularity.unwrap_or(DEFAULT_GRANULARITY), !temporary)
        }
        BitmapChange::Remove { name } => track.remove(name),
        BitmapChange::Enable { name } => track.enable(name, true),
        BitmapChange::Disable { name } => track.enable(name, false),
        BitmapChange::Clear { name } => track.clear(name),
        BitmapChange::Merge { name, from } => track.merge(name, from),
    };
    changed.map_err(|error| fault(&error))?;
    if matches!(change, BitmapChange::Add { temporary: true, .. }) {
        return Ok(());
    }
    match session.keep_bitmaps() {
        Err(error) if track.list().iter().any(|bitmap| bitmap.persistent) => {
            if let BitmapChange::Add { name, .. } = change {
                // It was only just added, so it is there.
                let _ = track.remove(name);
            }
            Err(Fault::from(error))
        }
        // There is nothing to be kept.
        _ => Ok(()),
    }
}

/// Backs an open disk up as it is asked for over the control socket.
///
/// # Errors
/// What the store or the backup has met.
pub fn back_up(
    session: &Arc<dyn Session>,
    name: &str,
    asked: &NewBackup,
    progress: &dyn vbd_jobs::Progress,
) -> Result<backup::Done, vbd_jobs::Error> {
    let defaults = Backup::new(asked.disk.as_deref().unwrap_or(name));
    let cost = Cost {
        longest_delay: asked.max_delay_ms.map_or(defaults.cost.longest_delay, Duration::from_millis),
        most_kept: asked.max_kept.unwrap_or(defaults.cost.most_kept),
        memory: defaults.cost.memory,
        threads: asked.threads.unwrap_or(defaults.cost.threads).clamp(1, 64),
    };
    let backup = Backup {
        name: asked.name.clone(),
        since: match &asked.since {
            Some(name) => Since::Backup(name.clone()),
            None if asked.incremental => Since::Last,
            None => Since::Beginning,
        },
        checkpoint: asked.checkpoint,
        level: asked.level.unwrap_or(defaults.level).clamp(1, 22),
        cost,
        ..defaults
    };
    let chain = match &asked.chain {
        Some(format) => Some(format.parse().map_err(|_| {
            vbd_jobs::Error::Refused(format!("`{format}`: a backup is a raw or a qcow2 image"))
        })?),
        // It has been said once.
        None => Chain::is_one(&asked.store).then_some(Format::Qcow2),
    };
    match chain {
        Some(format) => {
            let chain = Chain::open_or_create(&asked.store)?;
            backup::backup_to_chain(session, &chain, format, &backup, progress)
        }
        None => backup::backup(session, &Store::open_or_create(&asked.store)?, &backup, progress),
    }
}

impl Supervisor {
    pub(super) fn session(&self, name: &str) -> Result<Arc<dyn Session>, Fault> {
        // The session that the guests have, or one for this alone, which takes the lease for a while.
        self.get(name)?.disk().open().map_err(Fault::from)
    }

    /// The bitmaps of a disk.
    ///
    /// # Errors
    /// No disk has this name, or it cannot be opened.
    pub fn bitmaps(&self, name: &str) -> Result<Vec<BitmapInfo>, Fault> {
        bitmaps(&self.session(name)?)
    }

    /// Changes the bitmaps of a disk, and gives those there are then.
    ///
    /// # Errors
    /// No disk has this name, the change makes no sense, or it cannot be kept.
    pub fn change_bitmaps(&self, name: &str, change: &BitmapChange) -> Result<Vec<BitmapInfo>, Fault> {
        let session = self.session(name)?;
        change_bitmaps(&session, change)?;
        bitmaps(&session)
    }

    /// Begins a backup of a disk.
    ///
    /// # Errors
    /// No disk has this name, it cannot be opened, or it has a job already.
    pub fn backup(&self, name: &str, asked: NewBackup) -> Result<JobInfo, Fault> {
        if !asked.store.is_absolute() {
            // The directory of the process that serves means nothing to the one that asks.
            let message = format!("{}: name the store by its absolute path", asked.store.display());
            return Err(Fault::new(FaultKind::Invalid, message));
        }
        let session = self.session(name)?;
        let disk = name.to_owned();
        self.jobs.begin("backup", name, move |job| {
            back_up(&session, &disk, &asked, job).map_err(|error| error.to_string())
        })
    }

    /// The jobs that run, and the last that have ended.
    pub fn jobs(&self) -> Vec<JobInfo> {
        self.jobs.all()
    }

    /// One job.
    ///
    /// # Errors
    /// There is none of that number.
    pub fn job(&self, id: &str) -> Result<JobInfo, Fault> {
        self.jobs.get(id)
    }

    /// Asks a job to stop.
    ///
    /// # Errors
    /// There is none of that number.
    pub fn cancel_job(&self, id: &str) -> Result<JobInfo, Fault> {
        self.jobs.cancel(id)
    }
}
