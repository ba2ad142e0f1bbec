//! Where tailoring writes: a tree's root that no path and no link leads out of.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::follow::{End, Names, follow};
use crate::error::Context;
use crate::sys::{self, Stat, View};
use crate::tree::set_time;
use crate::{Error, Meta, Result};

/// The largest file that is read whole: those that are edited are text.
pub(crate) const TEXT: u64 = 16 << 20;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A device, a FIFO or a socket.
    Special,
}

/// An entry's kind and attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// What it is.
    pub kind: Kind,
    /// Its owner, mode and time.
    pub meta: Meta,
}

/// A tree that can be edited. Paths are absolute and mean this tree: links, absolute ones too, are followed inside of it
/// and never lead out, as after `chroot`.
pub trait Root {
    /// What is at a path, through links; nothing where there is nothing.
    fn look(&self, path: &str) -> Result<Option<Attributes>>;
    /// What is at a path, a link as the last of it not followed.
    fn look_at_link(&self, path: &str) -> Result<Option<Attributes>>;
    /// A file's content, at most 16 MiB; nothing where there is none.
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>>;
    /// A directory's names, in order.
    fn list(&self, path: &str) -> Result<Vec<OsString>>;
    /// Writes a whole file with these attributes. A file that exists stays the same inode, through links; a link to
    /// nothing is replaced. The directory exists.
    fn write(&mut self, path: &str, data: &mut dyn Read, meta: &Meta) -> Result<()>;
    /// Makes a directory in one that exists.
    fn make_directory(&mut self, path: &str, meta: &Meta) -> Result<()>;
    /// Makes a symbolic link of root's, in place of what is there, unless that is a directory.
    fn symlink(&mut self, path: &str, target: &str) -> Result<()>;
    /// Removes a file, a link or an empty directory.
    fn remove(&mut self, path: &str) -> Result<()>;
}

/// A real directory as a root. Owners and devices are set through the C library, for fakeroot's sake.
pub(crate) struct TreeRoot {
    root: OwnedFd,
}

/// A place in the tree: an open directory and a name in it, which may not exist yet.
struct Place {
    directory: OwnedFd,
    name: OsString,
    stat: Option<Stat>,
}

impl TreeRoot {
    pub(crate) fn new(root: OwnedFd) -> TreeRoot {
        TreeRoot { root }
    }

    fn find(&self, path: &str, follow_last: bool) -> io::Result<Place> {
        Ok(match follow(self, path, follow_last)? {
            End::Name(directory, name, stat) => Place { directory, name: OsString::from_vec(name), stat },
            End::Directory(directory) => {
                let stat = sys::stat_at(directory.as_fd(), OsStr::new(""), View::Library)?;
                Place { directory, name: OsString::from("."), stat: Some(stat) }
            }
        })
    }

    /// As [`TreeRoot::find`], where nothing, or nothing above it, is no error.
    fn find_any(&self, path: &str, follow_last: bool) -> Result<Option<Place>> {
        match self.find(path, follow_last) {
            Ok(place) => Ok(Some(place)),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
            Err(e) => Err(e).at("find in the tree", Path::new(path)),
        }
    }

    fn look_with(&self, path: &str, follow_last: bool) -> Result<Option<Attributes>> {
        let stat = self.find_any(path, follow_last)?.and_then(|place| place.stat);
        Ok(stat.map(|stat| Attributes { kind: kind(&stat), meta: stat.meta() }))
    }

    fn open(&self, place: &Place, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(&place.directory, &place.name, flags, Mode::RUSR | Mode::WUSR)?))
    }

    fn place_to_make(&self, path: &str) -> Result<Place> {
        self.find(path, false).at("make in the tree", Path::new(path))
    }
}

/// Each directory is opened without following links.
impl Names for TreeRoot {
    type Directory = OwnedFd;
    type Found = Stat;

    fn root(&self) -> io::Result<OwnedFd> {
        self.root.try_clone()
    }

    fn entry(&self, directory: &OwnedFd, name: &[u8]) -> io::Result<Option<Stat>> {
        match sys::stat_at(directory.as_fd(), OsStr::from_bytes(name), View::Library) {
            Ok(stat) => Ok(Some(stat)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn kind(&self, stat: &Stat) -> Kind {
        kind(stat)
    }

    fn target(&self, directory: &OwnedFd, name: &[u8], _: &Stat) -> io::Result<Vec<u8>> {
        Ok(rustix::fs::readlinkat(directory, OsStr::from_bytes(name), Vec::new())?.into_bytes())
    }

    fn enter(&self, directory: &OwnedFd, name: &[u8], _: &Stat) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(directory, OsStr::from_bytes(name), flags, Mode::empty())?)
    }
}

fn kind(stat: &Stat) -> Kind {
    match stat.kind() {
        libc::S_IFREG => Kind::File,
        libc::S_IFDIR => Kind::Directory,
        libc::S_IFLNK => Kind::Link,
        _ => Kind::Special,
    }
}

impl Root for TreeRoot {
    fn look(&self, path: &str) -> Result<Option<Attributes>> {
        self.look_with(path, true)
    }

    fn look_at_link(&self, path: &str) -> Result<Option<Attributes>> {
        self.look_with(path, false)
    }

    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let Some(place) = self.find_any(path, true)? else { return Ok(None) };
        let Some(stat) = place.stat else { return Ok(None) };
        if !stat.is_file() || stat.size > TEXT {
            return Err(Error::tailor(path, "is no file of text in the tree"));
        }
        let mut data = Vec::new();
        let file = self.open(&place, OFlags::RDONLY).at("open in the tree", Path::new(path))?;
        file.take(TEXT).read_to_end(&mut data).at("read in the tree", Path::new(path))?;
        Ok(Some(data))
    }

    fn list(&self, path: &str) -> Result<Vec<OsString>> {
        let at = |e: io::Error| Error::io(format!("cannot list {path} in the tree"), e);
        let place = self.find(path, true).map_err(at)?;
        let directory = self.open(&place, OFlags::RDONLY | OFlags::DIRECTORY).map_err(at)?;
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&directory).map_err(|e| at(e.into()))? {
            let name = entry.map_err(|e| at(e.into()))?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        names.sort();
        Ok(names)
    }

    fn write(&mut self, path: &str, data: &mut dyn Read, meta: &Meta) -> Result<()> {
        let shown = Path::new(path);
        let place = match self.find_any(path, true)? {
            Some(place) if place.stat.is_some() => place,
            // Nothing there, or a link to nothing: that is replaced rather than its target made.
            _ => {
                let place = self.place_to_make(path)?;
                if place.stat.is_some() {
                    sys::unlink_at(place.directory.as_fd(), &place.name, false)
                        .at("replace in the tree", shown)?;
                }
                Place { stat: None, ..place }
            }
        };
        if place.stat.is_some_and(|stat| !stat.is_file()) {
            return Err(Error::tailor(path, "is no file in the tree"));
        }
        let make = if place.stat.is_some() { OFlags::TRUNC } else { OFlags::CREATE | OFlags::EXCL };
        let mut file = self.open(&place, OFlags::WRONLY | make).at("write in the tree", shown)?;
        io::copy(data, &mut file).at("write in the tree", shown)?;
        drop(file);
        self.attributes(&place, meta).at("set the attributes in the tree of", shown)
    }

    fn make_directory(&mut self, path: &str, meta: &Meta) -> Result<()> {
        let place = self.place_to_make(path)?;
        sys::mkdir_at(place.directory.as_fd(), &place.name).at("make in the tree", Path::new(path))?;
        self.attributes(&place, meta).at("set the attributes in the tree of", Path::new(path))
    }

    fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        let place = self.place_to_make(path)?;
        let at = "make in the tree";
        if let Some(stat) = place.stat {
            if stat.is_dir() {
                return Err(Error::tailor(path, "is a directory in the tree"));
            }
            sys::unlink_at(place.directory.as_fd(), &place.name, false).at(at, Path::new(path))?;
        }
        rustix::fs::symlinkat(target, &place.directory, &place.name).at(at, Path::new(path))?;
        sys::chown_at(place.directory.as_fd(), &place.name, 0, 0).at(at, Path::new(path))
    }

    fn remove(&mut self, path: &str) -> Result<()> {
        let place = self.place_to_make(path)?;
        let directory = place.stat.is_some_and(|stat| stat.is_dir());
        sys::unlink_at(place.directory.as_fd(), &place.name, directory)
            .at("remove in the tree", Path::new(path))
    }
}

impl TreeRoot {
    fn attributes(&self, place: &Place, meta: &Meta) -> io::Result<()> {
        let (directory, name) = (place.directory.as_fd(), place.name.as_os_str());
        sys::chown_at(directory, name, meta.uid, meta.gid)?;
        sys::chmod_at(directory, name, meta.mode)?;
        set_time(directory, name, meta.mtime)
    }
}
