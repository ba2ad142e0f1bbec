//! Archives as they come: plain or compressed, told apart by their first bytes; also one after another, as the parts of
//! an initramfs are.

mod peek;
mod xz;

use std::io::{self, Read};
use std::mem;

use crate::{Error, Result};

use peek::Peek;
use xz::Xz;

/// Memory that a zstd stream may ask for: the 2 GiB window is what `zstd --ultra --long=31` makes at most.
const ZSTD_WINDOW_LOG: u32 = 31;
/// Bytes by which every kind of stream can be told.
const MAGIC: usize = 6;

type Raw<'a> = Peek<Box<dyn Read + Send + 'a>>;

/// What a stream is compressed with, by what it starts with (RFC 1952, the .xz file format, RFC 8878).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Gzip,
    Xz,
    Zstd,
    /// Known, and not unpacked: its name, and the program that does.
    Other(&'static str, &'static str),
}

impl Kind {
    fn of(start: &[u8]) -> Option<Kind> {
        match start {
            [0x1f, 0x8b, ..] => Some(Kind::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Kind::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Kind::Zstd),
            [b'B', b'Z', b'h', ..] => Some(Kind::Other("bzip2", "bzcat")),
            [0x04, 0x22, 0x4d, 0x18, ..] | [0x02, 0x21, 0x4c, 0x18, ..] => Some(Kind::Other("lz4", "lz4cat")),
            [0x89, b'L', b'Z', b'O', 0, ..] => Some(Kind::Other("lzop", "lzop -dc")),
            _ => None,
        }
    }
}

/// One compressed stream, which ends where it ends: what comes after it stays in the reader.
enum Unpacker<'a> {
    Gzip(flate2::bufread::GzDecoder<Raw<'a>>),
    Xz(Xz<Raw<'a>>),
    Zstd(zstd::stream::read::Decoder<'static, Raw<'a>>),
}

impl<'a> Unpacker<'a> {
    fn into_inner(self) -> Raw<'a> {
        match self {
            Unpacker::Gzip(decoder) => decoder.into_inner(),
            Unpacker::Xz(decoder) => decoder.into_inner(),
            Unpacker::Zstd(decoder) => decoder.finish(),
        }
    }
}

impl Read for Unpacker<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Unpacker::Gzip(decoder) => decoder.read(buffer),
            Unpacker::Xz(decoder) => decoder.read(buffer),
            Unpacker::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

enum State<'a> {
    Plain(Raw<'a>),
    Packed(Box<Peek<Unpacker<'a>>>),
    /// Between the others, and after an error in going from one to another.
    Nothing,
}

/// A stream unpacked. Compressed streams that follow each other are read as one.
pub(crate) struct Streams<'a> {
    state: State<'a>,
    name: String,
    /// Whether something compressed came: then nothing may follow but more of it and zeros.
    packed: bool,
}

/// Whether a stream that starts with this is not compressed.
pub(crate) fn is_plain(start: &[u8]) -> bool {
    Kind::of(start).is_none()
}

/// Begins to read a stream, compressed or not.
///
/// # Errors
///
/// One that cannot be read, or is compressed in a way that is not supported.
pub(crate) fn open<'a>(reader: impl Read + Send + 'a, name: &str) -> Result<Streams<'a>> {
    let raw: Raw<'a> = Peek::new(Box::new(reader));
    let mut streams = Streams { state: State::Plain(raw), name: name.to_owned(), packed: false };
    streams.start().map_err(|e| match e.kind() {
        io::ErrorKind::Unsupported => Error::Invalid(e.to_string()),
        _ => Error::io(format!("cannot read {name}"), e),
    })?;
    Ok(streams)
}

impl<'a> Streams<'a> {
    /// Whether what is read next was compressed.
    pub(crate) fn is_packed(&self) -> bool {
        matches!(self.state, State::Packed(_))
    }

    /// Up to `count` bytes that come next, and stay; fewer at the end alone.
    ///
    /// # Errors
    ///
    /// Those of reading and unpacking.
    pub(crate) fn peek(&mut self, count: usize) -> io::Result<&[u8]> {
        match &mut self.state {
            State::Plain(reader) => reader.peek(count),
            State::Packed(reader) => reader.peek(count),
            State::Nothing => Ok(&[]),
        }
    }

    /// Goes to the next archive, past zeros: what is not compressed may be followed by what is, and the other way
    /// round. False at the end.
    ///
    /// # Errors
    ///
    /// As [`Streams::peek`].
    pub(crate) fn next_archive(&mut self) -> io::Result<bool> {
        loop {
            match &mut self.state {
                State::Packed(reader) => {
                    if reader.skip_zeros()? {
                        return Ok(true);
                    }
                    self.end_of_packed();
                }
                State::Plain(reader) => {
                    if !reader.skip_zeros()? {
                        return Ok(false);
                    }
                    if !self.start()? {
                        self.packed = false;
                        return Ok(true);
                    }
                }
                State::Nothing => return Ok(false),
            }
        }
    }

    /// Begins to unpack, if what comes next is compressed.
    fn start(&mut self) -> io::Result<bool> {
        let State::Plain(reader) = &mut self.state else { return Ok(false) };
        let Some(kind) = Kind::of(reader.peek(MAGIC)?) else { return Ok(false) };
        if let Kind::Other(compression, program) = kind {
            let name = &self.name;
            let reason = format!(
                "{name} is compressed with {compression}, which is not supported: unpack it and pipe it in ({program} {name} | ... -)"
            );
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        }
        let State::Plain(raw) = mem::replace(&mut self.state, State::Nothing) else { return Ok(false) };
        let unpacker = match kind {
            Kind::Xz => Unpacker::Xz(Xz::new(raw)?),
            Kind::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(raw)?.single_frame();
                decoder.window_log_max(ZSTD_WINDOW_LOG)?;
                Unpacker::Zstd(decoder)
            }
            Kind::Gzip | Kind::Other(..) => Unpacker::Gzip(flate2::bufread::GzDecoder::new(raw)),
        };
        self.state = State::Packed(Box::new(Peek::new(unpacker)));
        self.packed = true;
        Ok(true)
    }

    fn end_of_packed(&mut self) {
        if let State::Packed(reader) = mem::replace(&mut self.state, State::Nothing) {
            self.state = State::Plain(reader.into_inner().into_inner());
        }
    }
}

impl Read for Streams<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match &mut self.state {
                State::Nothing => return Ok(0),
                State::Packed(reader) => match reader.read(buffer)? {
                    0 => self.end_of_packed(),
                    read => return Ok(read),
                },
                State::Plain(reader) if !self.packed => return reader.read(buffer),
                State::Plain(reader) => {
                    // Some media pad with zeros, which are no part of any archive.
                    if !reader.skip_zeros()? {
                        return Ok(0);
                    }
                    if !self.start()? {
                        let reason = "goes on after its compressed part with something else";
                        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Gives its bytes in pieces of this size.
    struct Slow<'a>(&'a [u8], usize);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.1.min(buffer.len()).min(self.0.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn xz(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = xz2::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        zstd::stream::encode_all(bytes, 1).unwrap()
    }

    fn all(bytes: &[u8], piece: usize) -> io::Result<Vec<u8>> {
        let mut unpacked = Vec::new();
        open(Slow(bytes, piece), "it").unwrap().read_to_end(&mut unpacked)?;
        Ok(unpacked)
    }

    #[test]
    fn compressed_streams_in_a_row_are_one() {
        let text: Vec<u8> = (0..200_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let (first, rest) = text.split_at(300_001);
        let (second, third) = rest.split_at(100);
        let packed = [gzip(first), xz(second), vec![0; 12], zstd(third), gzip(b""), vec![0; 3]].concat();
        for piece in [1, 7, 1 << 20] {
            assert!(all(&packed, piece).unwrap() == text, "pieces of {piece}");
        }
        assert_eq!(all(b"plain", 1).unwrap(), b"plain");
        assert_eq!(all(b"", 1).unwrap(), b"");
    }

    #[test]
    fn what_is_cut_off_or_goes_on_otherwise_is_an_error() {
        for packed in [gzip(&[7; 5000]), xz(&[7; 5000]), zstd(&[7; 5000])] {
            for length in 7..packed.len() {
                assert!(all(&packed[..length], 100).is_err(), "{length} of {packed:?}");
            }
            assert!(all(&[&packed[..], b"more"].concat(), 100).is_err());
        }
        let refused = open(&b"BZh91AY"[..], "x.tar.bz2").err().unwrap().to_string();
        assert!(refused.contains("bzip2"), "{refused}");
    }

    #[test]
    fn archives_in_a_row_are_found_compressed_or_not() {
        let bytes =
            [b"one".to_vec(), vec![0; 513], gzip(b"two\0\0"), vec![0; 4], zstd(b"three"), b"four".to_vec()];
        let bytes = bytes.concat();
        let mut streams = open(Slow(&bytes, 5), "it").unwrap();
        for (text, packed) in [("one", false), ("two", true), ("three", true), ("four", false)] {
            assert!(streams.next_archive().unwrap());
            assert_eq!(streams.is_packed(), packed, "{text}");
            let mut read = vec![0; text.len()];
            streams.read_exact(&mut read).unwrap();
            assert_eq!(read, text.as_bytes());
        }
        assert!(!streams.next_archive().unwrap());
    }
}
