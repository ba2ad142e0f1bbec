//! `vbd clone`: a base becomes another machine's disk.

use std::path::Path;

use vbd_image::create::Draft;
use vbd_image::lease::Mode;

use super::copy::{How, copy};
use super::identity::{Identity, change};
use super::{Disk, Volume};
use crate::error::Context;
use crate::tailor::Tailor;
use crate::{Error, Progress, Result, Step, Time};

/// How a clone is to be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CloneOptions {
    /// Changes to the tree, its identity included.
    pub tailor: Tailor,
    /// The label of the root's filesystem; that of the base where not given.
    pub label: Option<String>,
    /// Replace a file of the new name.
    pub force: bool,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cloned {
    /// How it comes from its base.
    pub how: How,
    /// The new UUIDs of the filesystems.
    pub uuids: Vec<(Volume, String)>,
}

/// Makes `new` of a base whose bytes are those of the disk: its blocks shared or copied, then its identity changed.
///
/// # Errors
///
/// As [`clone_of`]; the base is in use.
pub fn clone(
    base: &Path,
    new: &Path,
    options: &CloneOptions,
    now: Time,
    progress: &mut dyn Progress,
) -> Result<Cloned> {
    let base = Disk::open(base, Mode::Read)?;
    clone_of(new, options, now, progress, |draft, progress| {
        let how = copy(base.plain()?, base.size, &base.path, draft.file(), None, progress)?;
        let file = draft.file().try_clone().at("open once more", new)?;
        Ok((Disk::plain_file(file, base.size, None, new)?, how))
    })
}

/// Makes `new` of what `fill` fills its file with and opens there; then its identity is changed. The file gets its name
/// when all of it is done and durable, so nobody ever sees a half clone, and nothing is left of one that is killed.
///
/// # Errors
///
/// Those of `fill`; the disk has filesystems that cannot be changed; the new file cannot be made.
pub fn clone_of<E: From<Error>>(
    new: &Path,
    options: &CloneOptions,
    now: Time,
    progress: &mut dyn Progress,
    fill: impl FnOnce(&Draft, &mut dyn Progress) -> Result<(Disk, How), E>,
) -> Result<Cloned, E> {
    options.tailor.check()?;
    let draft = Draft::new(new, options.force).map_err(Error::from)?;
    let (mut disk, how) = fill(&draft, progress)?;
    progress.step(Step::Tailor, None);
    let identity = Identity { tailor: &options.tailor, label: options.label.as_deref(), now };
    let uuids = change(&mut disk, &identity)?;
    progress.step(Step::Sync, None);
    disk.device.sync().at("flush", new)?;
    // What a format still writes when it is closed.
    drop(disk);
    draft.file().sync_all().at("flush", new)?;
    draft.publish().map_err(Error::from)?;
    Ok(Cloned { how, uuids })
}
