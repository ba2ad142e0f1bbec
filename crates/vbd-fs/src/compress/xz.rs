//! One xz stream, and no more than that. (The crate's own reader takes what follows for damage.)

use std::io::{self, BufRead, Read};

use xz2::stream::{Action, Status, Stream};

/// Memory in bytes that an xz stream may ask for; `xz -9` needs 65 MiB to unpack.
const MEMORY: u64 = 2 << 30;

pub(super) struct Xz<R> {
    reader: R,
    stream: Stream,
    ended: bool,
}

impl<R: BufRead> Xz<R> {
    pub(super) fn new(reader: R) -> io::Result<Xz<R>> {
        let stream = Stream::new_stream_decoder(MEMORY, 0).map_err(io::Error::from)?;
        Ok(Xz { reader, stream, ended: false })
    }

    pub(super) fn into_inner(self) -> R {
        self.reader
    }
}

impl<R: BufRead> Read for Xz<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.ended {
            let input = self.reader.fill_buf()?;
            let at_end = input.is_empty();
            let (taken, given) = (self.stream.total_in(), self.stream.total_out());
            let status = self.stream.process(input, buffer, Action::Run)?;
            let taken = usize::try_from(self.stream.total_in() - taken).unwrap_or(0);
            let given = usize::try_from(self.stream.total_out() - given).unwrap_or(0);
            self.reader.consume(taken);
            self.ended = status == Status::StreamEnd;
            if given > 0 {
                return Ok(given);
            }
            if at_end && !self.ended {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the xz stream is cut off"));
            }
        }
        Ok(0)
    }
}
