//! A part of a disk, as a file of its own.

use std::io::{self, Read, Seek, SeekFrom, Write};

use super::device::Device;

/// A part of a disk, as a file of its own.
pub(crate) struct Section<'a> {
    device: &'a dyn Device,
    start: u64,
    length: u64,
    position: u64,
}

impl<'a> Section<'a> {
    /// `length` bytes of a disk from `start` on.
    pub(crate) fn new(device: &'a dyn Device, start: u64, length: u64) -> Section<'a> {
        Section { device, start, length, position: 0 }
    }

    /// How much of `wanted` bytes there is from here on.
    fn room(&self, wanted: usize) -> usize {
        usize::try_from(self.length.saturating_sub(self.position)).unwrap_or(usize::MAX).min(wanted)
    }
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = self.room(buffer.len());
        self.device.read_exact_at(&mut buffer[..room], self.start + self.position)?;
        self.position += room as u64;
        Ok(room)
    }
}

impl Write for Section<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let room = self.room(buffer.len());
        self.device.write_all_at(&buffer[..room], self.start + self.position)?;
        self.position += room as u64;
        Ok(room)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Section<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}
