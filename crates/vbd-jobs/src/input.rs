//! A disk that a job reads.

use std::sync::Arc;

use vbd_core::client::Buffer;
use vbd_core::{Client, Reader};

use crate::Result;

/// A disk as it is read best: on the threads that ask, where its format knows how and nobody writes to it, and by requests
/// otherwise.
pub(crate) struct Input<'a> {
    /// The disk.
    pub(crate) disk: &'a Client,
    reader: Option<Arc<dyn Reader>>,
}

impl<'a> Input<'a> {
    /// The way to read a disk.
    pub(crate) fn new(disk: &'a Client) -> Self {
        Input { disk, reader: disk.session().clone().reader() }
    }

    /// Fills the first `len` bytes of a buffer.
    pub(crate) fn read(&self, offset: u64, buffer: &mut Buffer, len: usize) -> Result<()> {
        match &self.reader {
            Some(reader) => reader.read(offset, &mut buffer[..len])?,
            None => self.disk.read(offset, buffer, len)?,
        }
        Ok(())
    }

    /// The same from a disk that may end before; what is missing is zeroes.
    pub(crate) fn read_padded(&self, offset: u64, buffer: &mut Buffer, len: usize) -> Result<()> {
        let there = self.disk.size().saturating_sub(offset);
        let there = usize::try_from(there).unwrap_or(usize::MAX).min(len);
        if there > 0 {
            self.read(offset, buffer, there)?;
        }
        buffer[there..len].fill(0);
        Ok(())
    }
}
