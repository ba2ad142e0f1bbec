//! A stream that one thread reads, and unpacks, while another one uses what came of it.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::{Cancel, Result};

/// Bytes that are handed on at once: few enough to be in the processor's cache still.
const CHUNK: usize = 256 << 10;
/// How many of them may wait.
const WAITING: usize = 32;

/// A piece of a stream, shared by those who use it.
pub(crate) type Chunk = Arc<Vec<u8>>;

/// The end of a stream that takes what another thread reads.
pub(crate) struct Stream {
    receiver: Receiver<io::Result<Chunk>>,
    chunk: Chunk,
    at: usize,
}

/// The other end.
#[derive(Clone)]
pub(crate) struct Feed(SyncSender<io::Result<Chunk>>);

/// Both ends. The stream ends when the feed is dropped.
pub(crate) fn stream() -> (Feed, Stream) {
    let (sender, receiver) = sync_channel(WAITING);
    (Feed(sender), Stream { receiver, chunk: Chunk::default(), at: 0 })
}

impl Stream {
    /// Whole pieces, as they come, from a stream that was not read yet.
    pub(crate) fn chunks(self) -> impl Iterator<Item = io::Result<Chunk>> {
        self.receiver.into_iter()
    }

    /// Takes what is still to come, and keeps nothing of it.
    pub(crate) fn drain(self) {
        self.receiver.into_iter().for_each(drop);
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.chunk.len() {
            match self.receiver.recv() {
                Ok(chunk) => (self.chunk, self.at) = (chunk?, 0),
                Err(_) => return Ok(0),
            }
        }
        let left = &self.chunk[self.at..];
        let length = left.len().min(buffer.len());
        buffer[..length].copy_from_slice(&left[..length]);
        self.at += length;
        Ok(length)
    }
}

/// Reads to the end, for all of `feeds`; the error of reading is the last that they get. A feed that nobody takes from is
/// left out, and where there is no other one it stops.
pub(crate) fn forward(reader: &mut dyn Read, mut feeds: Vec<Feed>) {
    while !feeds.is_empty() {
        let mut chunk = vec![0; CHUNK];
        let (filled, end) = fill(reader, &mut chunk);
        chunk.truncate(filled);
        if filled > 0 {
            let chunk = Arc::new(chunk);
            feeds.retain(|feed| feed.0.send(Ok(Arc::clone(&chunk))).is_ok());
        }
        match end {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => {
                for feed in feeds {
                    let same = error.raw_os_error().map_or_else(
                        || io::Error::new(error.kind(), error.to_string()),
                        io::Error::from_raw_os_error,
                    );
                    // Whoever is gone need not know.
                    let _ = feed.0.send(Err(same));
                }
                return;
            }
        }
    }
}

/// Reads as much as there is room for: how much that was, and whether it was the end, or what kept it from going on.
fn fill(reader: &mut dyn Read, buffer: &mut [u8]) -> (usize, io::Result<bool>) {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => return (filled, Ok(true)),
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return (filled, Err(e)),
        }
    }
    (filled, Ok(false))
}

/// Uses a stream that another thread reads. `stop` is asked for where it is not used to its end: reading may wait for what
/// never comes.
///
/// # Errors
///
/// Those of using it.
pub(crate) fn reading<T>(
    reader: &mut (dyn Read + Send),
    stop: &Cancel,
    used: impl FnOnce(&mut dyn Read) -> Result<T>,
) -> Result<T> {
    let (feed, stream) = stream();
    std::thread::scope(|scope| {
        // It goes with this scope: who reads must see that nobody takes any more.
        let mut stream = stream;
        scope.spawn(move || forward(reader, vec![feed]));
        let done = used(&mut stream);
        if done.is_err() {
            stop.request();
        }
        done
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    /// Gives so many bytes, and then an error.
    struct Failing(usize);

    impl Read for Failing {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0 == 0 {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            let length = self.0.min(buffer.len()).min(70_000);
            buffer[..length].fill(7);
            self.0 -= length;
            Ok(length)
        }
    }

    #[test]
    fn everything_comes_before_the_error() {
        let (mut bytes, mut code) = (Vec::new(), None);
        reading(&mut Failing(CHUNK * 3 + 5), &Cancel::new(), |stream| {
            code = stream.read_to_end(&mut bytes).unwrap_err().raw_os_error();
            Ok(())
        })
        .unwrap();
        assert_eq!((bytes.len(), code), (CHUNK * 3 + 5, Some(libc::EIO)));
        assert!(bytes.iter().all(|&byte| byte == 7));
    }

    #[test]
    fn whoever_uses_it_may_end_early() {
        let mut endless = io::repeat(1);
        let ended: Result<()> = reading(&mut endless, &Cancel::new(), |stream| {
            stream.read_exact(&mut [0; 10]).unwrap();
            Err(Error::Interrupted)
        });
        assert!(matches!(ended, Err(Error::Interrupted)));
    }

    #[test]
    fn each_feed_gets_all_of_it() {
        let data: Vec<u8> = (0..CHUNK * 40).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let ((one, mut first), (other, second), (third, nobody)) = (stream(), stream(), stream());
        drop(nobody);
        std::thread::scope(|scope| {
            scope.spawn(|| forward(&mut &data[..], vec![one, third, other]));
            let whole = scope.spawn(|| second.chunks().map(|chunk| chunk.unwrap().len()).sum::<usize>());
            let mut read = Vec::new();
            first.read_to_end(&mut read).unwrap();
            assert!(read == data);
            assert_eq!(whole.join().unwrap(), data.len());
        });
    }
}
