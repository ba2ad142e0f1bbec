//! What is in a file that is no directory: a tar, a cpio or a squashfs, told apart by its first bytes.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;

use crate::entry::Sink;
use crate::error::Context;
use crate::tar::NamedAcl;
use crate::watched::Watched;
use crate::{Cancel, Error, Progress, Result, ahead, compress, cpio, squashfs, tar};

/// An archive as it is opened.
pub(crate) struct Archive<'a> {
    /// Its name, for messages.
    pub(crate) name: &'a str,
    /// A file, which may be a pipe.
    pub(crate) file: File,
    /// Where a file without a name is made, if the archive must be one and is none.
    pub(crate) scratch: &'a Path,
}

impl Archive<'_> {
    /// Sends the entries to `sink`, but for the ACLs that are returned. Reads to the end.
    ///
    /// # Errors
    ///
    /// An archive of no known kind; the first entry that is damaged, hostile or of an unknown type, by its name.
    pub(crate) fn unpack(self, sink: &mut dyn Sink, progress: &mut dyn Progress) -> Result<Vec<NamedAcl>> {
        let Archive { name, file, scratch } = self;
        let cannot = |e: io::Error| Error::io(format!("cannot read {name}"), e);
        let (place, stop) = (place(&file), Cancel::new());
        let again = file.try_clone().map_err(cannot)?;
        let mut streams = compress::open(Watched { file, cancel: [progress.cancel(), stop.clone()] }, name)?;
        let start = streams.peek(6);
        let start = start.map_err(|e| damaged(name, Path::new(""), format!("cannot be read: {e}")))?;
        if cpio::is_cpio(start) {
            return cpio::unpack(&mut streams, name, sink, progress).map(|()| Vec::new());
        }
        if squashfs::is_squashfs(start) {
            // It is read here and there: from a pipe, and where it is compressed as a whole, it is put in a file first.
            let place = place.filter(|_| !streams.is_packed());
            let (file, (start, length)) = match place {
                Some(place) => (again, place),
                None => spool(&mut streams, name, scratch)?,
            };
            let bytes = squashfs::Part { file, start, length };
            return squashfs::unpack(&bytes, name, sink, progress).map(|()| Vec::new());
        }
        let unpack = |stream: &mut dyn Read| tar::unpack(stream, name, sink, progress);
        ahead::reading(&mut streams, &stop, unpack)
    }
}

/// Where a file that can be read here and there is read next, and how many bytes it has from there on.
fn place(file: &File) -> Option<(u64, u64)> {
    let mut file = file;
    let start = file.stream_position().ok()?;
    let end = file.seek(io::SeekFrom::End(0)).ok()?;
    file.seek(io::SeekFrom::Start(start)).ok()?;
    Some((start, end.saturating_sub(start)))
}

fn spool(reader: &mut impl Read, name: &str, scratch: &Path) -> Result<(File, (u64, u64))> {
    let mut file = tempfile::tempfile_in(scratch).at("make a file in", scratch)?;
    let length = io::copy(reader, &mut file).map_err(|e| Error::io(format!("cannot keep {name}"), e))?;
    Ok((file, (0, length)))
}

/// An error of a sink as one about the entry that it was given, where it is about what the entry says.
pub(crate) fn about(error: Error, archive: &str, entry: &Path) -> Error {
    match error {
        Error::Source { reason, .. } => damaged(archive, entry, reason),
        Error::Io { error, .. } if is_about_the_entry(&error) => {
            damaged(archive, entry, format!("cannot be made: {error}"))
        }
        other => other,
    }
}

/// Whether a call failed for what the entry says, rather than for the machine's state.
fn is_about_the_entry(error: &io::Error) -> bool {
    let its_own = [
        libc::ENOENT,
        libc::ENOTDIR,
        libc::EISDIR,
        libc::ENOTEMPTY,
        libc::EEXIST,
        libc::ENAMETOOLONG,
        libc::EINVAL,
        libc::EFBIG,
        libc::EMLINK,
    ];
    error.raw_os_error().is_some_and(|e| its_own.contains(&e))
}

/// An error about an entry of an archive, or with an empty path about the archive.
pub(crate) fn damaged(archive: &str, entry: &Path, reason: impl Into<String>) -> Error {
    Error::Archive { archive: archive.to_owned(), entry: entry.display().to_string(), reason: reason.into() }
}
