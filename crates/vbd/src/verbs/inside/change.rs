//! Opening a disk to change what is in it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use vbd_ext4::edit::{EditError, Editor, Ino, Timestamp, Where};
use vbd_ext4::read::{self, Inode, Links};
use vbd_fs::Time;
use vbd_image::lease::Mode;

use super::{Target, open};
use crate::UsageError;
use crate::verbs::device::{self, Opening};
use crate::verbs::image::ImageArgs;

/// How a disk is changed.
#[derive(clap::Args, Clone)]
pub(crate) struct Changing {
    /// The partition, where the file is a whole disk; not needed where one alone has a filesystem of this family
    #[arg(long, value_name = "N")]
    pub(super) partition: Option<u32>,
    #[command(flatten)]
    pub(super) image: ImageArgs,
}

/// A disk that is changed. As long as it is there, nobody else may use the disk.
pub(crate) struct Changed {
    pub(crate) editor: Editor,
    pub(crate) now: Timestamp,
    image: PathBuf,
}

/// The time as inodes have it.
pub(crate) fn now() -> Time {
    Time::now()
}

impl Changing {
    /// Takes the lease for writing and opens the filesystem that is meant; nothing is changed before the commit, but what
    /// the journal holds is put into its place.
    pub(crate) fn open(&self, path: &Path) -> anyhow::Result<Changed> {
        let opening = Opening { mode: Mode::Write, share: false, wait: Duration::ZERO };
        let disk = device::open(&self.image, path, opening)?;
        let volume = open::volume(&disk, self.partition)?;
        let Time { seconds, nanoseconds } = now();
        let now = Timestamp { seconds, nanoseconds };
        let editor = Editor::open(disk.part(&volume), now).with_context(|| disk.name(&volume))?;
        Ok(Changed { editor, now, image: path.to_owned() })
    }
}

impl Changed {
    /// Makes the changes, all at once.
    pub(crate) fn commit(mut self) -> anyhow::Result<()> {
        self.editor.commit().with_context(|| self.image.display().to_string())
    }

    /// An error at a place of the disk.
    pub(super) fn failed(target: &Target) -> impl Fn(EditError) -> anyhow::Error + '_ {
        |error| anyhow!("{}: {error}", target.shown())
    }

    /// What a path leads to.
    pub(super) fn find(&self, target: &Target, links: Links) -> anyhow::Result<Inode> {
        self.editor.filesystem().lookup(&target.path, links).map_err(|error| match error {
            read::Error::NotFound(_) | read::Error::NotDirectory(_) | read::Error::Links(_) => {
                anyhow!("{}:{error}", target.image.display())
            }
            other => anyhow!("{}: {other}", target.shown()),
        })
    }

    /// The same, or nothing.
    pub(super) fn look(&self, target: &Target, links: Links) -> anyhow::Result<Option<Inode>> {
        match self.editor.filesystem().lookup(&target.path, links) {
            Ok(inode) => Ok(Some(inode)),
            Err(read::Error::NotFound(_)) => Ok(None),
            Err(error) => Err(anyhow!("{}: {error}", target.shown())),
        }
    }

    /// The place of a path: the directory and the name in it.
    pub(super) fn locate(&self, target: &Target) -> anyhow::Result<Where> {
        self.editor.locate(&target.path).map_err(Changed::failed(target))
    }

    /// An inode and, where it is a directory and that is asked for, all below it.
    pub(super) fn below(&self, target: &Target, inode: Inode, all: bool) -> anyhow::Result<Vec<Ino>> {
        let mut found = vec![inode.number()];
        if all {
            for step in vbd_fs::inside::Walk::new(self.editor.filesystem(), inode) {
                match step.map_err(|error| anyhow!("{}: {error}", target.shown()))? {
                    vbd_fs::inside::Step::Enter(entry) if entry.depth > 0 => found.push(entry.inode.number()),
                    _ => {}
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }
}

/// Places of one disk, which is all that a change can be made in at once.
pub(super) fn targets(words: Vec<OsString>) -> anyhow::Result<(PathBuf, Vec<Target>)> {
    let targets: Vec<Target> = words.into_iter().map(Target::from).collect();
    if let Some(target) = targets.iter().find(|target| !target.said) {
        let text = format!("{}: is no place in a disk; write IMAGE:/PATH", target.image.display());
        return Err(UsageError(text).into());
    }
    let image = targets.first().map(|target| target.image.clone()).unwrap_or_default();
    if let Some(other) = targets.iter().find(|target| target.image != image) {
        bail!("{} and {} are two disks; change one at a time", image.display(), other.image.display());
    }
    Ok((image, targets))
}
