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

/// A part of something that can be read: a partition of a disk.
#[derive(Debug)]
pub struct Window<S> {
    pub(crate) of: S,
    pub(crate) start: u64,
    size: u64,
}

impl<S> Window<S> {
    /// The `size` bytes of `of` from `start` on.
    pub fn new(of: S, start: u64, size: u64) -> Window<S> {
        Window { of, start, size: size.min(u64::MAX - start) }
    }

    /// Where these bytes are in the whole; an error where they are not in the window.
    pub(crate) fn place(&self, offset: u64, length: usize) -> io::Result<u64> {
        match offset.checked_add(length as u64) {
            Some(end) if end <= self.size => Ok(self.start + offset),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl<S: Source> Source for Window<S> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.of.read_exact_at(buffer, self.place(offset, buffer.len())?)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_ends_where_it_ends() {
        let bytes: Vec<u8> = (0..100).collect();
        let window = Window::new(Padded::new(bytes, 0), 10, 20);
        let mut buffer = [0; 4];
        window.read_exact_at(&mut buffer, 16).unwrap();
        assert_eq!((window.size(), buffer), (20, [26, 27, 28, 29]));
        for offset in [17, u64::MAX] {
            let error = window.read_exact_at(&mut buffer, offset).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{offset}");
        }
        assert_eq!(Window::new(Padded::new(Vec::new(), 0), u64::MAX, 5).size(), 0);
    }
}
