//! Reading at an offset, of a file or of bytes in memory, for whoever looks into disks.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vbd_core::Client;
use vbd_core::file::Backend;

/// Something that can be read at an offset.
pub trait ReadAt {
    /// Fills the buffer from the offset (in bytes) on; fewer bytes at the end only.
    ///
    /// # Errors
    ///
    /// Those of reading.
    fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;
}

impl<R: ReadAt + ?Sized> ReadAt for &R {
    fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        (**self).fill_at(offset, buffer)
    }
}

impl ReadAt for Backend {
    fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        Backend::fill_at(self, offset, buffer)
    }
}

impl ReadAt for File {
    fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.read_at(&mut buffer[done..], offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Beyond what an offset can be there is nothing, as there is nothing beyond the end.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

impl ReadAt for [u8] {
    fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.get(offset..)).unwrap_or_default();
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }
}

impl ReadAt for Client {
    fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = self.size().saturating_sub(offset);
        let length = usize::try_from(rest).unwrap_or(usize::MAX).min(buffer.len());
        self.read_at(offset, &mut buffer[..length])
            .map_err(|error| io::Error::new(io_kind(error.kind()), error))?;
        Ok(length)
    }
}

fn io_kind(kind: vbd_core::ErrorKind) -> io::ErrorKind {
    match kind {
        vbd_core::ErrorKind::NoSpace => io::ErrorKind::StorageFull,
        vbd_core::ErrorKind::Corrupt => io::ErrorKind::InvalidData,
        vbd_core::ErrorKind::ReadOnly => io::ErrorKind::PermissionDenied,
        _ => io::ErrorKind::Other,
    }
}
