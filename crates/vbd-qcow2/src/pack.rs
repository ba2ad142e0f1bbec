//! Compressing and decompressing clusters. What that takes is kept from one to the next: to make it anew costs more than a
//! small cluster does.

use std::cell::RefCell;
use std::io;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

use crate::format::Compression;

/// The window of deflated clusters, as a power of two: what other readers make room for.
const WINDOW_BITS: u8 = 12;
/// What a cluster has to become shorter by, in bytes: a sector, the unit in which an image says how long it is.
const WORTH: usize = 512;

/// Compresses clusters, one after the other.
pub struct Packer(Encoder);

enum Encoder {
    Zlib(Box<Compress>),
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Packer {
    /// One for this kind of compression, at its usual level.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn new(compression: Compression) -> io::Result<Self> {
        Ok(Packer(match compression {
            Compression::Zlib => Encoder::Zlib(deflate()),
            Compression::Zstd => Encoder::Zstd(zstd::bulk::Compressor::new(0)?),
        }))
    }

    /// Appends the compressed form of a cluster; `None`, and nothing is appended, where that is not shorter by a sector at
    /// least. Gives its length.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn pack(&mut self, cluster: &[u8], to: &mut Vec<u8>) -> io::Result<Option<usize>> {
        let Some(most) = cluster.len().checked_sub(WORTH) else { return Ok(None) };
        let start = to.len();
        let packed = match &mut self.0 {
            Encoder::Zlib(state) => {
                state.reset();
                to.resize(start + most, 0);
                let status = state.compress(cluster, &mut to[start..], FlushCompress::Finish);
                let len = usize::try_from(state.total_out()).unwrap_or(usize::MAX);
                match status {
                    Ok(Status::StreamEnd) => Some(len),
                    // There is no room for the rest. What is left of it inside is not gone with a reset.
                    other => {
                        *state = deflate();
                        other?;
                        None
                    }
                }
            }
            Encoder::Zstd(state) => {
                to.resize(start + zstd::zstd_safe::compress_bound(cluster.len()), 0);
                Some(state.compress_to_buffer(cluster, &mut to[start..])?)
            }
        };
        let packed = packed.filter(|len| (1..=most).contains(len));
        to.truncate(start + packed.unwrap_or(0));
        Ok(packed)
    }
}

fn deflate() -> Box<Compress> {
    Box::new(Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS))
}

/// Decompresses clusters, one after the other.
#[derive(Default)]
struct Unpacker {
    zlib: Option<Box<Decompress>>,
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Unpacker {
    /// Whether the cluster was filled in one step: data that is valid may need more.
    fn quickly(&mut self, compression: Compression, data: &[u8], cluster: &mut [u8]) -> io::Result<bool> {
        match compression {
            Compression::Zlib => {
                let state = self.zlib.get_or_insert_with(|| Box::new(Decompress::new(false)));
                state.reset(false);
                let ended = state.decompress(data, cluster, FlushDecompress::Finish);
                Ok(ended.is_ok() && state.total_out() == cluster.len() as u64)
            }
            Compression::Zstd => {
                // Whatever lies between its end and that of the sector is none of it.
                let Ok(len) = zstd::zstd_safe::find_frame_compressed_size(data) else { return Ok(false) };
                let Some(frame) = data.get(..len) else { return Ok(false) };
                let state = match &mut self.zstd {
                    Some(state) => state,
                    none => none.insert(zstd::bulk::Decompressor::new()?),
                };
                Ok(state.decompress_to_buffer(frame, cluster).is_ok_and(|len| len == cluster.len()))
            }
        }
    }
}

thread_local! {
    static UNPACKER: RefCell<Unpacker> = RefCell::default();
}

/// Fills a cluster from what begins with its compressed form.
///
/// # Errors
/// That is none.
pub(crate) fn unpack(compression: Compression, data: &[u8], cluster: &mut [u8]) -> io::Result<()> {
    if UNPACKER.with_borrow_mut(|state| state.quickly(compression, data, cluster))? {
        return Ok(());
    }
    // Data in several frames, say; and errors are said here.
    match compression {
        Compression::Zlib => io::Read::read_exact(&mut flate2::read::DeflateDecoder::new(data), cluster),
        Compression::Zstd => {
            io::Read::read_exact(&mut zstd::stream::read::Decoder::with_buffer(data)?, cluster)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut number = 1u64;
        let mut next = || {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            number.to_be_bytes()[0]
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn what_is_packed_is_read_again_in_any_order() {
        for compression in [Compression::Zlib, Compression::Zstd] {
            let mut packer = Packer::new(compression).expect("memory");
            for bits in [9, 12, 16, 21, 9, 16] {
                let cluster: Vec<u8> =
                    (0..1usize << bits).map(|at| (at / 7 % 9 + at / 5000 % 3).to_le_bytes()[0]).collect();
                let mut data = b"before".to_vec();
                let Some(len) = packer.pack(&cluster, &mut data).expect("possible") else { continue };
                assert_eq!(data.len(), 6 + len);
                assert!(len <= cluster.len() - 512);
                // Up to the end of its sector there is what was there.
                data.extend(noise(512));
                let mut read = vec![7; cluster.len()];
                unpack(compression, &data[6..], &mut read).expect("readable");
                assert_eq!(read, cluster);
                // What is cut off is none, and the next one is read all the same.
                unpack(compression, &data[6..6 + len / 2], &mut read).expect_err("cut off");
                assert!(packer.pack(&noise(1 << bits), &mut data).expect("possible").is_none());
            }
        }
    }

    #[test]
    fn several_frames_are_one_cluster() {
        let cluster: Vec<u8> = (0..4096usize).map(|at| (at / 64).to_le_bytes()[0]).collect();
        let mut data = zstd::bulk::compress(&cluster[..1000], 0).expect("possible");
        data.extend(zstd::bulk::compress(&cluster[1000..], 0).expect("possible"));
        let mut read = vec![0; 4096];
        unpack(Compression::Zstd, &data, &mut read).expect("readable");
        assert_eq!(read, cluster);
    }
}
