//! Work on images while guests use the disk: slow enough for these, and stopped where that is wanted.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vbd_core::{Commit, ErrorKind, Live, Session, Watch};
use vbd_formats::ImageSpec;

use crate::commit::Committed;
use crate::ranges::lock;
use crate::{Error, Progress, Result};

/// How long a rest is at most until somebody looks whether the job is to stop.
const LOOK: Duration = Duration::from_millis(50);

/// How fast a job may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pace {
    /// As fast as it can, where no guest is.
    Full,
    /// It rests for as long as it works.
    #[default]
    Half,
    /// So many bytes a second are moved at most.
    Rate(u64),
}

/// Passes on how far the work is, and holds it up.
struct Paced<'a> {
    progress: &'a dyn Progress,
    pace: Pace,
    /// When it began to work after the last rest.
    since: Mutex<Instant>,
}

impl Watch for Paced<'_> {
    fn step(&self, step: &str, total: u64) {
        self.progress.step(step, total);
        *lock(&self.since) = Instant::now();
    }

    fn advance(&self, bytes: u64, moved: u64) -> vbd_core::Result<()> {
        self.progress.advance(bytes);
        let worked = lock(&self.since).elapsed();
        let rest = match self.pace {
            Pace::Full => Duration::ZERO,
            Pace::Half => worked,
            Pace::Rate(rate) => {
                let nanoseconds = u128::from(moved) * 1_000_000_000 / u128::from(rate.max(1));
                Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)).saturating_sub(worked)
            }
        };
        let until = Instant::now() + if moved > 0 { rest } else { Duration::ZERO };
        loop {
            if self.progress.is_cancelled() {
                return Err(vbd_core::Error::new(ErrorKind::Cancelled, "stopped"));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(LOOK));
        }
        *lock(&self.since) = Instant::now();
        Ok(())
    }
}

fn with<T>(
    session: &Arc<dyn Session>,
    pace: Pace,
    progress: &dyn Progress,
    work: impl FnOnce(&dyn Live, &dyn Watch) -> vbd_core::Result<T>,
) -> Result<T> {
    let live = session.live().ok_or_else(|| {
        Error::Refused(
            "images of its format stand on no others, and are not compacted in themselves".to_owned(),
        )
    })?;
    let paced = Paced { progress, pace, since: Mutex::new(Instant::now()) };
    work(live, &paced).map_err(|error| match error.kind() {
        ErrorKind::Cancelled if progress.is_cancelled() => Error::Cancelled,
        _ => Error::Disk(error),
    })
}

/// What flattening has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flattened {
    /// The bytes that were copied into the image.
    pub copied: u64,
}

/// Copies into the image of an open disk all that it reads from others, and has it stand on none.
///
/// # Errors
/// As [`Live::flatten`], and that it was stopped. The disk reads as before.
pub fn flatten(session: &Arc<dyn Session>, pace: Pace, progress: &dyn Progress) -> Result<Flattened> {
    let copied = with(session, pace, progress, |live, watch| live.flatten(watch))?;
    Ok(Flattened { copied })
}

/// Writes what the image of an open disk holds to its backing file, and empties it. `spec` is how the image was opened.
///
/// # Errors
/// The image has no backing file, somebody else uses that, there is no room, or it was stopped. The disk reads as before.
pub fn commit_served(
    session: &Arc<dyn Session>,
    spec: &ImageSpec,
    pace: Pace,
    progress: &dyn Progress,
) -> Result<Committed> {
    let target = crate::commit::target(spec)?;
    // What a kill takes with it of what was written there the image still holds. And guests wait while it is opened, so
    // nobody else is waited for.
    let target = ImageSpec { notes: false, lease_wait: Duration::ZERO, ..target };
    let into = vbd_formats::open_tracked(&target)?;
    let commit = Commit { into, track: session.track().cloned() };
    let written = with(session, pace, progress, |live, watch| live.commit(commit, watch))?;
    Ok(Committed { into: target.path, written })
}

/// What compacting has done, in bytes of the image's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compacted {
    /// Its length before.
    pub before: u64,
    /// Its length now.
    pub after: u64,
}

/// Makes the image of an open disk as short as it can be.
///
/// # Errors
/// As [`Live::compact`], and that it was stopped. The disk reads as before.
pub fn compact(session: &Arc<dyn Session>, pace: Pace, progress: &dyn Progress) -> Result<Compacted> {
    let (before, after) = with(session, pace, progress, |live, watch| live.compact(watch))?;
    Ok(Compacted { before, after })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Stops(AtomicBool);

    impl Progress for Stops {
        fn step(&self, _: &str, _: u64) {}
        fn advance(&self, _: u64) {}
        fn is_cancelled(&self) -> bool {
            self.0.load(Ordering::SeqCst)
        }
    }

    #[test]
    fn a_rate_is_kept_and_a_rest_ends_when_the_job_is_to_stop() {
        let progress = Stops(AtomicBool::new(false));
        let paced = |pace| Paced { progress: &progress, pace, since: Mutex::new(Instant::now()) };
        let begun = Instant::now();
        let slow = paced(Pace::Rate(1 << 20));
        for _ in 0..2 {
            slow.advance(1 << 30, 100 << 10).unwrap();
        }
        // Nothing was moved here, so nothing is to be waited for.
        slow.advance(1 << 40, 0).unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(190), "{:?}", begun.elapsed());
        let endless = paced(Pace::Rate(1));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                progress.0.store(true, Ordering::SeqCst);
            });
            assert_eq!(endless.advance(1 << 20, 1 << 20).unwrap_err().kind(), ErrorKind::Cancelled);
        });
    }
}
