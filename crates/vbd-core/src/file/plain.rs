//! Work on a file by calls that block, while no queue has anything under way: when a disk is opened and closed.
//!
//! They go the same way as requests: faults are asked, and whoever records the file sees them.

use std::io;
use std::os::fd::AsFd;

use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE};
use vbd_ring::{IoVec, Op, execute};

use super::faults::Fault;
use super::{Backend, Change};

/// Zeroes that are written at once.
const ZEROES: usize = 64 << 10;

impl Backend {
    /// The file's length in bytes, as it is now.
    ///
    /// # Errors
    /// Those of asking.
    pub fn length(&self) -> io::Result<u64> {
        self.file_len()
    }

    /// Fills the buffer from this offset (bytes) on: with less at the file's end only.
    ///
    /// # Errors
    /// Those of reading.
    pub fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            let piece = &mut buffer[done..];
            let piece = IoVec { iov_base: piece.as_mut_ptr().cast(), iov_len: piece.len() };
            let offset = offset.saturating_add(done as u64);
            if i64::try_from(offset).is_err() {
                break;
            }
            // SAFETY: the piece is a part of the buffer, which is borrowed for longer.
            match unsafe { self.perform(&Op::Read { iov: &raw const piece, count: 1, offset }) }? {
                0 => break,
                read => done += read,
            }
        }
        Ok(done)
    }

    /// Writes all of the bytes at this offset (bytes), beyond the end too.
    ///
    /// # Errors
    /// Those of writing; some may have been written.
    pub fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let piece =
                IoVec { iov_base: bytes[done..].as_ptr().cast_mut().cast(), iov_len: bytes.len() - done };
            let offset = offset.saturating_add(done as u64);
            let write = Op::Write { iov: &raw const piece, count: 1, offset, dsync: false };
            // SAFETY: the piece is a part of the bytes, which are borrowed for longer, and are only read.
            match unsafe { self.perform(&write) }? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => done += written,
            }
        }
        Ok(())
    }

    /// Makes what was written durable, and the length.
    ///
    /// # Errors
    /// Those of the storage; then nothing is known of what was written.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: there are no pointers.
        let result = unsafe { self.perform(&Op::Sync) };
        if result.is_err() {
            self.flush_failed.store(true, std::sync::atomic::Ordering::SeqCst);
        }
        result.map(drop)
    }

    /// Cuts the file off at this length (bytes, above 0), or lets it end in zeroes.
    ///
    /// # Errors
    /// Those of the filesystem.
    pub fn set_length(&self, len: u64) -> io::Result<()> {
        let seen = self.begun(|| Change::Length(len));
        let result = rustix::fs::ftruncate(&self.buffered, len);
        self.ended(seen, result.map_or_else(|error| -error.raw_os_error(), |()| 0));
        result?;
        self.set_size(len);
        Ok(())
    }

    /// Makes a range (bytes) read as zeroes, and gives its space back where that can be done. The length stays.
    ///
    /// # Errors
    /// Those of the storage.
    pub fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len).min(self.file_len()?);
        if offset >= end {
            return Ok(());
        }
        let mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
        // SAFETY: there are no pointers.
        match unsafe { self.perform(&Op::Fallocate { mode, offset, len: end - offset }) } {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                // For filesystems without holes.
                let zeroes = [0; ZEROES];
                let mut at = offset;
                while at < end {
                    let len = usize::try_from(end - at).unwrap_or(ZEROES).min(ZEROES);
                    self.write_all_at(at, &zeroes[..len])?;
                    at += len as u64;
                }
                Ok(())
            }
            result => result.map(drop),
        }
    }

    /// # Safety
    /// The pointers in `op` are valid, and what a read fills is nobody else's.
    unsafe fn perform(&self, op: &Op) -> io::Result<usize> {
        // SAFETY: by this function's own contract.
        let seen = unsafe { self.begun_op(op) };
        let fault = self.faults.as_ref().and_then(|faults| faults.before(op));
        let result = match (fault, op) {
            (Some(Fault::Fail(errno)), _) => -errno,
            (Some(Fault::Short(bytes)), Op::Read { iov, offset, .. } | Op::Write { iov, offset, .. }) => {
                // SAFETY: by this function's own contract; there is one piece.
                let piece = unsafe { **iov };
                let piece = IoVec { iov_len: piece.iov_len.min(bytes), ..piece };
                let iov = &raw const piece;
                let short = match op {
                    Op::Read { .. } => Op::Read { iov, count: 1, offset: *offset },
                    _ => Op::Write { iov, count: 1, offset: *offset, dsync: false },
                };
                // SAFETY: a part of a valid piece.
                unsafe { execute(self.buffered.as_fd(), &short) }
            }
            // SAFETY: by this function's own contract.
            _ => unsafe { execute(self.buffered.as_fd(), op) },
        };
        self.ended(seen, result);
        usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
    }
}
