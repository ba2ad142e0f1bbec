//! Headers: one block each, some of which describe the next.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use tar::{GnuExtSparseHeader, Header};

use super::content::{Extents, Pieces, read_map};
use super::input::{Block, Input, TRUNCATED};
use super::pax::{self, Records};
use super::{Kind, Member};
use crate::Error;
use crate::entry::{Meta, Special, Time};

/// The most that a header which describes another may hold: attributes of 64 KiB, many times over.
const DESCRIPTION: u64 = 8 << 20;
/// The longest path or link the kernel takes.
const PATH_MAX: usize = 4096;

/// Why an entry, or the archive where the entry has no name, cannot be taken.
pub(super) struct Bad {
    entry: String,
    reason: String,
}

impl Bad {
    pub(super) fn named(self, archive: &str) -> Error {
        Error::Archive { archive: archive.to_owned(), entry: self.entry, reason: self.reason }
    }
}

fn bad(entry: &[u8], reason: impl Into<String>) -> Bad {
    Bad { entry: String::from_utf8_lossy(entry).into_owned(), reason: reason.into() }
}

/// The members of an archive, one after the other.
pub(super) struct Members<'a> {
    input: Input<'a>,
    count: u64,
}

/// What the headers before a member's own say.
#[derive(Default)]
struct Before {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: Option<Records>,
}

impl<'a> Members<'a> {
    pub(super) fn new(reader: &'a mut dyn Read) -> Members<'a> {
        Members { input: Input::new(reader), count: 0 }
    }

    pub(super) fn input(&mut self) -> &mut Input<'a> {
        &mut self.input
    }

    /// The next member; what was not read of the one before is skipped.
    pub(super) fn next(&mut self) -> Result<Option<Member>, Bad> {
        let mut before = Before::default();
        loop {
            let block = self.input.block();
            let Some(block) = self.io(block, b"")? else {
                let reason = match self.count {
                    0 => "it is empty",
                    _ => "its end mark is missing",
                };
                return Err(bad(b"", format!("{TRUNCATED}: {reason}")));
            };
            if block.iter().all(|&b| b == 0) {
                if before.name.is_some() || before.link.is_some() || before.records.is_some() {
                    let reason = "it ends after a header that describes an entry";
                    return Err(bad(b"", format!("{TRUNCATED}: {reason}")));
                }
                let drained = self.input.drain();
                self.io(drained, b"")?;
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            if !sum_is_right(header, &block) {
                let reason = match self.count {
                    0 => "is no tar, cpio or squashfs, nor one compressed with gzip, xz or zstd",
                    _ => "is damaged: a header's checksum is wrong",
                };
                return Err(bad(b"", reason));
            }
            self.count += 1;
            let kind = block[156];
            if !matches!(kind, b'L' | b'K' | b'x' | b'g') {
                return self.member(header, kind, before).map(Some);
            }
            let data = self.description(header)?;
            let twice = match kind {
                b'L' => before.name.replace(until_nul(data)).is_some(),
                b'K' => before.link.replace(until_nul(data)).is_some(),
                b'x' => {
                    let records = Records::parse(&data).map_err(|reason| bad(&name_in(header), reason))?;
                    before.records.replace(records).is_some()
                }
                _ => {
                    pax::check_global(&data).map_err(|reason| bad(b"", reason))?;
                    false
                }
            };
            if twice {
                return Err(bad(&name_in(header), "is described twice"));
            }
        }
    }

    fn description(&mut self, header: &Header) -> Result<Vec<u8>, Bad> {
        let size = header.entry_size().map_err(|e| bad(&name_in(header), e.to_string()))?;
        if size > DESCRIPTION {
            return Err(bad(&name_in(header), format!("has {size} bytes of description")));
        }
        self.input.begin(size);
        let mut data = vec![0; usize::try_from(size).unwrap_or(0)];
        let read = self.input.read_exact(&mut data);
        self.io(read, &name_in(header))?;
        Ok(data)
    }

    fn member(&mut self, header: &Header, kind: u8, before: Before) -> Result<Member, Bad> {
        let mut records = before.records.unwrap_or_default();
        let sparse_name = records.sparse.name.take();
        let name = sparse_name.or(records.path.take()).or(before.name).unwrap_or_else(|| name_in(header));
        let wrong = |e: io::Error| bad(&name, format!("has a damaged header: {e}"));
        let path = clean_path(&name).map_err(|reason| bad(&name, reason))?;
        let stored = match records.size {
            Some(size) => size,
            None => header.entry_size().map_err(wrong)?,
        };
        let id = |value: u64, what: &str| {
            u32::try_from(value)
                .map_err(|_| bad(&name, format!("has the {what} {value}, which is too large")))
        };
        let old = header.as_old();
        let meta = Meta {
            mode: or_blank(&old.mode, header.mode()).map_err(wrong)? & 0o7777,
            uid: id(
                records.uid.map_or_else(|| or_blank(&old.uid, header.uid()), Ok).map_err(wrong)?,
                "owner",
            )?,
            gid: id(
                records.gid.map_or_else(|| or_blank(&old.gid, header.gid()), Ok).map_err(wrong)?,
                "group",
            )?,
            mtime: match records.mtime {
                Some(time) => time,
                None => {
                    let seconds = or_blank(&old.mtime, header.mtime()).map_err(wrong)?;
                    Time { seconds: seconds.cast_signed(), nanoseconds: 0 }
                }
            },
        };
        let link = || {
            let link = records.link.clone().or(before.link.clone());
            link.or_else(|| header.link_name_bytes().map(|l| l.into_owned())).unwrap_or_default()
        };
        let file = matches!(kind, b'0' | 0 | b'7' | b'S') && (kind == b'S' || !name.ends_with(b"/"));
        if !file && stored > 0 && !matches!(kind, b'0' | 0 | b'5') {
            return Err(bad(&name, format!("has {stored} bytes of data, which its type cannot have")));
        }
        // Some archivers put a directory's size into its header, with no data to it.
        self.input.begin(if file { stored } else { 0 });
        let kind = match kind {
            _ if file => {
                let (size, extents) = self.file(header, kind, &records, stored).map_err(|r| bad(&name, r))?;
                Kind::File { size, extents }
            }
            b'0' | 0 | b'5' | b'7' => Kind::Directory,
            b'1' => {
                let link = link();
                let target =
                    clean_path(&link).map_err(|r| bad(&name, format!("links to a path that {r}")))?;
                if target.as_os_str().is_empty() {
                    return Err(bad(&name, "links to the root"));
                }
                Kind::HardLink(target)
            }
            b'2' => {
                let link = link();
                if link.is_empty() || link.len() >= PATH_MAX || link.contains(&0) {
                    return Err(bad(&name, "is a link with no target, or one too long"));
                }
                Kind::Symlink(PathBuf::from(OsString::from_vec(link)))
            }
            b'3' | b'4' => {
                let special = if kind == b'3' { Special::Character } else { Special::Block };
                let major = header.device_major().map_err(wrong)?.unwrap_or(0);
                Kind::Device(special, major, header.device_minor().map_err(wrong)?.unwrap_or(0))
            }
            b'6' => Kind::Device(Special::Fifo, 0, 0),
            other => {
                let shown = char::from(other).escape_default();
                return Err(bad(&name, format!("has the unknown type '{shown}'")));
            }
        };
        if path.as_os_str().is_empty() && !matches!(kind, Kind::Directory) {
            return Err(bad(&name, "is the root, but no directory"));
        }
        Ok(Member { path, meta, xattrs: records.xattrs, named_acls: records.named_acls, kind })
    }

    /// A file's size and where its data belongs.
    fn file(
        &mut self,
        header: &Header,
        kind: u8,
        records: &Records,
        stored: u64,
    ) -> Result<(u64, Extents), String> {
        let sparse = &records.sparse;
        if kind == b'S' {
            let gnu = header.as_gnu().ok_or("is sparse, but not in the GNU format")?;
            let size = gnu.real_size().map_err(|e| e.to_string())?;
            let mut pieces = Pieces::default();
            let mut push = |piece: &tar::GnuSparseHeader| -> Result<(), String> {
                if piece.is_empty() {
                    return Ok(());
                }
                let offset = piece.offset().map_err(|e| e.to_string())?;
                pieces.push(offset, piece.length().map_err(|e| e.to_string())?)
            };
            gnu.sparse.iter().try_for_each(&mut push)?;
            if gnu.is_extended() {
                // The map goes on in blocks between the header and the data.
                self.input.begin(0);
                let mut more = GnuExtSparseHeader::new();
                loop {
                    let block = self.input.block().map_err(|e| e.to_string())?;
                    *more.as_mut_bytes() = block.ok_or(TRUNCATED)?;
                    more.sparse.iter().try_for_each(&mut push)?;
                    if !more.is_extended() {
                        break;
                    }
                }
                self.input.begin(stored);
            }
            return Ok((size, Extents::sparse(&pieces.0, size, stored)?));
        }
        match (sparse.major, sparse.size) {
            (Some(1), Some(size)) => {
                let pieces = read_map(&mut self.input)?;
                Ok((size, Extents::sparse(&pieces.0, size, self.input.left())?))
            }
            (None | Some(0), Some(size)) => Ok((size, Extents::sparse(&sparse.pieces.0, size, stored)?)),
            (None, None) => Ok((stored, Extents::whole(stored))),
            _ => Err("is sparse in a format that is not known".to_owned()),
        }
    }

    fn io<T>(&mut self, result: io::Result<T>, entry: &[u8]) -> Result<T, Bad> {
        result.map_err(|e| bad(entry, self.input.failure().unwrap_or_else(|| e.to_string())))
    }
}

/// The sum of all bytes, those of the sum itself taken as spaces.
fn sum_is_right(header: &Header, block: &Block) -> bool {
    let plain = |bytes: &[u8]| bytes.iter().map(|&b| u32::from(b)).sum::<u32>();
    let sum = plain(&block[..148]) + plain(&block[156..]) + 8 * 32;
    header.cksum().is_ok_and(|given| given == sum)
}

/// A number, where a field with nothing in it is one, too: some archivers leave out what is 0.
fn or_blank<T: Default>(field: &[u8], number: io::Result<T>) -> io::Result<T> {
    if field.iter().all(|b| matches!(b, 0 | b' ')) { Ok(T::default()) } else { number }
}

fn name_in(header: &Header) -> Vec<u8> {
    header.path_bytes().into_owned()
}

fn until_nul(mut data: Vec<u8>) -> Vec<u8> {
    if let Some(end) = data.iter().position(|&b| b == 0) {
        data.truncate(end);
    }
    data
}

/// An archive's path relative to the root, without `.` and doubled slashes; empty for the root itself.
///
/// # Errors
///
/// Says what is wrong with a path that is empty, absolute, has `..` or a NUL, or is longer than the kernel takes.
pub fn clean_path(raw: &[u8]) -> Result<PathBuf, String> {
    let refuse = |reason: &str| Err(reason.to_owned());
    if raw.is_empty() {
        return refuse("has no name");
    }
    if raw[0] == b'/' {
        return refuse("is absolute");
    }
    if raw.contains(&0) {
        return refuse("has a NUL in its name");
    }
    let mut path = Vec::with_capacity(raw.len());
    for part in raw.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return refuse("leads out of the tree by '..'"),
            part if part.len() > 255 => return refuse("has a name of more than 255 bytes"),
            part => {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(part);
            }
        }
    }
    if path.len() >= PATH_MAX {
        return refuse("has a path that is too long");
    }
    Ok(PathBuf::from(OsString::from_vec(path)))
}
