//! The staging tree: entries become real files below one directory, and never anything outside of it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps};

use crate::entry::{Content, Entry, Meta, Node, Sink, Time, Xattr};
use crate::error::Context;
use crate::meter::{Geometry, Meter, Room};
use crate::sys::{self, View};
use crate::zeros::is_zero;
use crate::{Error, Progress, Result};

/// Zeros of this size, at a multiple of it, become a hole.
const GRAIN: usize = 4096;
const BUFFER: usize = 1 << 20;

/// An extended attribute that fakeroot cannot keep, which is set in the filesystem itself.
pub(crate) struct Unstaged {
    pub(crate) path: PathBuf,
    pub(crate) xattr: Xattr,
}

/// What a finished tree comes to.
pub(crate) struct Finished {
    /// The room that all entries take.
    pub(crate) room: Room,
    pub(crate) unstaged: Vec<Unstaged>,
}

/// A directory that is filled by entries.
pub(crate) struct Tree {
    root: OwnedFd,
    /// Directories get their attributes last: what is made in them would change their time, and their default ACL
    /// would colour what is made in them.
    directories: BTreeMap<PathBuf, (Meta, Vec<Xattr>)>,
    /// The directory of the latest entry, to spare the walk to it.
    latest: Option<(PathBuf, OwnedFd)>,
    meter: Meter,
    limit: Room,
    unstaged: Vec<Unstaged>,
    buffer: Vec<u8>,
}

impl Tree {
    /// A tree in the empty directory `root`. Beyond `limit` entries are counted only, so that an endless source takes
    /// no more than what could be used.
    pub(crate) fn new(root: OwnedFd, geometry: Geometry, limit: Room) -> Tree {
        Tree {
            root,
            directories: BTreeMap::new(),
            latest: None,
            meter: Meter::new(geometry),
            limit,
            unstaged: Vec::new(),
            buffer: vec![0; BUFFER],
        }
    }

    /// Whether more came than fits.
    pub(crate) fn over(&self) -> bool {
        let room = self.meter.room();
        room.blocks > self.limit.blocks || room.inodes > self.limit.inodes
    }

    /// Adds an attribute to an entry that is there.
    pub(crate) fn add_xattr(&mut self, path: &Path, xattr: Xattr) -> Result<()> {
        if let Some((_, xattrs)) = self.directories.get_mut(path) {
            xattrs.push(xattr);
            return Ok(());
        }
        let dir = self.parent(path, false)?;
        sys::set_xattr(dir.as_fd(), name_of(path), &xattr).at("set the ACL of", path)
    }

    /// Gives the directories their attributes.
    pub(crate) fn finish(mut self) -> Result<Finished> {
        if !self.over() {
            for (path, (meta, xattrs)) in std::mem::take(&mut self.directories).into_iter().rev() {
                let (dir, name) = if path.as_os_str().is_empty() {
                    (self.root.try_clone().at("open", &path)?, OsString::from("."))
                } else {
                    (self.parent(&path, false)?, name_of(&path).to_owned())
                };
                self.attributes(dir.as_fd(), &name, &path, &meta, &xattrs)?;
            }
        }
        Ok(Finished { room: self.meter.room(), unstaged: self.unstaged })
    }

    /// Opens the directory of `path`, by its own names and through no link; makes it where `make` says so.
    fn parent(&mut self, path: &Path, make: bool) -> Result<OwnedFd> {
        let wanted = path.parent().unwrap_or(Path::new(""));
        if let Some((latest, dir)) = &self.latest
            && latest == wanted
        {
            return dir.try_clone().at("open", wanted);
        }
        let mut dir = self.root.try_clone().at("open", wanted)?;
        for name in wanted.components() {
            let name = name.as_os_str();
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mut next = rustix::fs::openat(&dir, name, flags, Mode::empty());
            if make && next.as_ref().is_err_and(|e| *e == rustix::io::Errno::NOENT) {
                sys::mkdir_at(dir.as_fd(), name).at("make the directory of", path)?;
                sys::chmod_at(dir.as_fd(), name, 0o755).at("make the directory of", path)?;
                next = rustix::fs::openat(&dir, name, flags, Mode::empty());
            }
            dir = next.map_err(|e| match e {
                rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP => {
                    let reason =
                        format!("leads through {}, which is no directory", Path::new(name).display());
                    Error::Source { path: path.to_owned(), reason }
                }
                e => Error::io(format!("cannot open the directory of {}", path.display()), e.into()),
            })?;
        }
        self.latest = Some((wanted.to_owned(), dir.try_clone().at("open", wanted)?));
        Ok(dir)
    }

    /// Makes way for an entry; a directory that stays is true.
    fn make_way(&mut self, dir: BorrowedFd<'_>, path: &Path, directory: bool) -> Result<bool> {
        let name = name_of(path);
        let stat = match sys::stat_at(dir, name, View::Kernel) {
            Ok(stat) => stat,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e).at("look at", path),
        };
        if stat.is_dir() && directory {
            return Ok(true);
        }
        self.latest = None;
        self.unstaged.retain(|one| one.path != path);
        if stat.is_dir() {
            self.directories.remove(path);
        }
        sys::unlink_at(dir, name, stat.is_dir()).at("replace", path)?;
        Ok(false)
    }

    /// Owner first, for it takes away set-user-ID and capabilities; the time last.
    fn attributes(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        path: &Path,
        meta: &Meta,
        xattrs: &[Xattr],
    ) -> Result<()> {
        let set = "set the attributes of";
        sys::chown_at(dir, name, meta.uid, meta.gid).at(set, path)?;
        if !sys::stat_at(dir, name, View::Kernel).at("look at", path)?.is_symlink() {
            sys::chmod_at(dir, name, meta.mode).at(set, path)?;
        }
        for xattr in xattrs {
            match sys::set_xattr(dir, name, xattr) {
                // fakeroot's answer to more than 1 KiB; the kernel has no such one here.
                Err(e) if e.raw_os_error() == Some(libc::ERANGE) => {
                    self.unstaged.push(Unstaged { path: path.to_owned(), xattr: xattr.clone() });
                }
                other => other.at(&format!("set the attribute {} of", xattr.0.display()), path)?,
            }
        }
        set_time(dir, name, meta.mtime).at(set, path)
    }

    fn write_file(
        &mut self,
        dir: BorrowedFd<'_>,
        path: &Path,
        size: u64,
        content: &mut dyn Content,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(dir, name_of(path), flags, Mode::RUSR | Mode::WUSR).at("make", path)?;
        let file = File::from(file);
        let cloned = content.file().is_some_and(|from| rustix::fs::ioctl_ficlone(&file, from).is_ok());
        if cloned {
            let mut extents = Vec::new();
            while let Some(extent) = content.next_extent().at("read", path)? {
                extents.push(extent);
            }
            self.meter.file(&extents);
            progress.advance(extents.iter().map(|e| e.end - e.start).sum());
        } else {
            let written = self.copy(Some(&file), path, content, progress)?;
            self.meter.file(&written);
        }
        // What the source said, whatever came: a shorter file ends in a hole, a longer one is cut.
        file.set_len(size).at("write", path)
    }

    /// Copies content without its zeros; returns what is left.
    fn copy(
        &mut self,
        to: Option<&File>,
        path: &Path,
        content: &mut dyn Content,
        progress: &mut dyn Progress,
    ) -> Result<Vec<Range<u64>>> {
        let mut written: Vec<Range<u64>> = Vec::new();
        while let Some(extent) = content.next_extent().at("read", path)? {
            let mut at = extent.start;
            while at < extent.end {
                if progress.cancelled() {
                    return Err(Error::Interrupted);
                }
                let room = usize::try_from(extent.end - at).unwrap_or(BUFFER).min(BUFFER);
                let got = content.read_full(&mut self.buffer[..room]).at("read", path)?;
                if got == 0 {
                    break;
                }
                for piece in data_in(&self.buffer[..got], at) {
                    let (from, until) = (at + piece.start as u64, at + piece.end as u64);
                    if let Some(to) = to {
                        to.write_all_at(&self.buffer[piece], from).at("write", path)?;
                    }
                    match written.last_mut() {
                        Some(last) if last.end == from => last.end = until,
                        _ => written.push(from..until),
                    }
                }
                at += got as u64;
                progress.advance(got as u64);
            }
        }
        Ok(written)
    }
}

impl Sink for Tree {
    fn add(&mut self, entry: Entry<'_>, progress: &mut dyn Progress) -> Result<()> {
        if progress.cancelled() {
            return Err(Error::Interrupted);
        }
        self.meter.entry(&entry);
        let Entry { path, meta, xattrs, node } = entry;
        if self.over() {
            if let Node::File { content, .. } = node {
                let written = self.copy(None, path, content, progress)?;
                self.meter.file(&written);
            }
            return Ok(());
        }
        if path.as_os_str().is_empty() {
            if !matches!(node, Node::Directory) {
                let reason = "the root of a tree must be a directory".to_owned();
                return Err(Error::Source { path: PathBuf::from("."), reason });
            }
            self.directories.insert(PathBuf::new(), (meta, xattrs.to_vec()));
            return Ok(());
        }
        let dir = self.parent(path, true)?;
        let (dir, name) = (dir.as_fd(), name_of(path));
        if let Node::HardLink(target) = &node
            && target == path
        {
            return Ok(());
        }
        let stays = self.make_way(dir, path, matches!(node, Node::Directory))?;
        match node {
            Node::Directory => {
                if !stays {
                    sys::mkdir_at(dir, name).at("make", path)?;
                }
                self.directories.insert(path.to_owned(), (meta, xattrs.to_vec()));
                return Ok(());
            }
            Node::HardLink(target) => {
                let from = self.parent(&target, false)?;
                return rustix::fs::linkat(from, name_of(&target), dir, name, AtFlags::empty())
                    .at(&format!("link to {} from", target.display()), path);
            }
            Node::File { size, content } => self.write_file(dir, path, size, content, progress)?,
            Node::Symlink(target) => rustix::fs::symlinkat(target, dir, name).at("make", path)?,
            Node::Device { kind, major, minor } => {
                sys::mknod_at(dir, name, kind, major, minor).at("make", path)?;
            }
        }
        self.attributes(dir, name, path, &meta, xattrs)
    }
}

pub(crate) fn set_time(dir: BorrowedFd<'_>, name: &OsStr, time: Time) -> io::Result<()> {
    let time = Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// The last name of a path that has one.
fn name_of(path: &Path) -> &OsStr {
    path.file_name().unwrap_or(OsStr::new("."))
}

/// The parts of `bytes`, which start at `offset`, that are not whole grains of zeros.
fn data_in(bytes: &[u8], offset: u64) -> Vec<Range<usize>> {
    let mut pieces: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let into = usize::try_from((offset + at as u64) % GRAIN as u64).unwrap_or(0);
        let until = (at + GRAIN - into).min(bytes.len());
        if !is_zero(&bytes[at..until]) {
            match pieces.last_mut() {
                Some(last) if last.end == at => last.end = until,
                _ => pieces.push(at..until),
            }
        }
        at = until;
    }
    pieces
}
