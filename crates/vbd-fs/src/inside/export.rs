//! A tree of an image, copied to the host.
//!
//! Names come from the image, so they are not trusted: every entry is made in a directory that was opened before, by one
//! name, and no link is followed on the way, neither one of the image nor one that was there. What only root may make or
//! keep is left out for others, and told.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, FileType as HostType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use vbd_ext4::read::{FileType, Filesystem, Inode, Xattr};

use super::walk::{Step, Walk};
use crate::Cancel;
use crate::error::Context;
use crate::{Error, Result};

/// Bytes that are read at once.
const PIECE: usize = 1 << 20;
/// Directories that are kept open on the way down. Those above are opened again on the way up.
const OPEN: usize = 200;
/// What a directory is opened with.
const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// How a tree is copied.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Leave devices out without a word, instead of telling that they cannot be made.
    pub no_devices: bool,
    /// What the copy stops for.
    pub cancel: Cancel,
}

/// What was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Report {
    /// Entries that are there now, further names of files included.
    pub entries: u64,
    /// Bytes of content, without holes.
    pub bytes: u64,
    /// Entries that were not copied, each told by its name.
    pub failed: u64,
    /// Attributes that only root may set, or that the destination cannot hold.
    pub attributes_lost: u64,
    /// Devices that were left out because that was asked for.
    pub devices_left_out: u64,
}

/// Copies a file, or a directory with all in it, to `to`. A directory that is there already stays as it is and is filled;
/// whatever else is there is replaced, links not followed. `told` hears of each entry that could not be copied.
///
/// # Errors
///
/// A destination that cannot be made, or a wish to stop. What goes wrong with an entry ends nothing but that entry.
pub fn export(
    filesystem: &Filesystem,
    from: Inode,
    to: &Path,
    options: &Options,
    told: &mut dyn FnMut(&str),
) -> Result<Report> {
    let (parent, name) = match (to.parent(), to.file_name()) {
        (Some(parent), Some(name)) => (parent, name),
        // The root, or what ends in `..`: there already, whatever it is.
        _ => (to, OsStr::new(".")),
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    // The destination is the user's own word, so here links count.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::open(parent, flags, Mode::empty()).at("open", parent)?;
    let mut name = name.to_owned();
    let mut top = top;
    if from.file_type() == FileType::Directory
        && let Ok(there) = rustix::fs::open(to, flags, Mode::empty())
    {
        // A directory, or a link to one.
        (top, name) = (there, ".".into());
    }
    let mut copy = Copy {
        filesystem,
        options,
        told,
        to,
        top,
        name: name.as_bytes().to_vec(),
        levels: Vec::new(),
        links: HashMap::new(),
        buffer: vec![0; PIECE],
        report: Report::default(),
        root: rustix::process::geteuid().is_root(),
    };
    copy.run(from)?;
    Ok(copy.report)
}

/// A directory that is being filled.
struct Level {
    name: Vec<u8>,
    /// Open, unless it is far above.
    directory: Option<OwnedFd>,
    /// What it becomes when all is in it; nothing if it was there before.
    becomes: Option<(Inode, Vec<Xattr>)>,
}

struct Copy<'a> {
    filesystem: &'a Filesystem,
    options: &'a Options,
    told: &'a mut dyn FnMut(&str),
    to: &'a Path,
    /// Where the copy begins to exist.
    top: OwnedFd,
    /// Its name there.
    name: Vec<u8>,
    levels: Vec<Level>,
    /// Where each file with several names is, as names from the top on.
    links: HashMap<u32, Vec<u8>>,
    buffer: Vec<u8>,
    report: Report,
    root: bool,
}

/// One entry's fate.
type Attempt<T> = std::result::Result<T, Failure>;

/// Why one entry could not be copied.
enum Failure {
    /// It alone.
    Entry(String),
    /// All that follows, too.
    Stop(Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Entry(error.to_string())
    }
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        io::Error::from(error).into()
    }
}

impl From<vbd_ext4::read::Error> for Failure {
    fn from(error: vbd_ext4::read::Error) -> Self {
        Failure::Entry(error.to_string())
    }
}

impl Copy<'_> {
    fn run(&mut self, from: Inode) -> Result<()> {
        let mut walk = Walk::new(self.filesystem, from);
        while let Some(step) = walk.next() {
            if self.options.cancel.requested() {
                return Err(Error::Stopped);
            }
            let found = match step {
                Ok(Step::Enter(found)) => found,
                Ok(Step::Leave) => {
                    self.leave();
                    continue;
                }
                Err(trouble) => {
                    self.failed(&trouble.path, &trouble.error.to_string());
                    continue;
                }
            };
            let name = if found.depth == 0 { self.name.clone() } else { found.name().to_vec() };
            match self.entry(&name, &found.path, &found.inode) {
                Ok(()) => {}
                Err(Failure::Stop(error)) => return Err(error),
                Err(Failure::Entry(reason)) => {
                    self.failed(&found.path, &reason);
                    if found.inode.file_type() == FileType::Directory {
                        walk.prune();
                    }
                }
            }
        }
        Ok(())
    }

    fn failed(&mut self, path: &[u8], reason: &str) {
        self.report.failed += 1;
        let path = match path {
            b"" => self.to.to_owned(),
            path => self.to.join(OsStr::from_bytes(path)),
        };
        // Names are the image's words; what could steer a terminal is shown as a question mark.
        (self.told)(&format!("{}: {reason}", path.display()).replace(char::is_control, "?"));
    }

    fn entry(&mut self, name: &[u8], path: &[u8], inode: &Inode) -> Attempt<()> {
        // The reader gives no such names; what would come of one is worth asking twice.
        let inside = !name.is_empty() && !name.contains(&b'/') && name != b"..";
        if !inside || name == b"." && !path.is_empty() {
            return Err(Failure::Entry("no file can have that name".to_owned()));
        }
        let xattrs = self.filesystem.xattrs(inode)?;
        if inode.file_type() == FileType::Directory {
            return self.directory(name, inode, xattrs);
        }
        let device = matches!(inode.file_type(), FileType::Character | FileType::Block);
        if device && self.options.no_devices {
            self.report.devices_left_out += 1;
            return Ok(());
        }
        let parent = self.parent()?;
        remove(parent.as_fd(), name)?;
        if inode.links() > 1 && self.link(parent.as_fd(), name, inode.number())? {
            self.report.entries += 1;
            return Ok(());
        }
        let parent = parent.as_fd();
        match inode.file_type() {
            FileType::Regular => self.file(parent, name, inode, &xattrs)?,
            FileType::Symlink => {
                let target = self.filesystem.read_link(inode)?;
                rustix::fs::symlinkat(OsStr::from_bytes(&target), parent, OsStr::from_bytes(name))?;
                self.without_opening(parent, name, inode, &xattrs)?;
            }
            _ => {
                self.special(parent, name, inode)?;
                self.without_opening(parent, name, inode, &xattrs)?;
            }
        }
        if inode.links() > 1 {
            let names = self.levels.iter().map(|level| &level.name[..]).chain([name]);
            self.links.insert(inode.number(), names.collect::<Vec<_>>().join(&b'/'));
        }
        self.report.entries += 1;
        Ok(())
    }

    /// The directory that the next entry goes to, opened again where it was closed.
    fn parent(&mut self) -> Attempt<OwnedFd> {
        let open = self.levels.iter().rposition(|level| level.directory.is_some());
        let mut at = match open.and_then(|open| self.levels[open].directory.as_ref()) {
            Some(directory) => directory.try_clone()?,
            None => self.top.try_clone()?,
        };
        let first = open.map_or(0, |open| open + 1);
        for level in &mut self.levels[first..] {
            at = rustix::fs::openat(&at, OsStr::from_bytes(&level.name), DIRECTORY, Mode::empty())?;
            level.directory = Some(at.try_clone()?);
        }
        Ok(at)
    }

    fn directory(&mut self, name: &[u8], inode: &Inode, xattrs: Vec<Xattr>) -> Attempt<()> {
        let parent = self.parent()?;
        let os_name = OsStr::from_bytes(name);
        let made = match rustix::fs::mkdirat(&parent, os_name, Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(error.into()),
        };
        let opened = rustix::fs::openat(&parent, os_name, DIRECTORY, Mode::empty());
        let directory = opened.map_err(|error| match error {
            Errno::NOTDIR | Errno::LOOP => {
                Failure::Entry("there is something that is no directory; remove it first".to_owned())
            }
            other => other.into(),
        })?;
        let becomes = made.then(|| (inode.clone(), xattrs));
        self.levels.push(Level { name: name.to_vec(), directory: Some(directory), becomes });
        if let Some(far) = self.levels.len().checked_sub(OPEN) {
            self.levels[far].directory = None;
        }
        self.report.entries += 1;
        Ok(())
    }

    /// Ends the directory that was entered last: with its attributes, which might have kept its content out.
    fn leave(&mut self) {
        let path = self.levels.iter().skip(1).map(|level| &level.name[..]).collect::<Vec<_>>().join(&b'/');
        let directory = self.parent();
        let Some(Level { becomes: Some((inode, xattrs)), .. }) = self.levels.pop() else { return };
        let result = directory.and_then(|directory| self.become_like(directory.as_fd(), &inode, &xattrs));
        if let Err(Failure::Entry(reason)) = result {
            self.failed(&path, &reason);
        }
    }

    /// Gives a file one more name, if it has one here already and the destination can do that.
    fn link(&self, parent: BorrowedFd<'_>, name: &[u8], number: u32) -> Attempt<bool> {
        let Some(first) = self.links.get(&number) else { return Ok(false) };
        let (directory, first) = match first.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => (&first[..slash], &first[slash + 1..]),
            None => (&b"."[..], &first[..]),
        };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened =
            rustix::fs::openat2(&self.top, OsStr::from_bytes(directory), flags, Mode::empty(), resolve);
        let directory = match opened {
            // Deeper than a path can say: there it is copied once more, as where no links can be.
            Err(Errno::NAMETOOLONG) => return Ok(false),
            other => other?,
        };
        let made = rustix::fs::linkat(
            &directory,
            OsStr::from_bytes(first),
            parent,
            OsStr::from_bytes(name),
            AtFlags::empty(),
        );
        match made {
            Ok(()) => Ok(true),
            // Where a file can have no other name, or no more, it is copied once more.
            Err(Errno::PERM | Errno::OPNOTSUPP | Errno::MLINK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn file(&mut self, parent: BorrowedFd<'_>, name: &[u8], inode: &Inode, xattrs: &[Xattr]) -> Attempt<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let os_name = OsStr::from_bytes(name);
        let file = File::from(rustix::fs::openat(parent, os_name, flags, Mode::RUSR | Mode::WUSR)?);
        let copied = self.content(&file, inode);
        let copied = copied.and_then(|()| self.become_like(file.as_fd(), inode, xattrs));
        if copied.is_err() {
            // Half a file is worse than none. That it cannot be removed says no more than why it failed.
            let _ = rustix::fs::unlinkat(parent, os_name, AtFlags::empty());
        }
        copied
    }

    fn content(&mut self, file: &File, inode: &Inode) -> Attempt<()> {
        file.set_len(inode.size())?;
        for range in self.filesystem.data(inode, 0)? {
            let range = range?;
            let mut at = range.start;
            while at < range.end {
                if self.options.cancel.requested() {
                    return Err(Failure::Stop(Error::Stopped));
                }
                let length = usize::try_from(range.end - at).unwrap_or(PIECE).min(PIECE);
                let read = self.filesystem.read_at(inode, at, &mut self.buffer[..length])?;
                file.write_all_at(&self.buffer[..read], at)?;
                self.report.bytes += read as u64;
                at += length as u64;
            }
        }
        Ok(())
    }

    fn special(&self, parent: BorrowedFd<'_>, name: &[u8], inode: &Inode) -> Attempt<()> {
        let kind = match inode.file_type() {
            FileType::Character => HostType::CharacterDevice,
            FileType::Block => HostType::BlockDevice,
            FileType::Socket => HostType::Socket,
            _ => HostType::Fifo,
        };
        let (major, minor) = inode.device().unwrap_or((0, 0));
        let mode = Mode::RUSR | Mode::WUSR;
        let device = rustix::fs::makedev(major, minor);
        let made = rustix::fs::mknodat(parent, OsStr::from_bytes(name), kind, mode, device);
        match made {
            Err(Errno::PERM) if inode.device().is_some() => {
                let reason = "a device, which only root may make; --no-devices leaves devices out";
                Err(Failure::Entry(reason.to_owned()))
            }
            other => Ok(other?),
        }
    }

    /// Attributes of what is open.
    fn become_like(&mut self, file: BorrowedFd<'_>, inode: &Inode, xattrs: &[Xattr]) -> Attempt<()> {
        let attributes = inode.attributes();
        let owner = rustix::fs::fchown(
            file,
            Some(Uid::from_raw(attributes.uid)),
            Some(Gid::from_raw(attributes.gid)),
        );
        let owned = self.owned(owner)?;
        for (name, value) in xattrs {
            let set = rustix::fs::fsetxattr(file, OsStr::from_bytes(name), value, XattrFlags::empty());
            self.kept(set)?;
        }
        rustix::fs::fchmod(file, mode(inode, owned))?;
        rustix::fs::futimens(file, &times(inode))?;
        Ok(())
    }

    /// Attributes of what must not be opened, or cannot be.
    fn without_opening(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        inode: &Inode,
        xattrs: &[Xattr],
    ) -> Attempt<()> {
        let attributes = inode.attributes();
        let os_name = OsStr::from_bytes(name);
        let owner = rustix::fs::chownat(
            parent,
            os_name,
            Some(Uid::from_raw(attributes.uid)),
            Some(Gid::from_raw(attributes.gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        );
        let owned = self.owned(owner)?;
        for (key, value) in xattrs {
            // There is no call for a name in a directory, so it goes through the directory's own path.
            let path = [format!("/proc/self/fd/{}/", parent.as_raw_fd()).as_bytes(), name].concat();
            let set = rustix::fs::lsetxattr(
                OsStr::from_bytes(&path),
                OsStr::from_bytes(key),
                value,
                XattrFlags::empty(),
            );
            self.kept(set)?;
        }
        if inode.file_type() != FileType::Symlink {
            // It was made a moment ago and is no link.
            rustix::fs::chmodat(parent, os_name, mode(inode, owned), AtFlags::empty())?;
        }
        rustix::fs::utimensat(parent, os_name, &times(inode), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    /// Whether the owner is the right one now. Others than root keep what they make.
    fn owned(&self, changed: rustix::io::Result<()>) -> Attempt<bool> {
        match changed {
            Ok(()) => Ok(true),
            Err(Errno::PERM | Errno::INVAL) if !self.root => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Counts an attribute that cannot be there.
    fn kept(&mut self, set: rustix::io::Result<()>) -> Attempt<()> {
        match set {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP) => {
                self.report.attributes_lost += 1;
                Ok(())
            }
            Err(Errno::PERM | Errno::ACCESS) if !self.root => {
                self.report.attributes_lost += 1;
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Takes away what has this name, unless it is a directory or nothing.
fn remove(parent: BorrowedFd<'_>, name: &[u8]) -> Attempt<()> {
    match rustix::fs::unlinkat(parent, OsStr::from_bytes(name), AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {
            Err(Failure::Entry("there is a directory of that name; remove it first".to_owned()))
        }
        Err(error) => Err(error.into()),
    }
}

/// The permission bits. A program that runs as its owner or group must not become one of somebody else.
fn mode(inode: &Inode, owned: bool) -> Mode {
    let bits = u32::from(inode.attributes().mode);
    Mode::from_raw_mode(if owned { bits } else { bits & 0o1777 })
}

fn times(inode: &Inode) -> Timestamps {
    let attributes = inode.attributes();
    let time =
        |time: vbd_ext4::read::Timestamp| Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() };
    Timestamps { last_access: time(attributes.atime), last_modification: time(attributes.mtime) }
}
