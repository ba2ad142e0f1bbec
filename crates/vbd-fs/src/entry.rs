//! What travels from a source to a sink: one entry of a tree.

use std::ffi::OsString;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Progress, Result};

/// A point in time, as an inode has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Time {
    /// Seconds since 1970, negative before.
    pub seconds: i64,
    /// Nanoseconds on top of the seconds, below a thousand million.
    pub nanoseconds: u32,
}

impl Time {
    /// The time now.
    pub fn now() -> Time {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Time {
            seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            nanoseconds: since.subsec_nanos(),
        }
    }
}

/// Who may do what with an entry, and since when it is as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Meta {
    /// Permission bits, 0 to 0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of the content.
    pub mtime: Time,
}

impl Meta {
    /// Owned by root, changed now.
    pub fn root(mode: u32) -> Meta {
        Meta { mode, uid: 0, gid: 0, mtime: Time::now() }
    }
}

/// An extended attribute: its name with the prefix (`security.capability`), and the value as the kernel has it.
pub(crate) type Xattr = (OsString, Vec<u8>);

/// One entry on its way.
pub(crate) struct Entry<'a> {
    /// Relative to the root, without `.` and `..`; empty for the root itself.
    pub(crate) path: &'a Path,
    pub(crate) meta: Meta,
    pub(crate) xattrs: &'a [Xattr],
    pub(crate) node: Node<'a>,
}

pub(crate) enum Node<'a> {
    Directory,
    File {
        size: u64,
        content: &'a mut dyn Content,
    },
    Symlink(&'a Path),
    /// Another name of the entry at this path, which came before.
    HardLink(PathBuf),
    Device {
        kind: Special,
        major: u32,
        minor: u32,
    },
}

/// What is neither file, directory nor link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Special {
    Character,
    Block,
    Fifo,
    Socket,
}

/// A file's data, extent by extent in rising order; what is between them is a hole.
pub(crate) trait Content {
    /// Goes to the next extent, past what is left of this one.
    fn next_extent(&mut self) -> io::Result<Option<Range<u64>>>;
    /// Reads on in the extent; 0 at its end.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Reads on until the buffer is full or the extent ends; how much that was.
    fn read_full(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(filled)
    }
    /// The file that holds exactly this content, where there is one.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Where entries go. An entry that comes twice replaces the first; a directory's own entry may come after its content.
pub(crate) trait Sink {
    fn add(&mut self, entry: Entry<'_>, progress: &mut dyn Progress) -> Result<()>;
}

/// How many entries of each kind there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Regular files, each counted once whatever its names.
    pub files: u64,
    /// Directories, the root included.
    pub directories: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Further names of files.
    pub hard_links: u64,
    /// Devices, FIFOs and sockets.
    pub special: u64,
    /// Bytes of content, without holes.
    pub bytes: u64,
}
