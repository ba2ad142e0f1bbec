//! A blob on its way: fetched by a thread of its own, so that whoever reads it can be stopped, and unpacks what is here
//! while more comes.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use ureq::http::StatusCode;

use super::client::{Client, MANIFESTS};
use crate::Cancel;

/// Bytes of a piece, and how many of them wait at most.
const PIECE: usize = 256 << 10;
const PIECES: usize = 8;
/// How often a connection may break without a byte gained.
const TRIES: u32 = 3;

/// What comes of a blob.
pub(crate) struct Incoming {
    pieces: Receiver<Result<Vec<u8>, String>>,
    piece: Vec<u8>,
    given: usize,
    left: u64,
    cancel: Cancel,
}

impl Incoming {
    /// Begins to fetch a blob of `size` bytes.
    pub(crate) fn new(client: Arc<Client>, path: String, size: u64, cancel: Cancel) -> Incoming {
        let (sender, pieces) = sync_channel(PIECES);
        // It ends with the blob, or when nobody reads any more.
        std::thread::spawn(move || {
            if let Err(reason) = fetch(&client, &path, size, &sender) {
                let _ = sender.send(Err(reason));
            }
        });
        Incoming { pieces, piece: Vec::new(), given: 0, left: size, cancel }
    }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.given == self.piece.len() {
            if self.left == 0 || buffer.is_empty() {
                return Ok(0);
            }
            if self.cancel.requested() {
                return Err(io::Error::other("interrupted"));
            }
            match self.pieces.recv_timeout(Duration::from_millis(50)) {
                Ok(Ok(piece)) => {
                    self.left = self.left.saturating_sub(piece.len() as u64);
                    (self.piece, self.given) = (piece, 0);
                }
                Ok(Err(reason)) => return Err(io::Error::other(reason)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let count = buffer.len().min(self.piece.len() - self.given);
        buffer[..count].copy_from_slice(&self.piece[self.given..self.given + count]);
        self.given += count;
        Ok(count)
    }
}

fn fetch(
    client: &Client,
    path: &str,
    size: u64,
    sender: &SyncSender<Result<Vec<u8>, String>>,
) -> Result<(), String> {
    let (mut at, mut tries) = (0, 0);
    while at < size {
        let accept = if path.starts_with("manifests/") { MANIFESTS } else { "*/*" };
        let response = client.get(path, accept, at)?;
        // One that cannot begin in the middle begins at the start.
        let mut skip = if response.status() == StatusCode::PARTIAL_CONTENT { 0 } else { at };
        let before = at;
        let mut reader = response.into_body().into_reader();
        let broken = loop {
            let room = usize::try_from(size - at + skip).unwrap_or(PIECE).min(PIECE);
            if room == 0 {
                break None;
            }
            let mut piece = Vec::with_capacity(room);
            let read = reader.by_ref().take(room as u64).read_to_end(&mut piece);
            let broken = match read {
                Ok(_) if piece.len() < room => Some("the connection ended too early".to_owned()),
                Ok(_) => None,
                Err(e) => Some(e.to_string()),
            };
            let dropped = usize::try_from(skip).unwrap_or(piece.len()).min(piece.len());
            skip -= dropped as u64;
            piece.drain(..dropped);
            at += piece.len() as u64;
            if !piece.is_empty() && sender.send(Ok(piece)).is_err() {
                return Ok(());
            }
            if broken.is_some() {
                break broken;
            }
        };
        tries = if at > before { 0 } else { tries + 1 };
        if let Some(reason) = broken.filter(|_| tries >= TRIES) {
            return Err(format!("{path} cannot be fetched: {reason}"));
        }
    }
    Ok(())
}
