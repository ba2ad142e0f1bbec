//! A filesystem made smaller where it is, through its own journal.

use vbd_ext4::edit::{EditError, Editor, Timestamp};

use super::{Disk, Volume};
use crate::{Error, Progress, Result, Step, Time};

/// Makes a filesystem no larger than `size` bytes. False where that is not done in place: why is told, and the filesystem
/// is whole and as large as before.
///
/// # Errors
///
/// Those of reading and writing; somebody asked to stop.
pub(super) fn in_place(
    disk: &Disk,
    volume: &Volume,
    size: u64,
    now: Time,
    progress: &mut dyn Progress,
) -> Result<bool> {
    let now = Timestamp { seconds: now.seconds, nanoseconds: now.nanoseconds };
    progress.step(Step::Write, Some(volume.size));
    let mut told = 0;
    let shrunk = Editor::open(disk.part(volume), now).and_then(|editor| {
        editor.shrink(size, &mut |done, all| {
            let bytes = volume.size / u64::from(all.max(1)) * u64::from(done);
            progress.advance(bytes.saturating_sub(told));
            told = told.max(bytes);
            !progress.cancelled()
        })
    });
    let why = match shrunk {
        Ok(_) => return Ok(true),
        Err(EditError::Interrupted) => return Err(Error::Interrupted),
        // What is written before any of these is whole transactions.
        Err(
            why @ (EditError::Refused(_)
            | EditError::NoBlocks { .. }
            | EditError::NoInodes(_)
            | EditError::TooLarge { .. }),
        ) => why,
        Err(error) => return Err(Error::Inside(format!("{}: {error}", disk.name(volume)))),
    };
    progress.message(&format!("{}: {why}; resize2fs makes it smaller in a copy", disk.name(volume)));
    Ok(false)
}
