//! The instant of a backup, and what becomes of bitmaps when it ends.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use vbd_core::bitmap::DEFAULT_GRANULARITY;
use vbd_core::file::{Backend, Options};
use vbd_core::track::{Freeze, Frozen, Track};
use vbd_core::{ErrorKind, Session};

use super::Cost;
use crate::{Error, Result};

/// The smallest block that is copied away before a write: a guest waits for as much as it writes.
const SMALLEST: u64 = 4096;
/// The most of them: a disk has three bits for each while it is backed up.
const MOST: u64 = 1 << 27;

/// The bitmaps of a backup.
pub(super) struct Bitmaps<'a> {
    /// Only what is marked in this one is wanted; it goes when the backup is durable.
    pub(super) old: Option<&'a str>,
    /// Begins at the instant; it goes again where the backup fails.
    pub(super) new: Option<&'a str>,
}

/// The track of a disk that can be backed up.
pub(super) fn track(session: &Arc<dyn Session>) -> Result<&Arc<Track>> {
    session.track().ok_or_else(|| Error::Refused("the disk has no bitmaps, so it cannot be backed up".into()))
}

/// Freezes the disk, has `work` make a backup of it that is durable when it returns, and only then gives up the bitmap of
/// before. What guests overwrite lies in `directory`; what is wanted is widened to multiples of `unit` bytes.
pub(super) fn at_one<T>(
    session: &Arc<dyn Session>,
    disk: &str,
    bitmaps: &Bitmaps<'_>,
    directory: &Path,
    unit: u64,
    cost: &Cost,
    work: impl FnOnce(&Arc<Frozen>) -> Result<T>,
) -> Result<T> {
    let size = session.geometry().size;
    let mut block = SMALLEST;
    while size / block > MOST {
        block *= 2;
    }
    let freeze = Freeze {
        since: bitmaps.old,
        retire: false,
        start: bitmaps.new.map(|name| (name, DEFAULT_GRANULARITY, true)),
        block,
        widen: unit.max(block),
        store: aside(directory, Frozen::store_size(size, block))?,
        limit: cost.most_kept,
        memory: cost.memory,
        longest_delay: cost.longest_delay,
    };
    let (frozen, _) = Frozen::new(session, &freeze)?;
    // From here on there is a bitmap to take back where the backup fails.
    let kept = || match session.keep_bitmaps().map_err(|error| (error.kind(), error)) {
        Err((ErrorKind::Unsupported, error)) if bitmaps.new.is_some() => {
            // Of use until the disk is closed.
            tracing::warn!("{disk}: {error}");
            Ok(())
        }
        Err((_, error)) if bitmaps.new.is_some() => Err(Error::from(error)),
        _ => Ok(()),
    };
    let done = kept().and_then(|()| work(&frozen));
    // Guests need not wait any more.
    drop(frozen);
    // Whichever is of no use any more: the one that began, or the one of before.
    let superfluous = match (&done, bitmaps.new) {
        (Err(_), Some(new)) => Some(new),
        (Ok(_), Some(_)) => bitmaps.old,
        _ => None,
    };
    if let Some(name) = superfluous {
        let removed = track(session)?.remove(name).map_err(|error| error.to_string());
        if let Err(error) = removed.and_then(|()| session.keep_bitmaps().map_err(|error| error.to_string())) {
            tracing::warn!("the bitmap `{name}` stays: {error}");
        }
    }
    done
}

/// A file of holes for what guests overwrite; nobody else has it.
fn aside(directory: &Path, len: u64) -> Result<Arc<Backend>> {
    let path = directory.join("overwritten");
    let make = || File::create_new(&path)?.set_len(len.max(1));
    make().map_err(Error::io(&path, "make it"))?;
    // Past the page cache, which would write it out in bursts that guests wait for.
    let backend = Backend::open(&path, Options::default());
    // With the last that uses it, its room is free again.
    std::fs::remove_file(&path).map_err(Error::io(&path, "remove it"))?;
    Ok(backend?)
}
