//! A disk that others opened, in a format that is theirs to know.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::{Deref, Range};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vbd_core::{Client, Error, ErrorKind};
use vbd_ext4::edit::Storage;
use vbd_ext4::read::Source;

use super::device::Device;

/// Bytes that are read at once at least: a filesystem's structures lie together, and each request to a disk has its price.
const PIECE: u64 = 64 << 10;
/// Pieces that are kept.
const MOST: usize = 64;

/// A disk behind a [`Client`], or behind whatever holds one open. Nobody else changes it meanwhile, as its lease has it.
pub struct Opened<C> {
    client: C,
    file: PathBuf,
    pieces: Mutex<Pieces>,
}

/// What was read last, by its offset.
#[derive(Default)]
struct Pieces {
    kept: BTreeMap<u64, Vec<u8>>,
    /// The oldest first.
    order: VecDeque<u64>,
}

impl Pieces {
    fn forget(&mut self, range: &Range<u64>) {
        let first = range.start / PIECE * PIECE;
        let gone: Vec<u64> = self.kept.range(first..range.end.max(first)).map(|(start, _)| *start).collect();
        for start in gone {
            self.kept.remove(&start);
        }
        let kept = &self.kept;
        self.order.retain(|start| kept.contains_key(start));
    }

    fn keep(&mut self, start: u64, bytes: Vec<u8>) {
        while self.order.len() >= MOST {
            let Some(oldest) = self.order.pop_front() else { break };
            self.kept.remove(&oldest);
        }
        self.order.push_back(start);
        self.kept.insert(start, bytes);
    }
}

fn failed(error: Error) -> io::Error {
    let kind = match error.kind() {
        ErrorKind::NoSpace => io::ErrorKind::StorageFull,
        ErrorKind::Unsupported => io::ErrorKind::Unsupported,
        ErrorKind::ReadOnly => io::ErrorKind::PermissionDenied,
        ErrorKind::OutOfRange => io::ErrorKind::UnexpectedEof,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error)
}

impl<C: Deref<Target = Client> + Send + Sync> Opened<C> {
    /// The disk of this client, which is kept in `file`.
    pub fn new(client: C, file: &Path) -> Opened<C> {
        Opened { client, file: file.to_owned(), pieces: Mutex::default() }
    }

    /// Whoever writes has the pieces meanwhile, so that none is kept that was read before.
    fn pieces(&self) -> MutexGuard<'_, Pieces> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(
        &self,
        range: Range<u64>,
        change: impl FnOnce(&Client) -> vbd_core::Result<()>,
    ) -> io::Result<()> {
        if range.end > self.size() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut pieces = self.pieces();
        pieces.forget(&range);
        change(&self.client).map_err(failed)
    }
}

impl<C: Deref<Target = Client> + Send + Sync> Source for Opened<C> {
    fn size(&self) -> u64 {
        self.client.size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let size = self.size();
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= size);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        if buffer.len() as u64 >= PIECE {
            return self.client.read_at(offset, buffer).map_err(failed);
        }
        let mut pieces = self.pieces();
        let (mut at, mut rest) = (offset, buffer);
        while at < end {
            let start = at / PIECE * PIECE;
            if !pieces.kept.contains_key(&start) {
                let length = usize::try_from(PIECE.min(size - start)).unwrap_or(0);
                let mut bytes = vec![0; length];
                self.client.read_at(start, &mut bytes).map_err(failed)?;
                pieces.keep(start, bytes);
            }
            let piece = pieces.kept.get(&start).map(Vec::as_slice).unwrap_or_default();
            let from = usize::try_from(at - start).unwrap_or(0);
            let length = (piece.len() - from).min(rest.len());
            let (now, later) = rest.split_at_mut(length);
            now.copy_from_slice(&piece[from..from + length]);
            (at, rest) = (at + length as u64, later);
        }
        Ok(())
    }
}

impl<C: Deref<Target = Client> + Send + Sync> Storage for Opened<C> {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.change(offset..end, |client| client.write_at(offset, bytes))
    }

    fn sync(&self) -> io::Result<()> {
        self.client.flush().map_err(failed)
    }
}

impl<C: Deref<Target = Client> + Send + Sync> Device for Opened<C> {
    fn grow(&self, size: u64) -> io::Result<()> {
        let mut pieces = self.pieces();
        // The last one ends where the disk did.
        *pieces = Pieces::default();
        self.client.session().grow(size).map_err(failed)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.change(range.clone(), |client| client.zero(range.start, range.end - range.start, true))
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        if !self.client.session().capabilities().discard {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.change(range.clone(), |client| client.discard(range.start, range.end - range.start))
    }

    fn unit(&self) -> io::Result<u64> {
        Ok(u64::from(self.client.session().geometry().discard_granularity).max(512))
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }
}
