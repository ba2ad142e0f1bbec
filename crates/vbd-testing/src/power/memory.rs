//! A file in memory that is recorded, for what writes with calls that block.
#![allow(clippy::cast_possible_truncation, reason = "files of tests are small")]

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE};
use vbd_core::file::Change;

use super::Recording;
use super::crash::apply;

/// A file in memory. Calls fail from a chosen one on, as on storage that has gone.
pub struct MemFile {
    recording: Arc<Recording>,
    file: usize,
    state: Mutex<State>,
}

struct State {
    bytes: Vec<u8>,
    /// Changes that are still to succeed, and the error of those after.
    left: Option<(usize, i32)>,
}

impl MemFile {
    /// A file with this content, seen by `recording`.
    pub fn new(recording: &Arc<Recording>, content: Vec<u8>) -> Self {
        let file = recording.file(content.clone()).file;
        MemFile {
            recording: recording.clone(),
            file,
            state: Mutex::new(State { bytes: content, left: None }),
        }
    }

    /// Lets so many changes succeed; those after fail with this errno, and do nothing.
    pub fn fail_after(&self, changes: usize, errno: i32) {
        self.state().left = Some((changes, errno));
    }

    /// What it holds.
    pub fn content(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.state().bytes.len() as u64
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads from `offset` on: as many bytes as there are.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> usize {
        let state = self.state();
        let from = (offset.min(state.bytes.len() as u64)) as usize;
        let len = buffer.len().min(state.bytes.len() - from);
        buffer[..len].copy_from_slice(&state.bytes[from..from + len]);
        len
    }

    /// Writes all of `data`.
    ///
    /// # Errors
    /// The chosen one.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Change::Write { offset, data: data.to_vec(), durable: false })
    }

    /// Makes a hole, which reads as zeroes.
    ///
    /// # Errors
    /// The chosen one.
    pub fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(Change::Space { mode: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, len })
    }

    /// Gives it this length in bytes.
    ///
    /// # Errors
    /// The chosen one.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::Length(len))
    }

    /// Makes all that was done durable.
    ///
    /// # Errors
    /// The chosen one.
    pub fn sync(&self) -> io::Result<()> {
        self.change(Change::Sync)
    }

    fn change(&self, change: Change) -> io::Result<()> {
        let mut state = self.state();
        let number = self.recording.begun(self.file, change.clone());
        let failure = match &mut state.left {
            Some((0, errno)) => Some(*errno),
            Some((left, _)) => {
                *left -= 1;
                None
            }
            None => None,
        };
        if let Some(errno) = failure {
            self.recording.ended(number, -errno);
            return Err(io::Error::from_raw_os_error(errno));
        }
        apply(&mut state.bytes, &change, None);
        let written = if let Change::Write { data, .. } = &change { data.len() as i32 } else { 0 };
        self.recording.ended(number, written);
        Ok(())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
