//! Archives as they come: plain or compressed, told apart by their first bytes.

use std::io::{self, BufRead, BufReader, Read};

use crate::{Error, Result};

/// Memory that a zstd stream may ask for: the 2 GiB window is what `zstd --ultra --long=31` makes at most.
const ZSTD_WINDOW_LOG: u32 = 31;
/// Memory in bytes that an xz stream may ask for; `xz -9` needs 65 MiB to unpack.
const XZ_MEMORY: u64 = 2 << 30;

/// Unpacks a stream by what it starts with (RFC 1952, the .xz file format, RFC 8878).
pub(crate) fn open<'a>(reader: impl Read + 'a, name: &str) -> Result<Box<dyn Read + 'a>> {
    let mut reader = BufReader::with_capacity(1 << 16, reader);
    let start = first_bytes(&mut reader).map_err(|e| Error::io(format!("cannot read {name}"), e))?;
    let unpacker = |e: io::Error| Error::io(format!("cannot unpack {name}"), e);
    Ok(match start {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            let flags = xz2::stream::CONCATENATED;
            let stream = xz2::stream::Stream::new_stream_decoder(XZ_MEMORY, flags)
                .map_err(|e| unpacker(io::Error::other(e)))?;
            Box::new(xz2::bufread::XzDecoder::new_stream(reader, stream))
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(reader).map_err(unpacker)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG).map_err(unpacker)?;
            Box::new(decoder)
        }
        [b'B', b'Z', b'h', ..] => {
            return Err(Error::Invalid(format!(
                "{name} is compressed with bzip2, which is not supported: unpack it and pipe it in (bzcat {name} | ... -)"
            )));
        }
        _ => Box::new(reader),
    })
}

/// Up to six bytes, which stay in the reader. (Every writer of these formats writes its magic at once.)
fn first_bytes(reader: &mut BufReader<impl Read>) -> io::Result<[u8; 6]> {
    let mut start = [0; 6];
    loop {
        match reader.fill_buf() {
            Ok(bytes) => {
                let length = bytes.len().min(start.len());
                start[..length].copy_from_slice(&bytes[..length]);
                return Ok(start);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
