//! Headers: numbers in hexadecimal (newc) or octal (odc) digits, each of a fixed width.

use crate::entry::{Meta, Time};

/// Bytes of the magic that starts every header.
pub(super) const MAGIC: usize = 6;
/// Bytes of the longest header.
pub(super) const LONGEST: usize = 110;

/// What an archive's headers are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// SVR4.
    New,
    /// SVR4, with the sum of each file's bytes.
    Sums,
    /// POSIX.1-1988, "old character format".
    Old,
}

impl Format {
    pub(super) fn of(start: &[u8]) -> Option<Format> {
        match start.get(..MAGIC)? {
            b"070701" => Some(Format::New),
            b"070702" => Some(Format::Sums),
            b"070707" => Some(Format::Old),
            _ => None,
        }
    }

    /// Bytes of a header.
    pub(super) fn length(self) -> usize {
        if self == Format::Old { 76 } else { LONGEST }
    }

    /// Whether names and data are padded to a multiple of four bytes.
    pub(super) fn is_padded(self) -> bool {
        self != Format::Old
    }
}

/// Whether it starts as the old binary format does, in either order of bytes.
pub(super) fn is_binary(start: &[u8]) -> bool {
    matches!(start, [0xc7, 0x71, ..] | [0x71, 0xc7, ..])
}

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// The device that it was on, and its inode there.
    pub(super) identity: (u64, u64),
    /// Type and permissions, as in `st_mode`.
    pub(super) mode: u32,
    uid: u32,
    gid: u32,
    /// How many names it had.
    pub(super) links: u64,
    mtime: i64,
    /// Bytes of data.
    pub(super) size: u64,
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
    /// Bytes of the name, with the NUL at its end.
    pub(super) name_size: u64,
    /// The sum of all bytes of a file.
    pub(super) sum: Option<u32>,
}

impl Header {
    /// Reads a header of [`Format::length`] bytes.
    pub(super) fn parse(format: Format, bytes: &[u8]) -> Result<Header, String> {
        if Format::of(bytes) != Some(format) {
            return Err("is damaged: where a header must be there is none".to_owned());
        }
        let mut fields = Fields { rest: &bytes[MAGIC..], radix: if format == Format::Old { 8 } else { 16 } };
        if format == Format::Old {
            let identity = (fields.next(6)?, fields.next(6)?);
            let (mode, uid, gid) = (fields.small(6)?, fields.small(6)?, fields.small(6)?);
            let (links, device, mtime) = (fields.next(6)?, fields.small(6)?, fields.next(11)?);
            let (name_size, size) = (fields.next(6)?, fields.next(11)?);
            let (device, mtime) = ((device >> 8, device & 0xff), mtime.cast_signed());
            return Ok(Header { identity, mode, uid, gid, links, mtime, size, device, name_size, sum: None });
        }
        let inode = fields.next(8)?;
        let (mode, uid, gid) = (fields.small(8)?, fields.small(8)?, fields.small(8)?);
        let (links, mtime, size) = (fields.next(8)?, fields.next(8)?.cast_signed(), fields.next(8)?);
        let identity = (fields.next(8)? << 32 | fields.next(8)?, inode);
        let device = (fields.small(8)?, fields.small(8)?);
        let (name_size, sum) = (fields.next(8)?, fields.small(8)?);
        let sum = (format == Format::Sums).then_some(sum);
        Ok(Header { identity, mode, uid, gid, links, mtime, size, device, name_size, sum })
    }

    pub(super) fn meta(&self) -> Meta {
        let mtime = Time { seconds: self.mtime, nanoseconds: 0 };
        Meta { mode: self.mode & 0o7777, uid: self.uid, gid: self.gid, mtime }
    }
}

struct Fields<'a> {
    rest: &'a [u8],
    radix: u32,
}

impl Fields<'_> {
    /// The number in the next digits, of which there are at most eleven.
    fn next(&mut self, digits: usize) -> Result<u64, String> {
        let (field, rest) = self.rest.split_at_checked(digits).ok_or("is damaged: a header is too short")?;
        self.rest = rest;
        field.iter().try_fold(0, |number, &byte| {
            let digit = char::from(byte).to_digit(self.radix);
            let digit = digit.ok_or("is damaged: a header has a number that is none")?;
            Ok(number * u64::from(self.radix) + u64::from(digit))
        })
    }

    /// As [`Fields::next`], for digits that make 32 bits at most.
    fn small(&mut self, digits: usize) -> Result<u32, String> {
        u32::try_from(self.next(digits)?)
            .map_err(|_| "is damaged: a header has a number too large".to_owned())
    }
}
