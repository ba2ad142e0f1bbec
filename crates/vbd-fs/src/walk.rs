//! A directory as a source: every entry of one filesystem, with all that belongs to it.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, SeekFrom};

use crate::entry::{Content, Entry, Node, Sink, Special};
use crate::error::Context;
use crate::pattern::Patterns;
use crate::sys::{self, Stat, View};
use crate::{Error, Progress, Result};

/// How often a file that changes while it is read is read again.
const TRIES: u32 = 3;

/// What a walk leaves out and how it looks at things.
pub(crate) struct Walk {
    /// Where the tree is, for messages.
    pub(crate) base: PathBuf,
    pub(crate) view: View,
    /// Left out with all below.
    pub(crate) exclude: Patterns,
    /// Files and directories (device, inode) that are left out: the image, the staging tree.
    pub(crate) skip: HashSet<(u64, u64)>,
    /// A user and a group whose files are given to root.
    pub(crate) to_root: Option<(u32, u32)>,
    /// Take what changes as it is found.
    pub(crate) live: bool,
    /// Where each file with several names was seen first.
    seen: HashMap<(u64, u64), PathBuf>,
    pub(crate) warnings: Vec<String>,
}

impl Walk {
    pub(crate) fn new(base: &Path, view: View) -> Walk {
        Walk {
            base: base.to_owned(),
            view,
            exclude: Patterns::default(),
            skip: HashSet::new(),
            to_root: None,
            live: false,
            seen: HashMap::new(),
            warnings: Vec::new(),
        }
    }

    /// Sends every entry to `sink`: a directory before what is in it, names in order.
    pub(crate) fn run(&mut self, sink: &mut dyn Sink, progress: &mut dyn Progress) -> Result<()> {
        self.seen.clear();
        self.warnings.clear();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&self.base, flags, Mode::empty())
            .map_err(|e| self.unreadable(Path::new(""), e.into()))?;
        let stat = sys::stat_at(root.as_fd(), "".as_ref(), self.view)
            .map_err(|e| self.unreadable("".as_ref(), e))?;
        self.directory(root, &stat, PathBuf::new(), stat.device, sink, progress)
    }

    fn directory(
        &mut self,
        dir: OwnedFd,
        stat: &Stat,
        path: PathBuf,
        device: u64,
        sink: &mut dyn Sink,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let xattrs =
            sys::xattrs(dir.as_fd(), "".as_ref(), self.view).map_err(|e| self.unreadable(&path, e))?;
        let meta = self.owner(stat).meta();
        sink.add(Entry { path: &path, meta, xattrs: &xattrs, node: Node::Directory }, progress)?;
        if stat.device != device {
            return Ok(());
        }
        for name in names(&dir).map_err(|e| self.unreadable(&path, e))? {
            let child = path.join(&name);
            if self.exclude.matches(&child) {
                continue;
            }
            self.child(dir.as_fd(), &name, child, device, sink, progress)?;
        }
        let after = sys::stat_at(dir.as_fd(), "".as_ref(), View::Kernel);
        if !after.is_ok_and(|after| after.mtime == stat.mtime) {
            self.changed(&path, "entries were made or removed while it was read")?;
        }
        Ok(())
    }

    fn child(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &OsString,
        path: PathBuf,
        device: u64,
        sink: &mut dyn Sink,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let stat = match sys::stat_at(dir, name, self.view) {
            Ok(stat) => stat,
            Err(e) => return self.vanished_or(&path, e),
        };
        if self.skip.contains(&stat.key()) {
            return Ok(());
        }
        if stat.is_dir() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            return match rustix::fs::openat(dir, name, flags, Mode::empty()) {
                Ok(fd) => self.directory(fd, &stat, path, device, sink, progress),
                Err(e) => self.vanished_or(&path, e.into()),
            };
        }
        if stat.links > 1
            && let Some(first) = self.seen.get(&stat.key())
        {
            let node = Node::HardLink(first.clone());
            return sink
                .add(Entry { path: &path, meta: self.owner(&stat).meta(), xattrs: &[], node }, progress);
        }
        let sent = if stat.is_file() {
            self.file(dir, name, &path, sink, progress)?
        } else {
            self.special(dir, name, &path, &stat, sink, progress)?
        };
        if sent && stat.links > 1 {
            self.seen.insert(stat.key(), path);
        }
        Ok(())
    }

    fn file(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &OsString,
        path: &Path,
        sink: &mut dyn Sink,
        progress: &mut dyn Progress,
    ) -> Result<bool> {
        for attempt in 1.. {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
                Ok(file) => File::from(file),
                Err(e) => return self.vanished_or(path, e.into()).map(|()| false),
            };
            let looked = sys::stat_at(file.as_fd(), "".as_ref(), self.view)
                .and_then(|stat| Ok((stat, sys::xattrs(dir, name, self.view)?)));
            let (stat, xattrs) = match looked {
                Ok(looked) => looked,
                Err(e) => return self.vanished_or(path, e).map(|()| false),
            };
            if !stat.is_file() {
                self.changed(path, "it was replaced while it was read")?;
                return Ok(false);
            }
            let mut data = FileData::new(&file, stat.size);
            let entry = Entry {
                path,
                meta: self.owner(&stat).meta(),
                xattrs: &xattrs,
                node: Node::File { size: stat.size, content: &mut data },
            };
            let added = sink.add(entry, progress);
            if let Some(e) = data.failed {
                return Err(self.unreadable(path, e));
            }
            added?;
            let same = |now: Stat| (now.size, now.mtime, now.ctime) == (stat.size, stat.mtime, stat.ctime);
            if sys::stat_at(file.as_fd(), "".as_ref(), self.view).is_ok_and(same) {
                return Ok(true);
            }
            if attempt == TRIES {
                self.changed(path, &format!("it changed while it was read, {TRIES} times"))?;
                return Ok(true);
            }
        }
        Ok(true)
    }

    fn special(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &OsString,
        path: &Path,
        stat: &Stat,
        sink: &mut dyn Sink,
        progress: &mut dyn Progress,
    ) -> Result<bool> {
        let target;
        let kind = match stat.kind() {
            libc::S_IFCHR => Special::Character,
            libc::S_IFBLK => Special::Block,
            libc::S_IFIFO => Special::Fifo,
            _ => Special::Socket,
        };
        let node = if stat.is_symlink() {
            target = match rustix::fs::readlinkat(dir, name, Vec::new()) {
                Ok(target) => PathBuf::from(OsString::from_vec(target.into_bytes())),
                Err(e) => return self.vanished_or(path, e.into()).map(|()| false),
            };
            Node::Symlink(&target)
        } else {
            let rdev = if matches!(kind, Special::Character | Special::Block) { stat.rdev } else { 0 };
            Node::Device { kind, major: libc::major(rdev), minor: libc::minor(rdev) }
        };
        let xattrs = match sys::xattrs(dir, name, self.view) {
            Ok(xattrs) => xattrs,
            Err(e) => return self.vanished_or(path, e).map(|()| false),
        };
        sink.add(Entry { path, meta: self.owner(stat).meta(), xattrs: &xattrs, node }, progress)?;
        Ok(true)
    }

    fn owner(&self, stat: &Stat) -> Stat {
        let mut stat = *stat;
        if let Some((uid, gid)) = self.to_root {
            if stat.uid == uid {
                stat.uid = 0;
            }
            if stat.gid == gid {
                stat.gid = 0;
            }
        }
        stat
    }

    fn unreadable(&self, path: &Path, error: io::Error) -> Error {
        let remedy = match error.kind() {
            io::ErrorKind::PermissionDenied => "; exclude it, or run as a user who may read it",
            _ => "",
        };
        Error::Source { path: self.base.join(path), reason: format!("cannot be read: {error}{remedy}") }
    }

    /// An entry that went away between its name and its content is a change, anything else an error.
    fn vanished_or(&mut self, path: &Path, error: io::Error) -> Result<()> {
        let gone = [libc::ENOENT, libc::ELOOP, libc::ENOTDIR, libc::ENXIO, libc::ESTALE];
        if error.raw_os_error().is_some_and(|e| gone.contains(&e)) {
            return self.changed(path, "it was removed or replaced while it was read");
        }
        Err(self.unreadable(path, error))
    }

    fn changed(&mut self, path: &Path, what: &str) -> Result<()> {
        let path = self.base.join(path);
        if self.live {
            self.warnings.push(format!("{}: {what}; taken as found", path.display()));
            return Ok(());
        }
        let reason = format!("{what}; stop what writes there, exclude it, or build live to take it as found");
        Err(Error::Source { path, reason })
    }
}

fn names(dir: &OwnedFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name));
        }
    }
    names.sort();
    Ok(names)
}

/// A file's extents, as the filesystem knows them.
pub(crate) struct FileData<'a> {
    file: &'a File,
    size: u64,
    at: u64,
    end: u64,
    /// The first error in reading, kept apart from what goes wrong in writing.
    pub(crate) failed: Option<io::Error>,
}

impl FileData<'_> {
    pub(crate) fn new(file: &File, size: u64) -> FileData<'_> {
        FileData { file, size, at: 0, end: 0, failed: None }
    }

    fn seek(&self) -> io::Result<Option<Range<u64>>> {
        let start = match rustix::fs::seek(self.file, SeekFrom::Data(self.end)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            // A filesystem that knows no holes.
            Err(rustix::io::Errno::INVAL) => return Ok(Some(self.end..self.size)),
            Err(e) => return Err(e.into()),
        };
        if start >= self.size {
            return Ok(None);
        }
        let end = rustix::fs::seek(self.file, SeekFrom::Hole(start)).unwrap_or(self.size).min(self.size);
        Ok(Some(start..end.max(start)))
    }

    fn note<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|e| {
            let kind = e.kind();
            self.failed.get_or_insert(e);
            kind.into()
        })
    }
}

impl Content for FileData<'_> {
    fn next_extent(&mut self) -> io::Result<Option<Range<u64>>> {
        if self.end >= self.size {
            return Ok(None);
        }
        let extent = self.seek();
        let Some(extent) = self.note(extent)? else {
            self.end = self.size;
            return Ok(None);
        };
        (self.at, self.end) = (extent.start, extent.end);
        Ok(Some(extent))
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.end - self.at).unwrap_or(buffer.len()).min(buffer.len());
        let got = self.file.read_at(&mut buffer[..room], self.at);
        if let Err(e) = &got
            && e.kind() == io::ErrorKind::Interrupted
        {
            return got;
        }
        let got = self.note(got)?;
        self.at += got as u64;
        Ok(got)
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

/// A file read from its start, for what is put into a tree from outside.
pub(crate) fn open_regular(path: &Path) -> Result<(impl Read, Stat)> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).at("open", path)?);
    let stat = sys::stat_at(file.as_fd(), "".as_ref(), View::Kernel).at("look at", path)?;
    Ok((file, stat))
}
