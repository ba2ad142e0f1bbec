//! The part of a build that sees owners and devices: gather a tree, tailor it, make the filesystem of it.
//!
//! It is one part so that it can run in one process, as root here or as an ordinary user under fakeroot.

pub(crate) mod remote;

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::archive::Archive;
use crate::builder::{Builder, Format, Mke2fs, is_full};
use crate::error::Context;
use crate::meter::{Count, Geometry, Meter, Room};
use crate::pattern::Patterns;
use crate::staging::Staging;
use crate::sys::{self, View};
use crate::tailor::{Root, TreeRoot};
use crate::tar::NamedAcl;
use crate::tree::Tree;
use crate::walk::Walk;
use crate::{Counts, Error, Progress, Result, Shortage, Step, Tailor};

/// What a stage has to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) size: u64,
    pub(crate) format: Format,
    pub(crate) from: From,
    pub(crate) tailor: Tailor,
    /// Where the staging tree is made.
    pub(crate) scratch: PathBuf,
    /// The user whose files become root's, where fakeroot was started for him.
    pub(crate) for_user: Option<(u32, u32)>,
}

/// What the tree is gathered from.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum From {
    Directory {
        path: PathBuf,
        exclude: Vec<String>,
        /// Files (device, inode) that are no part of the source.
        skip: Vec<(u64, u64)>,
        live: bool,
    },
    /// A tar, cpio or squashfs, with its name for messages; its bytes come apart.
    Archive(String),
}

/// What a stage has done.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    pub(crate) counts: Counts,
    pub(crate) warnings: Vec<String>,
}

/// Does a job: `image` has its size and is empty, `archive` is the tar of a job that has one.
pub(crate) fn run(
    job: &Job,
    image: &File,
    archive: Option<File>,
    progress: &mut dyn Progress,
) -> Result<Done> {
    let done = Stage::new(job, progress).and_then(|stage| stage.run(image, archive, progress));
    let done = done.map_err(|e| match e {
        Error::Io { what, error } if error.kind() == io::ErrorKind::StorageFull => {
            let scratch = job.scratch.display();
            Error::Io { what: format!("{what} (gathered in {scratch}; TMPDIR names another place)"), error }
        }
        other => other,
    });
    // Whatever broke when it was stopped, that it was stopped is what counts.
    if progress.cancelled() { Err(Error::Interrupted) } else { done }
}

struct Stage<'a> {
    job: &'a Job,
    staging: Staging,
    builder: &'a dyn Builder,
    geometry: Geometry,
    free: Room,
}

impl<'a> Stage<'a> {
    fn new(job: &'a Job, progress: &mut dyn Progress) -> Result<Stage<'a>> {
        let staging = Staging::new(&job.scratch)?;
        let builder = &Mke2fs;
        progress.step(Step::Measure, None);
        let (geometry, free) = builder.capacity(&job.format, job.size, staging.path(), progress)?;
        Ok(Stage { job, staging, builder, geometry, free })
    }

    fn run(&self, image: &File, archive: Option<File>, progress: &mut dyn Progress) -> Result<Done> {
        let mut warnings = Vec::new();
        let mut finished = match &self.job.from {
            From::Directory { path, exclude, skip, live } => {
                let mut walk = self.walk(path, exclude, skip, *live)?;
                let (room, total) = self.measure(&mut walk, progress)?;
                if !self.fits(room) {
                    // Counted in full, for data may be zeros, which take no room.
                    let mut count = Tree::new(self.staging.open_tree()?, self.geometry, Room::default());
                    walk.run(&mut count, progress)?;
                    self.check(count.finish()?.room, progress)?;
                }
                progress.step(Step::Read, Some(total.bytes));
                let mut tree = self.tree()?;
                walk.run(&mut tree, progress)?;
                warnings = walk.warnings;
                tree.finish()?
            }
            From::Archive(name) => {
                let file =
                    archive.ok_or_else(|| Error::Invalid(format!("{name}: there is nothing to read")))?;
                progress.step(Step::Read, None);
                let mut tree = self.tree()?;
                let archive = Archive { name, file, scratch: self.staging.path() };
                let named = archive.unpack(&mut tree, progress)?;
                self.name_acls(&named, name, &mut tree)?;
                tree.finish()?
            }
        };
        self.check(finished.room, progress)?;
        progress.step(Step::Tailor, None);
        self.job.tailor.apply(&mut TreeRoot::new(self.staging.open_tree()?), self.job.format.filesystem)?;
        let (room, counts) = self.measure(&mut Walk::new(&self.staging.tree(), View::Library), progress)?;
        // What tailoring removed has no attributes; each of the others has a block of its own.
        let tree = self.staging.tree();
        finished.unstaged.retain(|one| std::fs::symlink_metadata(tree.join(&one.path)).is_ok());
        let room = Room { blocks: room.blocks + finished.unstaged.len() as u64, ..room };
        self.check(room, progress)?;
        progress.step(Step::Write, Some(counts.bytes));
        let (format, scratch) = (&self.job.format, self.staging.path());
        match self.builder.write(format, image, &tree, &finished.unstaged, scratch, progress) {
            Err(e) if is_full(&e) => Err(Error::NoRoom(self.shortage(room, progress))),
            other => other,
        }?;
        Ok(Done { counts, warnings })
    }

    /// Sets ACLs for names, which only the tree can tell the numbers of.
    fn name_acls(&self, named: &[NamedAcl], archive: &str, tree: &mut Tree) -> Result<()> {
        if named.is_empty() || tree.over() {
            return Ok(());
        }
        let root = TreeRoot::new(self.staging.open_tree()?);
        let text = |path| -> Result<String> {
            Ok(String::from_utf8_lossy(&root.read(path)?.unwrap_or_default()).into_owned())
        };
        let (passwd, group) = (text("/etc/passwd")?, text("/etc/group")?);
        for acl in named {
            if let Some(xattr) = acl.resolve(archive, &passwd, &group)? {
                tree.add_xattr(&acl.path, xattr)?;
            }
        }
        Ok(())
    }

    fn tree(&self) -> Result<Tree> {
        Ok(Tree::new(self.staging.open_tree()?, self.geometry, self.free))
    }

    fn walk(&self, path: &Path, exclude: &[String], skip: &[(u64, u64)], live: bool) -> Result<Walk> {
        let view = if self.job.for_user.is_some() { View::Kernel } else { View::Library };
        let mut walk = Walk::new(path, view);
        walk.exclude = Patterns::new(exclude.iter().map(String::as_str));
        walk.skip = HashSet::from_iter(skip.iter().copied());
        let own = File::open(self.staging.path()).at("open", self.staging.path())?;
        let own = sys::stat_at(own.as_fd(), "".as_ref(), view).at("look at", self.staging.path())?;
        walk.skip.insert(own.key());
        walk.to_root = self.job.for_user;
        walk.live = live;
        Ok(walk)
    }

    fn measure(&self, walk: &mut Walk, progress: &mut dyn Progress) -> Result<(Room, Counts)> {
        let mut count = Count { meter: Meter::new(self.geometry) };
        walk.run(&mut count, progress)?;
        Ok((count.meter.room(), count.meter.counts()))
    }

    fn fits(&self, room: Room) -> bool {
        room.blocks <= self.free.blocks && room.inodes <= self.free.inodes
    }

    fn check(&self, room: Room, progress: &mut dyn Progress) -> Result<()> {
        if self.fits(room) { Ok(()) } else { Err(Error::NoRoom(self.shortage(room, progress))) }
    }

    fn shortage(&self, room: Room, progress: &mut dyn Progress) -> Shortage {
        Shortage {
            needed_bytes: room.blocks * self.geometry.block_size,
            free_bytes: self.free.blocks * self.geometry.block_size,
            needed_inodes: room.inodes,
            free_inodes: self.free.inodes,
            size: self.job.size,
            enough: self.enough(room, progress),
        }
    }

    /// Tries larger sizes until one holds `room`, a whole number of MiB.
    fn enough(&self, room: Room, progress: &mut dyn Progress) -> Option<u64> {
        const MIB: u64 = 1 << 20;
        let (mut size, mut free) = (self.job.size, self.free);
        // Where it counted as fitting and did not, some more is needed than was counted.
        let room = Room { blocks: room.blocks + room.blocks / 32 * u64::from(self.fits(room)), ..room };
        for _ in 0..16 {
            let bytes = room.blocks.saturating_sub(free.blocks).checked_mul(self.geometry.block_size)?;
            let by_blocks = size.checked_add(bytes)?;
            let by_inodes = u128::from(size) * u128::from(room.inodes) / u128::from(free.inodes.max(1));
            let next = by_blocks.max(u64::try_from(by_inodes).ok()?).max(size + 1);
            size = next.checked_next_multiple_of(MIB)?;
            free = self.builder.capacity(&self.job.format, size, self.staging.path(), progress).ok()?.1;
            if room.blocks <= free.blocks && room.inodes <= free.inodes {
                return Some(size);
            }
        }
        None
    }
}
