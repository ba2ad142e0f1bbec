//! The stream below an archive: blocks, members' data and their padding.

use std::io::{self, Read};

/// Bytes in a tar block.
pub(super) const BLOCK: usize = 512;
/// How the reason starts where the stream ended too early.
pub(crate) const TRUNCATED: &str = "is truncated";

/// A stream that knows how much of the current member is left.
pub(super) struct Input<'a> {
    reader: &'a mut dyn Read,
    /// Bytes of data left in the member, and of padding after them.
    data: u64,
    padding: u64,
    failure: Option<String>,
}

pub(super) type Block = [u8; BLOCK];

impl<'a> Input<'a> {
    pub(super) fn new(reader: &'a mut dyn Read) -> Input<'a> {
        Input { reader, data: 0, padding: 0, failure: None }
    }

    /// The first failure of the stream, which is not the sink's.
    pub(super) fn failure(&mut self) -> Option<String> {
        self.failure.take()
    }

    /// A member of `size` bytes begins.
    pub(super) fn begin(&mut self, size: u64) {
        self.data = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
    }

    /// Bytes of the member that were not read.
    pub(super) fn left(&self) -> u64 {
        self.data
    }

    /// Reads of the member's data; 0 at its end alone.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.data).unwrap_or(buffer.len()).min(buffer.len());
        if room == 0 {
            return Ok(0);
        }
        let got = self.some(&mut buffer[..room])?;
        self.data -= got as u64;
        Ok(got)
    }

    /// Reads exactly so much of the member's data.
    pub(super) fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read(&mut buffer[filled..])? {
                0 => return self.fail("its data is shorter than it must be"),
                n => filled += n,
            }
        }
        Ok(())
    }

    /// Skips so much of the member's data.
    pub(super) fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let mut buffer = [0; 16384];
        let mut left = bytes;
        while left > 0 {
            let room = usize::try_from(left).unwrap_or(buffer.len()).min(buffer.len());
            match self.read(&mut buffer[..room])? {
                0 => return self.fail("its data is shorter than it must be"),
                n => left -= n as u64,
            }
        }
        Ok(())
    }

    /// The next block outside of any data; nothing at the end of the stream.
    pub(super) fn block(&mut self) -> io::Result<Option<Block>> {
        self.skip(self.data)?;
        let mut padding = [0; BLOCK];
        let length = usize::try_from(self.padding).unwrap_or(0);
        self.padding = 0;
        self.whole(&mut padding[..length])?;
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.reader.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return self.fail(TRUNCATED),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return self.fail(&format!("cannot be read: {e}")),
            }
        }
        Ok(Some(block))
    }

    /// Reads on to the end of the stream, so that a checksum after the data is looked at and no writer is cut off.
    pub(super) fn drain(&mut self) -> io::Result<()> {
        let mut buffer = [0; 16384];
        loop {
            match self.reader.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return self.fail(&format!("cannot be read to its end: {e}")),
            }
        }
    }

    fn whole(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            filled += self.some(&mut buffer[filled..])?;
        }
        Ok(())
    }

    fn some(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.reader.read(buffer) {
                Ok(0) => return self.fail(TRUNCATED),
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return self.fail(&format!("cannot be read: {e}")),
            }
        }
    }

    fn fail<T>(&mut self, reason: &str) -> io::Result<T> {
        self.failure.get_or_insert_with(|| reason.to_owned());
        Err(io::Error::other(reason.to_owned()))
    }
}
