//! `vbd clone`: a base becomes another machine's disk.

use std::path::{Path, PathBuf};

use vbd_image::create::Draft;
use vbd_image::lease::Mode;

use super::copy::{How, copy};
use super::identity::{Identity, change};
use super::{Disk, Volume};
use crate::error::Context;
use crate::tailor::Tailor;
use crate::{Progress, Result, Step, Time};

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
    /// How the base was copied.
    pub how: How,
    /// The new UUIDs of the filesystems.
    pub uuids: Vec<(Volume, String)>,
}

/// Makes `new` of `base`: its blocks shared or copied, then its identity changed. The file gets its name when all of it is
/// done and durable, so nobody ever sees a half clone.
///
/// # Errors
///
/// The base is in use or has filesystems that cannot be changed; the new file cannot be made.
pub fn clone(
    base: &Path,
    new: &Path,
    options: &CloneOptions,
    now: Time,
    progress: &mut dyn Progress,
) -> Result<Cloned> {
    options.tailor.check()?;
    let base = Disk::open(base, Mode::Read)?;
    let draft = Draft::new(new, options.force)?;
    let how = copy(&base, draft.file(), progress)?;
    progress.step(Step::Tailor, None);
    let mut disk = Disk::draft(draft.file(), PathBuf::from(new))?;
    let identity = Identity { tailor: &options.tailor, label: options.label.as_deref(), now };
    let uuids = change(&mut disk, &identity)?;
    progress.step(Step::Sync, None);
    draft.file().sync_all().at("flush", new)?;
    drop(disk);
    draft.publish()?;
    Ok(Cloned { how, uuids })
}
