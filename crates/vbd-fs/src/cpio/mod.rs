//! Cpio archives as a source: the formats "newc" (SVR4 without and with sums) and "odc" (POSIX.1-1988), read once from
//! front to end. Archives may follow each other, compressed or not, as the kernel takes its first filesystem
//! (Documentation/driver-api/early-userspace/buffer-format.rst in its sources).
//!
//! Nothing is guessed and nothing is skipped, and paths are as in a tar: none is absolute, none leads out by `..`, and
//! of entries of one name the last wins.

mod header;
mod links;

use std::ffi::OsString;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::archive::{about, damaged};
use crate::compress::{self, Streams};
use crate::entry::{Content, Counts, Entry, Meta, Node, Sink, Special, Time};
use crate::fill::Discard;
use crate::plan::{Gather, Limit, Plan};
use crate::tar::{TRUNCATED, clean_path};
use crate::{Error, Progress, Silent};

use header::{Format, Header};
use links::{Links, Names};

/// The name that ends an archive.
const TRAILER: &[u8] = b"TRAILER!!!";
/// The longest path or link the kernel takes, with the NUL at its end.
const PATH_MAX: u64 = 4096;

/// Whether it starts as an archive does, those of the old binary format included, which are then refused by name.
pub(crate) fn is_cpio(start: &[u8]) -> bool {
    Format::of(start).is_some() || header::is_binary(start)
}

/// Sends the entries of all archives that follow each other to `sink`.
///
/// # Errors
///
/// The first entry that is damaged, hostile (absolute, `..`) or of an unknown type, by its name.
pub(crate) fn unpack(
    streams: &mut Streams<'_>,
    archive: &str,
    sink: &mut dyn Sink,
    progress: &mut dyn Progress,
) -> crate::Result<()> {
    let bad = |reason: String| damaged(archive, Path::new(""), reason);
    while streams.next_archive().map_err(|e| bad(format!("cannot be read: {e}")))? {
        let start = streams.peek(header::MAGIC).map_err(|e| bad(format!("cannot be read: {e}")))?;
        if header::is_binary(start) {
            return Err(bad("is a cpio in the old binary format: pack it as newc (cpio -H newc)".to_owned()));
        }
        let Some(format) = Format::of(start) else {
            return Err(bad("goes on after its end with something that is no cpio".to_owned()));
        };
        Unpack { input: Input::new(streams), archive, format, links: Links::default() }
            .run(sink, progress)?;
    }
    Ok(())
}

/// Reads archives to their end and counts what is in them, writing nothing. For checking them, and for fuzzing: it must
/// end without a panic whatever it reads.
///
/// # Errors
///
/// As for a build from them.
pub fn check(reader: impl Read + Send) -> crate::Result<Counts> {
    let root = Meta { mode: 0o755, ..Meta::default() };
    let mut contents = Discard;
    let limit = Limit { inodes: u32::MAX.into(), bytes: u64::MAX };
    let mut gather = Gather::new(Plan::new(root, None), &mut contents, None, limit, Time::default());
    let mut streams = compress::open(reader, "archive")?;
    unpack(&mut streams, "archive", &mut gather, &mut Silent)?;
    Ok(gather.plan.counts())
}

/// The stream below an archive, and what of an entry's data is left.
struct Input<'a, 'b> {
    streams: &'a mut Streams<'b>,
    left: u64,
    /// All bytes of the data that were read, added up.
    sum: u32,
    failure: Option<String>,
}

impl<'a, 'b> Input<'a, 'b> {
    fn new(streams: &'a mut Streams<'b>) -> Input<'a, 'b> {
        Input { streams, left: 0, sum: 0, failure: None }
    }

    fn exact(&mut self, buffer: &mut [u8]) -> Result<(), String> {
        self.streams.read_exact(buffer).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => TRUNCATED.to_owned(),
            _ => format!("cannot be read: {e}"),
        })
    }

    /// Reads what fills the last `length` bytes up to a multiple of four, in the formats that do.
    fn pad(&mut self, format: Format, length: u64) -> Result<(), String> {
        let padding = usize::try_from(length.next_multiple_of(4) - length).unwrap_or(0);
        if format.is_padded() { self.exact(&mut [0; 4][..padding]) } else { Ok(()) }
    }

    /// Reads of an entry's data; 0 at its end alone.
    fn data(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left).unwrap_or(buffer.len()).min(buffer.len());
        if room == 0 {
            return Ok(0);
        }
        let read = match self.streams.read(&mut buffer[..room]) {
            Ok(0) => Err(TRUNCATED.to_owned()),
            Ok(read) => Ok(read),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Err(e),
            Err(e) => Err(format!("cannot be read: {e}")),
        };
        let read = read.map_err(|reason| {
            self.failure = Some(reason.clone());
            io::Error::other(reason)
        })?;
        self.left -= read as u64;
        self.sum = buffer[..read].iter().fold(self.sum, |sum, &byte| sum.wrapping_add(byte.into()));
        Ok(read)
    }

    /// Reads what is left of the data.
    fn drain(&mut self) -> Result<(), String> {
        let mut buffer = [0; 16384];
        loop {
            match self.data(&mut buffer) {
                Ok(0) => return Ok(()),
                Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e.to_string()),
                _ => {}
            }
        }
    }
}

/// The data of an entry: one extent.
struct Data<'a, 'b, 'c> {
    input: &'a mut Input<'b, 'c>,
    begun: bool,
}

impl Content for Data<'_, '_, '_> {
    fn next_extent(&mut self) -> io::Result<Option<Range<u64>>> {
        let first = !std::mem::replace(&mut self.begun, true);
        Ok((first && self.input.left > 0).then_some(0..self.input.left))
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.input.data(buffer)
    }
}

struct Unpack<'a, 'b> {
    input: Input<'a, 'b>,
    archive: &'a str,
    format: Format,
    links: Links,
}

impl Unpack<'_, '_> {
    fn run(&mut self, sink: &mut dyn Sink, progress: &mut dyn Progress) -> crate::Result<()> {
        loop {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            let (header, name) =
                self.header().map_err(|reason| damaged(self.archive, Path::new(""), reason))?;
            let shown = PathBuf::from(OsString::from_vec(name.clone()));
            if name == TRAILER {
                return Ok(());
            }
            let bad = |reason: String| damaged(self.archive, &shown, reason);
            let path = clean_path(&name).map_err(bad)?;
            self.entry(&header, &path, sink, progress).map_err(|e| match e {
                Failure::Entry(reason) => damaged(self.archive, &shown, reason),
                Failure::Sink(error) => about(error, self.archive, &path),
            })?;
        }
    }

    /// The next header, and the name after it without the NULs at its end.
    fn header(&mut self) -> Result<(Header, Vec<u8>), String> {
        let mut bytes = [0; header::LONGEST];
        let bytes = &mut bytes[..self.format.length()];
        self.input.exact(bytes)?;
        let header = Header::parse(self.format, bytes)?;
        if header.name_size == 0 || header.name_size > PATH_MAX {
            return Err(format!("is damaged: it has a name of {} bytes", header.name_size));
        }
        let mut name = vec![0; usize::try_from(header.name_size).unwrap_or(0)];
        self.input.exact(&mut name)?;
        self.input.pad(self.format, self.format.length() as u64 + header.name_size)?;
        // Some archivers align the data by a longer name.
        let end = name.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        if end == name.len() {
            return Err("is damaged: it has a name without an end".to_owned());
        }
        name.truncate(end);
        Ok((header, name))
    }

    fn entry(
        &mut self,
        header: &Header,
        path: &Path,
        sink: &mut dyn Sink,
        progress: &mut dyn Progress,
    ) -> Result<(), Failure> {
        self.input.left = header.size;
        self.input.sum = 0;
        let is_file = header.mode & 0o170_000 == 0o100_000;
        let meta = header.meta();
        if path.as_os_str().is_empty() && header.mode & 0o170_000 != 0o040_000 {
            return Err(Failure::Entry("is the root, but no directory".to_owned()));
        }
        // It is no name of another file any more.
        self.links.forget(path);
        let mut target = Vec::new();
        match header.mode & 0o170_000 {
            0o100_000 => {}
            0o120_000 => {
                if header.size == 0 || header.size >= PATH_MAX {
                    return Err(Failure::Entry("is a link with no target, or one too long".to_owned()));
                }
                target.resize(usize::try_from(header.size).unwrap_or(0), 0);
                self.input.streams.read_exact(&mut target).map_err(|_| TRUNCATED.to_owned())?;
                self.input.left = 0;
                self.input.sum = target.iter().fold(0, |sum: u32, &byte| sum.wrapping_add(byte.into()));
                if target.last() == Some(&0) {
                    target.pop();
                }
                if target.is_empty() || target.contains(&0) {
                    return Err(Failure::Entry("is a link to a path with a NUL".to_owned()));
                }
            }
            _ if header.size > 0 => {
                let reason = format!("has {} bytes of data, which its type cannot have", header.size);
                return Err(Failure::Entry(reason));
            }
            _ => {}
        }
        let target = PathBuf::from(OsString::from_vec(target));
        let device = |kind| Node::Device { kind, major: header.device.0, minor: header.device.1 };
        let names = self.links.of(header, meta)?;
        let mut earlier = Vec::new();
        let mut data;
        let node = match header.mode & 0o170_000 {
            _ if let Names::Before { first, .. } = &names => Node::HardLink(first.clone()),
            0o100_000 => {
                // The data comes with one of the names, most often with the last: those before it become links to it.
                if let Names::Waiting(paths) = names {
                    earlier = paths;
                }
                data = Data { input: &mut self.input, begun: false };
                Node::File { size: header.size, content: &mut data }
            }
            0o040_000 => Node::Directory,
            0o120_000 => Node::Symlink(&target),
            0o020_000 => device(Special::Character),
            0o060_000 => device(Special::Block),
            0o010_000 => Node::Device { kind: Special::Fifo, major: 0, minor: 0 },
            0o140_000 => Node::Device { kind: Special::Socket, major: 0, minor: 0 },
            other => return Err(Failure::Entry(format!("has the unknown type {other:o}"))),
        };
        let added = sink.add(Entry { path, meta, xattrs: &[], node }, progress);
        if let Some(reason) = self.input.failure.take() {
            return Err(Failure::Entry(reason));
        }
        added?;
        for name in &earlier {
            let node = Node::HardLink(path.to_owned());
            sink.add(Entry { path: name, meta, xattrs: &[], node }, progress)?;
        }
        self.links.note(header, meta, path)?;
        self.input.drain()?;
        self.input.pad(self.format, header.size)?;
        if let Some(wanted) = header.sum.filter(|&wanted| is_file && wanted != self.input.sum) {
            let found = self.input.sum;
            return Err(Failure::Entry(format!(
                "is damaged: the sum of its bytes is {found} and must be {wanted}"
            )));
        }
        Ok(())
    }
}

/// Why an entry cannot be taken.
enum Failure {
    /// For what it says.
    Entry(String),
    /// The sink says.
    Sink(Error),
}

impl From<String> for Failure {
    fn from(reason: String) -> Failure {
        Failure::Entry(reason)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Sink(error)
    }
}
