//! What a thread does with a directory: looks at everything in it, and reads files that are small at once.

use std::cell::RefCell;
use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use rustix::fs::{FileType, Mode, OFlags, RawDir};

use super::Unwanted;
use super::queue::{Ending, Open, Queue, Task};
use crate::entry::Xattr;
use crate::fill::base::Base;
use crate::sys::{self, Stat, View};

/// How many entries are sent at once, and how many of a directory one thread looks at before others may help.
const CHUNK: usize = 512;
/// Bytes of names that one call reads.
const NAMES: usize = 64 << 10;
/// Files up to this size are read when they are found: opening them a second time would cost more than to keep them.
const TINY: usize = 512;
/// So are files up to this size, as long as there is [room](Queue::keep) for them.
const SMALL: usize = 16 << 10;

/// What was found.
#[derive(Default)]
pub(super) struct Found {
    /// By the numbers of their directories, each directory's in falling order of their names.
    pub(super) entries: Vec<(u32, Vec<Child>)>,
    pub(super) trouble: Vec<(PathBuf, io::Error)>,
    /// Directories whose names changed while they were read.
    pub(super) changed: Vec<PathBuf>,
    bytes: Vec<u8>,
    count: usize,
}

impl Found {
    /// A name, or a link's target.
    pub(super) fn text(&self, text: &Range<usize>) -> &[u8] {
        &self.bytes[text.clone()]
    }

    fn keep(&mut self, text: &[u8]) -> Range<usize> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(text);
        start..self.bytes.len()
    }
}

pub(super) struct Child {
    pub(super) name: Range<usize>,
    pub(super) stat: Stat,
    pub(super) xattrs: Vec<Xattr>,
    /// A link's target.
    pub(super) target: Range<usize>,
    /// The content of a file that was read at once.
    pub(super) content: Option<Box<[u8]>>,
    /// The number of a directory that is to be read, too.
    pub(super) number: Option<u32>,
}

/// What a call or two tell of an entry.
struct Looked {
    stat: Stat,
    xattrs: Vec<Xattr>,
    content: Option<Box<[u8]>>,
}

/// One of the threads that read.
pub(super) struct Worker<'a> {
    base: &'a Base,
    unwanted: &'a Unwanted,
    queue: &'a Queue,
    sender: SyncSender<Found>,
    found: RefCell<Found>,
    names: RefCell<Vec<u8>>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(
        base: &'a Base,
        unwanted: &'a Unwanted,
        queue: &'a Queue,
        sender: SyncSender<Found>,
    ) -> Worker<'a> {
        let names = RefCell::new(Vec::with_capacity(NAMES));
        Worker { base, unwanted, queue, sender, found: RefCell::default(), names }
    }

    /// Works until there is nothing more to do, or nobody wants it.
    pub(super) fn work(&self) {
        let _guard = Ending(self.queue);
        let mut own: Vec<Task> = Vec::new();
        loop {
            let task = match own.pop() {
                Some(task) => task,
                // Whoever waits for work holds nothing back.
                None if !self.send() => return,
                None => match self.queue.next() {
                    Some(task) => task,
                    None => return,
                },
            };
            let went_on = match task {
                Task::List { number, path } => self.list(number, path, &mut own),
                Task::Look(open, names) => {
                    self.look(&open, &names, &mut own);
                    true
                }
            };
            let full = self.found.borrow().count >= CHUNK;
            let share = !own.is_empty() && self.queue.is_hungry();
            if !went_on || ((full || share) && !self.send()) {
                return;
            }
            if share {
                // The oldest are nearest to the root: there is most below them.
                let some = own.len().div_ceil(2);
                self.queue.give(own.drain(..some));
            }
        }
    }

    /// Sends what was found; false when nobody wants more.
    fn send(&self) -> bool {
        let found = self.found.take();
        found.count == 0 || self.sender.send(found).is_ok()
    }

    fn trouble(&self, path: PathBuf, error: io::Error) {
        let mut found = self.found.borrow_mut();
        found.trouble.push((path, error));
        found.count += 1;
    }

    /// Reads a directory; false when nobody wants more.
    fn list(&self, number: u32, path: PathBuf, own: &mut Vec<Task>) -> bool {
        match self.try_list(number, &path, own) {
            Ok(went_on) => went_on,
            Err(error) => {
                self.trouble(path, error);
                true
            }
        }
    }

    fn try_list(&self, number: u32, path: &Path, own: &mut Vec<Task>) -> io::Result<bool> {
        let fd = self.base.open_directory(path)?;
        let before = sys::stat_of(fd.as_fd())?;
        let open = Arc::new(Open { number, path: path.to_owned(), fd });
        let mut names = Vec::new();
        let mut buffer = self.names.borrow_mut();
        let mut entries = RawDir::new(&open.fd, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            names.push((name.to_owned(), entry.file_type()));
            if names.len() == CHUNK {
                let names = std::mem::take(&mut names);
                if self.queue.is_hungry() {
                    if !self.send() {
                        return Ok(false);
                    }
                    self.queue.give(std::iter::once(Task::Look(Arc::clone(&open), names)));
                } else {
                    self.look(&open, &names, own);
                    if !self.send() {
                        return Ok(false);
                    }
                }
            }
        }
        drop(buffer);
        self.look(&open, &names, own);
        if sys::stat_of(open.fd.as_fd())?.mtime != before.mtime {
            self.found.borrow_mut().changed.push(path.to_owned());
        }
        Ok(true)
    }

    fn look(&self, open: &Open, names: &[(CString, FileType)], own: &mut Vec<Task>) {
        let mut children = Vec::with_capacity(names.len());
        for (name, kind) in names {
            let plain = OsStr::from_bytes(name.to_bytes());
            let path = || open.path.join(plain);
            if self.unwanted.exclude.any() && self.unwanted.exclude.matches(&path()) {
                continue;
            }
            match self.child(open.fd.as_fd(), name, *kind) {
                Ok(Some(mut child)) => {
                    // What is mounted there is another tree.
                    if child.stat.is_dir() && child.stat.device == self.base.stat.device {
                        let number = self.queue.number();
                        child.number = Some(number);
                        own.push(Task::List { number, path: path() });
                    }
                    children.push(child);
                }
                Ok(None) => {}
                Err(error) => self.trouble(path(), error),
            }
        }
        let mut found = self.found.borrow_mut();
        let found = &mut *found;
        let bytes = &found.bytes;
        children.sort_unstable_by(|a, b| bytes[b.name.clone()].cmp(&bytes[a.name.clone()]));
        found.count += children.len() + 1;
        found.entries.push((open.number, children));
    }

    fn child(&self, directory: BorrowedFd<'_>, name: &CStr, kind: FileType) -> io::Result<Option<Child>> {
        let mut looked = if kind == FileType::RegularFile { self.file(directory, name)? } else { None };
        if looked.is_none() {
            looked = self.other(directory, name)?;
        }
        let Some(Looked { stat, xattrs, content }) = looked else { return Ok(None) };
        if self.unwanted.skip.contains(&stat.key()) {
            return Ok(None);
        }
        let target = if stat.is_symlink() {
            rustix::fs::readlinkat(directory, name, Vec::new())?.into_bytes()
        } else {
            Vec::new()
        };
        let mut found = self.found.borrow_mut();
        let (name, target) = (found.keep(name.to_bytes()), found.keep(&target));
        Ok(Some(Child { name, stat, xattrs, target, content, number: None }))
    }

    /// Looks at what is a regular file by its directory: it is opened, which tells whether it may be read, and read if it is
    /// small. Nothing where it is no such file any more.
    fn file(&self, directory: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Looked>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(rustix::io::Errno::LOOP | rustix::io::Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let stat = sys::stat_of(file.as_fd())?;
        if !stat.is_file() {
            return Ok(None);
        }
        let content = self.content(file.as_fd(), &stat);
        Ok(Some(Looked { xattrs: sys::xattrs_of(file.as_fd())?, stat, content }))
    }

    /// Looks at anything else.
    fn other(&self, directory: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Looked>> {
        let plain = OsStr::from_bytes(name.to_bytes());
        let stat = sys::stat_at(directory, plain, View::Kernel)?;
        if stat.is_file() {
            // Its directory did not say so.
            let gone = || io::Error::from_raw_os_error(libc::ESTALE);
            return self.file(directory, name)?.map(Some).ok_or_else(gone);
        }
        let none = sys::has_no_xattrs(directory, name);
        let xattrs = if none { Vec::new() } else { sys::xattrs(directory, plain, View::Kernel)? };
        Ok(Some(Looked { stat, xattrs, content: None }))
    }

    /// The content of a small file. Nothing of one that is larger, changes meanwhile or cannot be read: that is told when it
    /// is read the usual way.
    fn content(&self, file: BorrowedFd<'_>, stat: &Stat) -> Option<Box<[u8]>> {
        let size = usize::try_from(stat.size).ok().filter(|size| (1..=SMALL).contains(size))?;
        if size > TINY && !self.queue.keep(size) {
            return None;
        }
        let mut buffer = [MaybeUninit::<u8>::uninit(); SMALL];
        let (content, _) = rustix::io::pread(file, &mut buffer[..size], 0).ok()?;
        let content = (content.len() == size).then(|| Box::from(&*content));
        content.filter(|_| sys::stat_of(file).is_ok_and(|after| after.is_as(stat)))
    }
}
