//! A build from its start to the image's name.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vbd_image::create::Draft;

use crate::builder::{Format, Superblock};
use crate::error::Context;
use crate::fill::{self, Base, Input, Making, Unwanted};
use crate::pattern::Patterns;
use crate::process::Running;
use crate::stage::{self, Done, From, Job, remote};
use crate::{
    BuildOptions, Counts, Error, Filesystem, ImageSize, PartitionReport, Progress, Result, Source, Step,
    Time, bootstrap, disk, oci, sys, tar,
};

/// What was built.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// The image.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes that it takes on its disk.
    pub allocated: u64,
    /// The filesystem in it.
    pub filesystem: Filesystem,
    /// The filesystem's UUID.
    pub uuid: String,
    /// The filesystem's label, empty where it has none.
    pub label: String,
    /// Bytes that are free in it.
    pub free_bytes: u64,
    /// Inodes that are free in it.
    pub free_inodes: u64,
    /// What is in it.
    pub counts: Counts,
    /// What was not as it should be, and did not stop the build.
    pub warnings: Vec<String>,
    /// The partitions of a whole disk; none where one filesystem fills the file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub partitions: Vec<PartitionReport>,
}

/// Makes a file of `options.size` with a filesystem in it, filled and tailored, and gives it the name `path` when
/// it is whole and durable. Whatever happens before leaves nothing of it behind.
///
/// Not as root, the tree for ext2 and ext3 is gathered by [`helper`](BuildOptions::helper) under fakeroot.
///
/// # Errors
///
/// See [`Error`]: the request, the source, the room in the filesystem or on the host, a program that is missing.
pub fn build(path: &Path, options: &BuildOptions, progress: &mut dyn Progress) -> Result<Report> {
    options.spec.check()?;
    options.tailor.check()?;
    if let Some(disk) = &options.spec.disk {
        return disk::build(path, options, disk, progress);
    }
    if options.size == ImageSize::Fixed(0) {
        return Err(Error::Invalid("the size is 0: a filesystem needs room".to_owned()));
    }
    let (image, skip) = begin(path, options.force)?;
    if let ImageSize::Fixed(size) = options.size {
        image.file().set_len(size).at(&format!("give {size} bytes to"), path)?;
    }
    let place = Place { file: image.file(), offset: 0, directory: directory_of(path), skip };
    let made = make(options, &place, progress)?;
    finish(path, image, options, made, progress)
}

/// Begins an image, with the files (device, inode) that are no part of any source.
pub(crate) fn begin(path: &Path, force: bool) -> Result<(Draft, Vec<Key>)> {
    let replaced = std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
    let image = Draft::new(path, force)?;
    let mut skip = vec![key(image.file()).at("look at", path)?];
    skip.extend(replaced);
    Ok((image, skip))
}

/// Makes an image durable and gives it its name. The report has no partitions yet.
pub(crate) fn finish(
    path: &Path,
    image: Draft,
    options: &BuildOptions,
    made: Made,
    progress: &mut dyn Progress,
) -> Result<Report> {
    progress.step(Step::Sync, None);
    image.file().sync_all().at("make durable", path)?;
    let metadata = image.file().metadata().at("look at", path)?;
    if progress.cancelled() {
        return Err(Error::Interrupted);
    }
    image.publish()?;
    File::open(directory_of(path)).and_then(|d| d.sync_all()).at("make durable the directory of", path)?;
    let Made { done, superblock } = made;
    Ok(Report {
        path: path.to_owned(),
        size: metadata.len(),
        allocated: metadata.blocks() * 512,
        filesystem: options.spec.filesystem,
        uuid: superblock.uuid,
        label: superblock.label,
        free_bytes: superblock.free.blocks * superblock.block_size,
        free_inodes: superblock.free.inodes,
        counts: done.counts,
        warnings: done.warnings,
        partitions: Vec::new(),
    })
}

/// The directory that a file is in.
pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Where a filesystem is made.
pub(crate) struct Place<'a> {
    /// The image, which reads as zeros there.
    pub(crate) file: &'a File,
    /// Where the filesystem begins in it, in bytes; 0 for ext2 and ext3.
    pub(crate) offset: u64,
    /// The directory of the image.
    pub(crate) directory: &'a Path,
    /// Files that are no part of any source.
    pub(crate) skip: Vec<Key>,
}

/// A filesystem that was made.
pub(crate) struct Made {
    pub(crate) done: Done,
    pub(crate) superblock: Superblock,
}

/// Makes a filesystem of `options.size`.
pub(crate) fn make(options: &BuildOptions, place: &Place<'_>, progress: &mut dyn Progress) -> Result<Made> {
    let scratch = match std::env::var_os("TMPDIR") {
        Some(chosen) if !chosen.is_empty() => PathBuf::from(chosen),
        _ => place.directory.to_owned(),
    };
    if let Source::Image(_) | Source::Registry(_) = &options.spec.from {
        no_exclude(options)?;
        if options.spec.filesystem != Filesystem::Ext4 {
            let reason = format!("container images become ext4, not {}", options.spec.filesystem);
            return Err(Error::Invalid(reason));
        }
        let machine = options.spec.platform.as_ref();
        let image = match &options.spec.from {
            Source::Registry(reference) => {
                progress.message(&format!("asking for {reference}"));
                oci::Image::fetch(reference, machine)?
            }
            Source::Image(reference) => oci::Image::open(reference, machine)?,
            other => return Err(Error::Invalid(format!("{other} is no container image"))),
        };
        let done = make_ext4(options, Input::Image(image), place, &scratch, progress)?;
        let superblock = read_superblock(place)?;
        return Ok(Made { done, superblock });
    }
    let (from, archive, bootstrap) = open(options, place.skip.clone(), progress)?;
    let done = if options.spec.filesystem == Filesystem::Ext4 {
        fill(options, from, archive, place, &scratch, progress)
    } else {
        staged(options, from, archive, place.file, scratch, progress)
    };
    if let Some(running) = bootstrap {
        let cut_short =
            |e: &Error| matches!(e, Error::Archive { reason, .. } if reason.starts_with(tar::TRUNCATED));
        // Stopped at our end it is killed; where what it sent ends too early, how it failed is the error to tell.
        if done.as_ref().err().is_none_or(cut_short) {
            running.wait(progress, |_| {}).map_err(bootstrap::explain)?;
        }
    }
    let done = done?;
    let superblock = read_superblock(place)?;
    Ok(Made { done, superblock })
}

fn read_superblock(place: &Place<'_>) -> Result<Superblock> {
    Superblock::read(place.file, place.offset).at("read the filesystem made in", Path::new("the image"))
}

/// Makes ext4 of a directory or an archive.
fn fill(
    options: &BuildOptions,
    from: From,
    archive: Option<File>,
    place: &Place<'_>,
    scratch: &Path,
    progress: &mut dyn Progress,
) -> Result<Done> {
    let input = match (from, archive) {
        (From::Directory { path, exclude, skip, live }, _) => {
            let user = rustix::process::geteuid();
            let to_root = (!user.is_root()).then(|| (user.as_raw(), rustix::process::getegid().as_raw()));
            let base = Base::open(&path, to_root, live, options.spec.skip_unreadable)?;
            let exclude = Patterns::new(exclude.iter().map(String::as_str));
            Input::Directory(base, Unwanted { exclude, skip: skip.into_iter().collect() })
        }
        (From::Archive(name), Some(file)) => Input::Archive(name, file),
        (From::Archive(name), None) => {
            return Err(Error::Invalid(format!("{name}: there is nothing to read")));
        }
    };
    make_ext4(options, input, place, scratch, progress)
}

/// Makes ext4, from a plan in memory.
fn make_ext4(
    options: &BuildOptions,
    input: Input,
    place: &Place<'_>,
    scratch: &Path,
    progress: &mut dyn Progress,
) -> Result<Done> {
    let making = Making {
        spec: &options.spec,
        tailor: &options.tailor,
        size: options.size,
        now: options.time.unwrap_or_else(Time::now),
        latest: options.time,
        directory: place.directory,
        scratch,
        offset: place.offset,
        threads: options.threads,
        verify: options.verify,
    };
    let done = fill::make(&making, input, place.file, progress)?;
    Ok(Done { counts: done.counts, warnings: done.warnings })
}

/// Makes ext2 and ext3, from a tree in a directory.
fn staged(
    options: &BuildOptions,
    from: From,
    archive: Option<File>,
    image: &File,
    scratch: PathBuf,
    progress: &mut dyn Progress,
) -> Result<Done> {
    let ImageSize::Fixed(size) = options.size else {
        return Err(Error::Invalid(format!("{} needs a size: auto is for ext4", options.spec.filesystem)));
    };
    if options.verify {
        return Err(Error::Invalid(format!("verify is for ext4, not for {}", options.spec.filesystem)));
    }
    let me = sys::user();
    if me != 0 && options.helper.is_empty() {
        return Err(Error::Invalid("an ordinary user's build needs a helper, and none is named".to_owned()));
    }
    let spec = &options.spec;
    let job = Job {
        size,
        format: Format {
            filesystem: spec.filesystem,
            label: spec.label.clone(),
            uuid: spec.uuid.clone(),
            reserved_percent: spec.reserved_percent,
            inodes: spec.inodes,
            arguments: spec.mkfs_args.clone(),
        },
        from,
        tailor: options.tailor.clone(),
        scratch,
        for_user: (me != 0).then(|| (me, rustix::process::getegid().as_raw())),
    };
    if me == 0 {
        stage::run(&job, image, archive, progress)
    } else {
        remote::run(&job, image, archive, &options.helper, progress)
    }
}

/// A file's device and inode.
pub(crate) type Key = (u64, u64);

fn key(file: &File) -> std::io::Result<Key> {
    file.metadata().map(|m| (m.dev(), m.ino()))
}

/// Opens the source; a suite's installation is started.
fn open(
    options: &BuildOptions,
    skip: Vec<Key>,
    progress: &mut dyn Progress,
) -> Result<(From, Option<File>, Option<Running>)> {
    let spec = &options.spec;
    match &spec.from {
        Source::Stdin => {
            let stdin = remote::stdin()?;
            if std::io::IsTerminal::is_terminal(&stdin) {
                return Err(Error::Invalid(
                    "the source is an archive on standard input, which is a terminal".to_owned(),
                ));
            }
            no_exclude(options)?;
            Ok((From::Archive("standard input".to_owned()), Some(stdin), None))
        }
        Source::Suite { distribution, suite } => {
            no_exclude(options)?;
            progress.message(&format!("installing {} {suite} with mmdebstrap", distribution.name()));
            let mut command = bootstrap::command(*distribution, suite, spec);
            let mut running = Running::start(&mut command, "mmdebstrap")?;
            let output = running.take_stdout().map(|out| File::from(OwnedFd::from(out)));
            Ok((From::Archive(format!("{} {suite}", distribution.name())), output, Some(running)))
        }
        image @ (Source::Image(_) | Source::Registry(_)) => {
            Err(Error::Invalid(format!("{image} is no single archive")))
        }
        Source::Path(path) => {
            let unreadable = |e: std::io::Error| Error::Source {
                path: path.clone(),
                reason: format!("cannot be read: {e}"),
            };
            let kind = std::fs::metadata(path).map_err(unreadable)?;
            if kind.is_dir() {
                let path = std::fs::canonicalize(path).map_err(unreadable)?;
                let root = path == Path::new("/");
                let mut exclude = spec.exclude.clone();
                if root {
                    exclude.extend(["proc/*", "sys/*", "tmp/*", "home/*"].map(str::to_owned));
                }
                return Ok((From::Directory { path, exclude, skip, live: spec.live || root }, None, None));
            }
            no_exclude(options)?;
            let file = File::open(path).map_err(unreadable)?;
            Ok((From::Archive(path.display().to_string()), Some(file), None))
        }
    }
}

fn no_exclude(options: &BuildOptions) -> Result<()> {
    if options.spec.exclude.is_empty() && !options.spec.live {
        return Ok(());
    }
    Err(Error::Invalid(format!("exclude and live are for a directory, not for {}", options.spec.from)))
}
