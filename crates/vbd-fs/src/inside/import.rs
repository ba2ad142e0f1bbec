//! A tree of the host, copied into an image through an editor: nothing of it is there before the editor's commit.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use vbd_ext4::edit::{Attributes, EditError, Editor, Ino, New, Timestamp};
use vbd_ext4::read::{FileType, Xattr};

use crate::error::Context;
use crate::sys::{self, View};
use crate::{Cancel, Error, Result};

/// How a tree is copied.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The owner and group that everything gets, instead of its own.
    pub owner: Option<(u32, u32)>,
    /// What the copy stops for.
    pub cancel: Cancel,
}

/// What was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Report {
    /// Entries, further names of files included.
    pub entries: u64,
    /// Bytes of content, holes included.
    pub bytes: u64,
}

/// A copy on its way.
struct Import<'a> {
    editor: &'a mut Editor,
    options: &'a Options,
    now: Timestamp,
    /// The first name of files with several: device and inode of the host.
    links: HashMap<(u64, u64), Ino>,
    report: Report,
}

/// Copies a file, or a directory with all in it, to a name in a directory of the image; `now` is when its inodes change.
/// A directory that is there already is filled and keeps its own attributes, a file that is there gets the new content and
/// attributes; whatever else is in the way is replaced, but for directories.
///
/// # Errors
///
/// What cannot be read, what the image cannot hold, a directory in the way; the editor is of no use then.
pub fn import(
    editor: &mut Editor,
    from: &Path,
    directory: Ino,
    name: &[u8],
    now: Timestamp,
    options: &Options,
) -> Result<Report> {
    let mut import = Import { editor, options, now, links: HashMap::new(), report: Report::default() };
    import.entry(from, directory, name)?;
    Ok(import.report)
}

/// Copies what is in a directory into one of the image that is there.
///
/// # Errors
///
/// Those of [`import`].
pub fn import_into(
    editor: &mut Editor,
    from: &Path,
    directory: Ino,
    now: Timestamp,
    options: &Options,
) -> Result<Report> {
    let mut import = Import { editor, options, now, links: HashMap::new(), report: Report::default() };
    import.children(from, directory)?;
    Ok(import.report)
}

impl Import<'_> {
    fn entry(&mut self, from: &Path, directory: Ino, name: &[u8]) -> Result<()> {
        if self.options.cancel.requested() {
            return Err(Error::Interrupted);
        }
        let failed = |error: EditError| Error::Inside(format!("{}: {error}", from.display()));
        let metadata = from.symlink_metadata().at("look at", from)?;
        let kind = metadata.file_type();
        let key = (metadata.dev(), metadata.ino());
        let found = self.editor.entry(directory, name).map_err(failed)?;
        self.report.entries += 1;
        if let Some(first) = self.links.get(&key).copied() {
            if found.as_ref().is_some_and(|found| found.number() == first) {
                return Ok(());
            }
            self.make_way(found.as_ref().map(|found| found.file_type()), directory, name).map_err(failed)?;
            return self.editor.link(directory, name, first).map_err(failed);
        }
        let attributes = self.attributes(&metadata);
        let xattrs = xattrs(from)?;
        let target;
        let new = match () {
            () if kind.is_dir() => New::Directory,
            () if kind.is_file() => New::File,
            () if kind.is_symlink() => {
                target = std::fs::read_link(from).at("read the link", from)?.into_os_string().into_vec();
                New::Symlink(&target)
            }
            () if kind.is_char_device() || kind.is_block_device() => {
                let device = metadata.rdev();
                let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
                if kind.is_block_device() {
                    New::Block { major, minor }
                } else {
                    New::Character { major, minor }
                }
            }
            () if kind.is_fifo() => New::Fifo,
            () => New::Socket,
        };
        let ino = match found.map(|found| (found.file_type(), found.number())) {
            // What is of the same kind stays the same inode.
            Some((FileType::Directory, ino)) if new == New::Directory => ino,
            Some((FileType::Regular, ino)) if new == New::File => {
                self.editor.set_xattrs(ino, &xattrs).map_err(failed)?;
                ino
            }
            other => {
                self.make_way(other.map(|(kind, _)| kind), directory, name).map_err(failed)?;
                self.editor.create(directory, name, new, &attributes, &xattrs).map_err(failed)?
            }
        };
        if metadata.nlink() > 1 && new != New::Directory {
            self.links.insert(key, ino);
        }
        match new {
            New::File => {
                let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
                let mut file = File::options().read(true).custom_flags(flags).open(from).at("open", from)?;
                self.editor.set_content(ino, &mut file).map_err(failed)?;
                self.report.bytes += metadata.len();
                self.editor.set_attributes(ino, &attributes).map_err(failed)
            }
            New::Directory => {
                let before = self.editor.filesystem().inode(ino).map_err(|error| failed(error.into()))?;
                self.children(from, ino)?;
                // Its time is the source's again, if it is new.
                let kept = before.attributes();
                if kept == attributes {
                    self.editor.set_attributes(ino, &attributes).map_err(failed)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn children(&mut self, from: &Path, directory: Ino) -> Result<()> {
        let mut names = std::fs::read_dir(from)
            .and_then(|entries| {
                entries.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<Vec<_>>>()
            })
            .at("list", from)?;
        // The same order, the same image.
        names.sort();
        for name in names {
            self.entry(&from.join(&name), directory, name.as_bytes())?;
        }
        Ok(())
    }

    /// Removes what is in the way, unless it is a directory.
    fn make_way(
        &mut self,
        found: Option<FileType>,
        directory: Ino,
        name: &[u8],
    ) -> std::result::Result<(), EditError> {
        match found {
            None => Ok(()),
            Some(FileType::Directory) => Err(EditError::Exists(String::from_utf8_lossy(name).into_owned())),
            Some(_) => self.editor.remove(directory, name),
        }
    }

    fn attributes(&self, metadata: &std::fs::Metadata) -> Attributes {
        let time = |seconds: i64, nanoseconds: i64| Timestamp {
            seconds: seconds.clamp(Timestamp::MIN.seconds, Timestamp::MAX.seconds),
            nanoseconds: u32::try_from(nanoseconds).unwrap_or(0),
        };
        let (uid, gid) = self.options.owner.unwrap_or((metadata.uid(), metadata.gid()));
        Attributes {
            mode: u16::try_from(metadata.mode() & 0o7777).unwrap_or(0),
            uid,
            gid,
            atime: time(metadata.atime(), metadata.atime_nsec()),
            ctime: self.now,
            mtime: time(metadata.mtime(), metadata.mtime_nsec()),
            crtime: self.now,
        }
    }
}

/// The attributes of an entry of the host that a filesystem keeps.
fn xattrs(path: &Path) -> Result<Vec<Xattr>> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // A path that ends in `..` has no name; the directory itself has one that is empty.
    let (directory, name) = match path.file_name() {
        Some(name) => (parent, name),
        None => (path, "".as_ref()),
    };
    let directory = File::open(directory).at("open", directory)?;
    let all = sys::xattrs(directory.as_fd(), name, View::Kernel).at("read the attributes of", path)?;
    let kept = |name: &[u8]| !name.starts_with(b"system.") || name.starts_with(b"system.posix_acl_");
    Ok(all.into_iter().map(|(name, value)| (name.into_vec(), value)).filter(|(name, _)| kept(name)).collect())
}
