//! Where the bytes of a filesystem come from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Something that holds a filesystem from its first byte on, and can be read anywhere.
pub trait Source: Send + Sync {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// Fills the buffer from that byte on.
    ///
    /// # Errors
    ///
    /// Those of reading, and [`io::ErrorKind::UnexpectedEof`] where the source ends before the buffer is full.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

/// A part of a file: a partition, or all of it.
#[derive(Debug)]
pub struct Part {
    pub(crate) file: File,
    pub(crate) start: u64,
    size: u64,
}

impl Part {
    /// The `size` bytes of `file` from `start` on.
    pub fn new(file: File, start: u64, size: u64) -> Part {
        Part { file, start, size: size.min(u64::MAX - start) }
    }
}

impl Source for Part {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.file.read_exact_at(buffer, self.start + offset)
    }
}

/// One that several filesystems are read from.
impl<S: Source + ?Sized> Source for std::sync::Arc<S> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buffer, offset)
    }
}

/// Bytes in memory, as if followed by zeros up to a size: for tests and fuzzing.
#[derive(Debug)]
pub struct Padded {
    bytes: Vec<u8>,
    size: u64,
}

impl Padded {
    /// These bytes, and zeros up to `size`.
    pub fn new(bytes: Vec<u8>, size: u64) -> Padded {
        let size = size.max(bytes.len() as u64);
        Padded { bytes, size }
    }
}

impl Source for Padded {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let rest =
            usize::try_from(offset).ok().and_then(|offset| self.bytes.get(offset..)).unwrap_or_default();
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        buffer[length..].fill(0);
        Ok(())
    }
}
