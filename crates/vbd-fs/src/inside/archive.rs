//! A tree of an image as a tar archive: POSIX.1-2001 pax, with extended attributes (`SCHILY.xattr.`), ACLs
//! (`SCHILY.acl.`) and sparse files (GNU's format 1.0) as star and GNU tar have them.
//!
//! The same image gives the same bytes: entries come in the order of their names, and nothing of the host is in them.

use std::collections::HashMap;
use std::io::{self, Write};
use std::ops::Range;

use vbd_ext4::read::{self, FileType, Filesystem, Inode, Xattr};

use super::posix_acl;
use super::walk::{Found, Step, Walk};
use crate::Cancel;
use crate::{Error, Result};

const BLOCK: usize = 512;
/// GNU tar reads and pads by this much.
const RECORD: u64 = 20 * BLOCK as u64;
/// Bytes that are read at once.
const PIECE: usize = 1 << 20;

/// Pieces of a sparse file that a map is kept of. With more it is written with its holes as zeros.
const MOST_PIECES: usize = 1 << 18;

/// What is in an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Report {
    /// Entries, further names of files included.
    pub entries: u64,
    /// Bytes of the archive.
    pub bytes: u64,
    /// Sockets, which no archive can hold; each was told by its name.
    pub sockets: u64,
}

/// Writes a file, or a directory with all in it, as an archive. The directory itself is the entry `./`, a file has
/// `name`. `told` hears of sockets, which are left out.
///
/// # Errors
///
/// The first entry that cannot be read, what goes wrong in writing, a wish to stop.
pub fn archive(
    filesystem: &Filesystem,
    from: Inode,
    name: &[u8],
    out: &mut dyn Write,
    cancel: &Cancel,
    told: &mut dyn FnMut(&str),
) -> Result<Report> {
    let mut archive = Archive {
        filesystem,
        out,
        cancel,
        links: HashMap::new(),
        report: Report::default(),
        buffer: vec![0; PIECE],
    };
    for step in Walk::new(filesystem, from) {
        if cancel.requested() {
            return Err(Error::Stopped);
        }
        match step {
            Ok(Step::Enter(found)) => {
                let path = if found.depth == 0 { name.to_vec() } else { found.path.clone() };
                let shown = String::from_utf8_lossy(&found.path).replace(char::is_control, "?");
                if found.inode.file_type() == FileType::Socket {
                    archive.report.sockets += 1;
                    told(&format!("/{shown}: a socket, which no archive can hold; left out"));
                    continue;
                }
                archive.entry(path, &found).map_err(|error| error.of(&shown))?;
            }
            Ok(Step::Leave) => {}
            Err(trouble) => return Err(Error::Inside(trouble.to_string())),
        }
    }
    archive.end()?;
    Ok(archive.report)
}

/// One entry's fate.
type Attempt<T> = std::result::Result<T, Failure>;

/// What went wrong: with the image, or with where the archive goes.
enum Failure {
    Read(read::Error),
    Write(io::Error),
    Stop,
}

impl Failure {
    fn of(self, path: &str) -> Error {
        match self {
            Failure::Read(error) => Error::Inside(format!("/{path}: {error}")),
            Failure::Write(error) => Error::io("writing the archive", error),
            Failure::Stop => Error::Stopped,
        }
    }
}

impl From<read::Error> for Failure {
    fn from(error: read::Error) -> Self {
        Failure::Read(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Write(error)
    }
}

struct Archive<'a> {
    filesystem: &'a Filesystem,
    out: &'a mut dyn Write,
    cancel: &'a Cancel,
    /// The first name of each file that has several.
    links: HashMap<u32, Vec<u8>>,
    report: Report,
    buffer: Vec<u8>,
}

/// A header before it is written: what fits into the old fields goes there, the rest into records before it.
struct Header {
    name: Vec<u8>,
    link: Vec<u8>,
    kind: u8,
    size: u64,
    device: (u32, u32),
    records: Vec<u8>,
}

impl Archive<'_> {
    fn entry(&mut self, mut path: Vec<u8>, found: &Found) -> Attempt<()> {
        let inode = &found.inode;
        let directory = inode.file_type() == FileType::Directory;
        if directory {
            path = if found.depth == 0 { b"./".to_vec() } else { [&path[..], b"/"].concat() };
        }
        let mut header = Header {
            name: path,
            link: Vec::new(),
            kind: b'0',
            size: 0,
            device: inode.device().unwrap_or((0, 0)),
            records: Vec::new(),
        };
        if !directory && inode.links() > 1 {
            if let Some(first) = self.links.get(&inode.number()) {
                (header.kind, header.link) = (b'1', first.clone());
                return Ok(self.header(header, inode)?);
            }
            self.links.insert(inode.number(), header.name.clone());
        }
        attributes(&mut header.records, &self.filesystem.xattrs(inode)?);
        header.kind = match inode.file_type() {
            FileType::Regular => return self.file(header, inode),
            FileType::Symlink => {
                header.link = self.filesystem.read_link(inode)?;
                b'2'
            }
            FileType::Character => b'3',
            FileType::Block => b'4',
            FileType::Directory => b'5',
            FileType::Fifo | FileType::Socket => b'6',
        };
        Ok(self.header(header, inode)?)
    }

    fn file(&mut self, mut header: Header, inode: &Inode) -> Attempt<()> {
        let ranges = self.filesystem.data(inode, 0)?.take(MOST_PIECES + 1);
        let mut ranges = ranges.collect::<read::Result<Vec<Range<u64>>>>()?;
        if ranges.len() > MOST_PIECES {
            ranges.clear();
            ranges.push(0..inode.size());
        }
        let data: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        if data == inode.size() {
            header.size = data;
            self.header(header, inode)?;
        } else {
            let map = sparse_map(&ranges, inode.size());
            record(&mut header.records, b"GNU.sparse.major", b"1");
            record(&mut header.records, b"GNU.sparse.minor", b"0");
            record(&mut header.records, b"GNU.sparse.name", &header.name);
            record(&mut header.records, b"GNU.sparse.realsize", inode.size().to_string().as_bytes());
            // What a program that does not know the format makes must not look like the file.
            let cut = header.name.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
            header.name.splice(cut..cut, *b"GNUSparseFile.0/");
            header.size = data + map.len() as u64;
            self.header(header, inode)?;
            self.write(&map)?;
        }
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                if self.cancel.requested() {
                    return Err(Failure::Stop);
                }
                let length = usize::try_from(range.end - at).unwrap_or(PIECE).min(PIECE);
                let mut buffer = std::mem::take(&mut self.buffer);
                let read = self.filesystem.read_at(inode, at, &mut buffer[..length]);
                let written = read.map_err(Failure::from).and_then(|_| Ok(self.write(&buffer[..length])?));
                self.buffer = buffer;
                written?;
                at += length as u64;
            }
        }
        Ok(self.pad(data)?)
    }

    /// Writes a header, with one of records before it where it needs that.
    fn header(&mut self, mut header: Header, inode: &Inode) -> io::Result<()> {
        let attributes = inode.attributes();
        let mut records = Vec::new();
        let (prefix, name) = match split(&header.name) {
            Some((prefix, name)) => (prefix.to_vec(), name.to_vec()),
            None => {
                if !header.records.windows(15).any(|window| window == b"GNU.sparse.name") {
                    record(&mut records, b"path", &header.name);
                }
                (Vec::new(), header.name[..header.name.len().min(100)].to_vec())
            }
        };
        if header.link.len() > 100 || !header.link.is_ascii() {
            record(&mut records, b"linkpath", &header.link);
            header.link.truncate(100);
        }
        for (key, number) in [(&b"uid"[..], attributes.uid), (b"gid", attributes.gid)] {
            if number > 0o777_7777 {
                record(&mut records, key, number.to_string().as_bytes());
            }
        }
        if header.size > 0o777_7777_7777 {
            record(&mut records, b"size", header.size.to_string().as_bytes());
        }
        let mtime = attributes.mtime;
        let plain = u64::try_from(mtime.seconds).ok().filter(|seconds| *seconds <= 0o777_7777_7777);
        if mtime.nanoseconds != 0 || plain.is_none() {
            record(&mut records, b"mtime", decimal(mtime.seconds, mtime.nanoseconds).as_bytes());
        }
        records.append(&mut header.records);

        let small = |number: u64, limit: u64| if number <= limit { number } else { 0 };
        let mut block = [0; BLOCK];
        let mut put = |range: Range<usize>, bytes: &[u8]| block[range][..bytes.len()].copy_from_slice(bytes);
        put(0..100, &name);
        put(100..108, octal(attributes.mode.into(), 7).as_bytes());
        put(108..116, octal(small(attributes.uid.into(), 0o777_7777), 7).as_bytes());
        put(116..124, octal(small(attributes.gid.into(), 0o777_7777), 7).as_bytes());
        put(124..136, octal(small(header.size, 0o777_7777_7777), 11).as_bytes());
        put(136..148, octal(plain.unwrap_or(0), 11).as_bytes());
        put(156..157, &[header.kind]);
        put(157..257, &header.link);
        put(257..265, b"ustar\x0000");
        put(329..337, octal(header.device.0.into(), 7).as_bytes());
        put(337..345, octal(header.device.1.into(), 7).as_bytes());
        put(345..500, &prefix);
        seal(&mut block);

        if !records.is_empty() {
            self.records(&records)?;
        }
        self.write(&block)?;
        self.report.entries += 1;
        Ok(())
    }

    fn records(&mut self, records: &[u8]) -> io::Result<()> {
        let mut block = [0; BLOCK];
        let mut put = |range: Range<usize>, bytes: &[u8]| block[range][..bytes.len()].copy_from_slice(bytes);
        put(0..100, b"././@PaxHeader");
        for range in [100..108, 108..116, 116..124] {
            put(range, octal(0, 7).as_bytes());
        }
        put(124..136, octal(records.len() as u64, 11).as_bytes());
        put(136..148, octal(0, 11).as_bytes());
        put(156..157, b"x");
        put(257..265, b"ustar\x0000");
        seal(&mut block);
        self.write(&block)?;
        self.write(records)?;
        self.pad(records.len() as u64)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.report.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Zeros after that many bytes, up to a whole block.
    fn pad(&mut self, length: u64) -> io::Result<()> {
        let over = usize::try_from(length % BLOCK as u64).unwrap_or(0);
        if over == 0 { Ok(()) } else { self.write(&[0; BLOCK][over..]) }
    }

    fn end(&mut self) -> Result<()> {
        let end = (self.report.bytes + 2 * BLOCK as u64).next_multiple_of(RECORD);
        let mut zeros = || {
            while self.report.bytes < end {
                self.write(&[0; BLOCK])?;
            }
            self.out.flush()
        };
        zeros().map_err(|error| Error::io("writing the archive", error))
    }
}

/// A name in the two old fields, if it fits: the part before a slash into the second. Names beyond ASCII go into a record,
/// which says what they mean.
fn split(name: &[u8]) -> Option<(&[u8], &[u8])> {
    if !name.is_ascii() {
        return None;
    }
    if name.len() <= 100 {
        return Some((b"", name));
    }
    // The latest slash for which the first part fits; the one at the end of a directory's name cuts nothing off.
    let slash = name[..name.len() - 1].iter().take(156).rposition(|&byte| byte == b'/')?;
    let (prefix, name) = (&name[..slash], &name[slash + 1..]);
    (!prefix.is_empty() && name.len() <= 100).then_some((prefix, name))
}

/// A record ("pax Extended Header"): its own length, a key, a value.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

fn attributes(records: &mut Vec<u8>, xattrs: &[Xattr]) {
    for (name, value) in xattrs {
        let acl = match &name[..] {
            b"system.posix_acl_access" => Some(&b"SCHILY.acl.access"[..]),
            b"system.posix_acl_default" => Some(&b"SCHILY.acl.default"[..]),
            _ => None,
        };
        match acl.zip(posix_acl::text(value)) {
            Some((key, text)) => record(records, key, text.as_bytes()),
            None => record(records, &[b"SCHILY.xattr.", &name[..]].concat(), value),
        }
    }
}

/// "Storing Sparse Files", format 1.0: how many pieces, then where each is and how long, a number a line. An empty piece at
/// the end says where the file ends.
fn sparse_map(ranges: &[Range<u64>], size: u64) -> Vec<u8> {
    let mut pieces: Vec<(u64, u64)> =
        ranges.iter().map(|range| (range.start, range.end - range.start)).collect();
    if ranges.last().is_none_or(|last| last.end < size) {
        pieces.push((size, 0));
    }
    let mut map = format!("{}\n", pieces.len());
    for (offset, length) in pieces {
        map.push_str(&format!("{offset}\n{length}\n"));
    }
    let mut map = map.into_bytes();
    map.resize(map.len().next_multiple_of(BLOCK), 0);
    map
}

/// Seconds with a fraction, as short as they can be; negative ones count back.
fn decimal(seconds: i64, nanoseconds: u32) -> String {
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    let (sign, total) = if total < 0 { ("-", -total) } else { ("", total) };
    let text = format!("{sign}{}.{:09}", total / 1_000_000_000, total % 1_000_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn octal(number: u64, digits: usize) -> String {
    format!("{number:0digits$o}")
}

/// The sum of all bytes, with blanks in the place of the sum.
fn seal(block: &mut [u8; BLOCK]) {
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_their_own_length() {
        for length in [0, 1, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 980, 985, 990] {
            let mut records = Vec::new();
            record(&mut records, b"path", &vec![b'x'; length]);
            let said: usize = std::str::from_utf8(records.split(|&byte| byte == b' ').next().unwrap())
                .unwrap()
                .parse()
                .unwrap();
            assert_eq!(said, records.len());
        }
    }

    #[test]
    fn times_are_as_short_as_they_can_be() {
        assert_eq!(decimal(5, 0), "5");
        assert_eq!(decimal(5, 100_000_000), "5.1");
        assert_eq!(decimal(-1, 0), "-1");
        assert_eq!(decimal(-1, 250_000_000), "-0.75");
        assert_eq!(decimal(1 << 33, 1), "8589934592.000000001");
    }

    #[test]
    fn long_names_are_split_at_a_slash() {
        let long = [&[b'a'; 90][..], b"/", &[b'b'; 90]].concat();
        assert_eq!(split(&long), Some((&[b'a'; 90][..], &[b'b'; 90][..])));
        let directory = [&long[..], b"/"].concat();
        assert_eq!(split(&directory).unwrap().1.len(), 91);
        assert_eq!(split(&[b'a'; 101]), None);
        assert_eq!(split(&[&[b'a'; 156][..], b"/b"].concat()), None);
        assert_eq!(split("ä".as_bytes()), None);
        assert_eq!(split(b"a/b"), Some((&b""[..], &b"a/b"[..])));
    }
}
