//! A filesystem in an image as a root to tailor, through an editor: nothing of it is there before the editor's commit.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;

use vbd_ext4::edit::{self, EditError, Editor, New};
use vbd_ext4::read::{self, FileType, Inode, Links};

use super::{Attributes, Kind, Root};
use crate::{Error, Meta, Result, Time};

/// The largest file that is read whole: those that are edited are text.
const TEXT: u64 = 16 << 20;

/// The filesystem that an editor changes.
pub struct ImageRoot<'a> {
    editor: &'a mut Editor,
    now: edit::Timestamp,
}

fn failed(path: &str, error: impl std::fmt::Display) -> Error {
    Error::tailor(path, format!("cannot be changed: {error}"))
}

impl<'a> ImageRoot<'a> {
    /// What is changed is as of `now`.
    pub fn new(editor: &'a mut Editor, now: Time) -> ImageRoot<'a> {
        ImageRoot { editor, now: timestamp(now) }
    }

    fn find(&self, path: &str, links: Links) -> Result<Option<Inode>> {
        match self.editor.filesystem().lookup(path.as_bytes(), links) {
            Ok(inode) => Ok(Some(inode)),
            Err(read::Error::NotFound(_) | read::Error::NotDirectory(_)) => Ok(None),
            Err(error) => Err(failed(path, error)),
        }
    }

    fn look_with(&self, path: &str, links: Links) -> Result<Option<Attributes>> {
        Ok(self.find(path, links)?.map(|inode| {
            let kind = match inode.file_type() {
                FileType::Regular => Kind::File,
                FileType::Directory => Kind::Directory,
                FileType::Symlink => Kind::Link,
                _ => Kind::Special,
            };
            let attributes = inode.attributes();
            let mtime = Time { seconds: attributes.mtime.seconds, nanoseconds: attributes.mtime.nanoseconds };
            let meta = Meta { mode: attributes.mode.into(), uid: attributes.uid, gid: attributes.gid, mtime };
            Attributes { kind, meta }
        }))
    }

    /// Attributes of something new.
    fn attributes(&self, path: &str, meta: &Meta) -> Result<edit::Attributes> {
        let mode = u16::try_from(meta.mode).map_err(|_| failed(path, "its mode has too many bits"))?;
        let (now, mtime) = (self.now, timestamp(meta.mtime));
        Ok(edit::Attributes {
            mode,
            uid: meta.uid,
            gid: meta.gid,
            atime: now,
            ctime: now,
            mtime,
            crtime: now,
        })
    }

    fn make(&mut self, path: &str, new: New<'_>, meta: &Meta) -> Result<edit::Ino> {
        let attributes = self.attributes(path, meta)?;
        let mut make = || {
            let place = self.editor.locate(path.as_bytes())?;
            if let Some(found) = place.found {
                if self.editor.filesystem().inode(found)?.file_type() == FileType::Directory {
                    return Err(EditError::Exists(path.to_owned()));
                }
                self.editor.remove(place.directory, &place.name)?;
            }
            self.editor.create(place.directory, &place.name, new, &attributes, &[])
        };
        make().map_err(|error| failed(path, error))
    }
}

fn timestamp(time: Time) -> edit::Timestamp {
    edit::Timestamp { seconds: time.seconds, nanoseconds: time.nanoseconds }
}

impl Root for ImageRoot<'_> {
    fn look(&self, path: &str) -> Result<Option<Attributes>> {
        self.look_with(path, Links::Follow)
    }

    fn look_at_link(&self, path: &str) -> Result<Option<Attributes>> {
        self.look_with(path, Links::Keep)
    }

    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let Some(inode) = self.find(path, Links::Follow)? else { return Ok(None) };
        if inode.file_type() != FileType::Regular || inode.size() > TEXT {
            return Err(Error::tailor(path, "is no file of text in the tree"));
        }
        self.editor.filesystem().read_all(&inode, TEXT).map(Some).map_err(|error| failed(path, error))
    }

    fn list(&self, path: &str) -> Result<Vec<OsString>> {
        let Some(inode) = self.find(path, Links::Follow)? else {
            return Err(Error::tailor(path, "is not there"));
        };
        let mut names = Vec::new();
        for entry in self.editor.filesystem().entries(&inode).map_err(|error| failed(path, error))? {
            let name = entry.map_err(|error| failed(path, error))?.name;
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        names.sort();
        Ok(names)
    }

    fn write(&mut self, path: &str, data: &mut dyn Read, meta: &Meta) -> Result<()> {
        let found = self.find(path, Links::Follow)?;
        let ino = match &found {
            Some(inode) if inode.file_type() != FileType::Regular => {
                return Err(Error::tailor(path, "is no file in the tree"));
            }
            Some(inode) => inode.number(),
            None => self.make(path, New::File, meta)?,
        };
        self.editor.set_content(ino, data).map_err(|error| failed(path, error))?;
        let mut attributes = self.attributes(path, meta)?;
        if let Some(inode) = found {
            let before = inode.attributes();
            (attributes.atime, attributes.crtime) = (before.atime, before.crtime);
        }
        self.editor.set_attributes(ino, &attributes).map_err(|error| failed(path, error))
    }

    fn make_directory(&mut self, path: &str, meta: &Meta) -> Result<()> {
        let attributes = self.attributes(path, meta)?;
        let place = self.editor.locate(path.as_bytes()).map_err(|error| failed(path, error))?;
        self.editor
            .create(place.directory, &place.name, New::Directory, &attributes, &[])
            .map(drop)
            .map_err(|error| failed(path, error))
    }

    fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        let meta = Meta {
            mtime: Time { seconds: self.now.seconds, nanoseconds: self.now.nanoseconds },
            ..Meta::root(0o777)
        };
        self.make(path, New::Symlink(target.as_bytes()), &meta).map(drop)
    }

    fn remove(&mut self, path: &str) -> Result<()> {
        let place = self.editor.locate(path.as_bytes()).map_err(|error| failed(path, error))?;
        self.editor.remove(place.directory, &place.name).map_err(|error| failed(path, error))
    }
}
