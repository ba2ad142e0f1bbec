//! A buffered reader that can look ahead.

use std::io::{self, BufRead, Read};

const BUFFER: usize = 1 << 16;

/// A reader with what comes next in a buffer.
pub(super) struct Peek<R> {
    reader: R,
    buffer: Vec<u8>,
    /// What of the buffer was not taken yet.
    start: usize,
    end: usize,
}

impl<R: Read> Peek<R> {
    pub(super) fn new(reader: R) -> Peek<R> {
        Peek { reader, buffer: Vec::new(), start: 0, end: 0 }
    }

    /// The reader. What was looked at and not taken is lost.
    pub(super) fn into_inner(self) -> R {
        self.reader
    }

    /// Up to `count` bytes that come next, and stay; fewer at the end alone.
    pub(super) fn peek(&mut self, count: usize) -> io::Result<&[u8]> {
        while self.end - self.start < count && self.more()? > 0 {}
        Ok(&self.buffer[self.start..self.end.min(self.start + count)])
    }

    /// Goes past zeros; false at the end.
    pub(super) fn skip_zeros(&mut self) -> io::Result<bool> {
        loop {
            let bytes = self.fill_buf()?;
            let (length, zeros) = (bytes.len(), bytes.iter().take_while(|&&byte| byte == 0).count());
            self.consume(zeros);
            if zeros < length || length == 0 {
                return Ok(length > 0);
            }
        }
    }

    /// Reads on behind what is in the buffer.
    fn more(&mut self) -> io::Result<usize> {
        self.buffer.resize(BUFFER, 0);
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        loop {
            match self.reader.read(&mut self.buffer[self.end..]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
                Ok(read) => {
                    self.end += read;
                    return Ok(read);
                }
            }
        }
    }
}

impl<R: Read> Read for Peek<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.start == self.end && buffer.len() >= BUFFER {
            return self.reader.read(buffer);
        }
        let ready = self.fill_buf()?;
        let count = ready.len().min(buffer.len());
        buffer[..count].copy_from_slice(&ready[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl<R: Read> BufRead for Peek<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end {
            self.more()?;
        }
        Ok(&self.buffer[self.start..self.end])
    }

    fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
    }
}
