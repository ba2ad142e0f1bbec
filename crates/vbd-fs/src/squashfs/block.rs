//! Blocks of data and of metadata, each compressed for itself.

use std::io;

use xz2::stream::{Action, Status, Stream};

use super::lzo;

/// Memory in bytes that a block may ask for. Dictionaries are no larger than a block, of which 1 MiB is the most.
const MEMORY: u64 = 64 << 20;

/// What blocks are compressed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    /// zlib's streams (RFC 1950).
    Gzip,
    /// The old .lzma format.
    Lzma,
    Lzo,
    Xz,
    Lz4,
    Zstd,
}

impl Compression {
    pub(super) fn of(number: u16) -> Result<Compression, String> {
        Ok(match number {
            1 => Compression::Gzip,
            2 => Compression::Lzma,
            3 => Compression::Lzo,
            4 => Compression::Xz,
            5 => Compression::Lz4,
            6 => Compression::Zstd,
            other => return Err(format!("is compressed in the unknown way {other}")),
        })
    }

    /// Unpacks a block of at most `most` bytes.
    pub(super) fn unpack(self, packed: &[u8], most: usize) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; most];
        let length = self.unpack_into(packed, &mut bytes).map_err(|e| format!("has a damaged block: {e}"))?;
        bytes.truncate(length);
        Ok(bytes)
    }

    fn unpack_into(self, packed: &[u8], to: &mut [u8]) -> io::Result<usize> {
        match self {
            Compression::Gzip => {
                let mut stream = flate2::Decompress::new(true);
                let status = stream.decompress(packed, to, flate2::FlushDecompress::Finish)?;
                match status {
                    flate2::Status::StreamEnd => Ok(usize::try_from(stream.total_out()).unwrap_or(0)),
                    _ => Err(io::Error::other("it does not end where it must")),
                }
            }
            Compression::Xz => through(Stream::new_stream_decoder(MEMORY, 0)?, packed, to),
            Compression::Lzma => through(Stream::new_lzma_decoder(MEMORY)?, packed, to),
            Compression::Lzo => lzo::unpack(packed, to).map_err(io::Error::other),
            Compression::Lz4 => lz4_flex::block::decompress_into(packed, to).map_err(io::Error::other),
            Compression::Zstd => zstd::bulk::Decompressor::new()?.decompress_to_buffer(packed, to),
        }
    }
}

fn through(mut stream: Stream, packed: &[u8], to: &mut [u8]) -> io::Result<usize> {
    loop {
        let (taken, given) = (stream.total_in(), stream.total_out());
        let (from, into) = (usize::try_from(taken).unwrap_or(0), usize::try_from(given).unwrap_or(0));
        let status = stream.process(&packed[from..], &mut to[into..], Action::Finish)?;
        if status == Status::StreamEnd {
            return Ok(usize::try_from(stream.total_out()).unwrap_or(0));
        }
        if (taken, given) == (stream.total_in(), stream.total_out()) {
            return Err(io::Error::other("it does not end where it must"));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever a block is, it becomes no more than it may, or an error.
        #[test]
        fn any_block_is_unpacked_or_refused(
            number in 1u16..7, packed in prop::collection::vec(any::<u8>(), 0..300), most in 0usize..9000,
        ) {
            if let Ok(bytes) = Compression::of(number).unwrap().unpack(&packed, most) {
                prop_assert!(bytes.len() <= most);
            }
        }
    }
}
