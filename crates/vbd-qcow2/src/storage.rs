//! The file that an image is in, for whatever looks at it or changes it while no guest uses it: a file, or memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vbd_core::file::Backend;
use vbd_image::ReadAt;

/// Something of a known length that can be read at an offset.
pub trait Source: ReadAt {
    /// The length in bytes.
    ///
    /// # Errors
    ///
    /// Those of asking the storage.
    fn length(&self) -> io::Result<u64>;
}

/// Something that can be changed as well. What was written is durable when a later [`Storage::sync`] has returned.
pub trait Storage: Source {
    /// Writes all of the bytes at the offset; what lies between the end and the offset reads as zeros.
    ///
    /// # Errors
    ///
    /// Those of writing. Some of the bytes may have been written.
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes durable what was written, the length with it.
    ///
    /// # Errors
    ///
    /// Those of the storage; then nothing is known of what was written since the last one.
    fn sync(&self) -> io::Result<()>;

    /// Cuts the file off, or lets it end in zeros.
    ///
    /// # Errors
    ///
    /// Those of the storage.
    fn set_len(&self, length: u64) -> io::Result<()>;

    /// Makes a range read as zeros, and gives back its room where that can be done. The length stays.
    ///
    /// # Errors
    ///
    /// Those of the storage.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()>;
}

/// Reads exactly the buffer's length.
///
/// # Errors
///
/// Those of reading; [`io::ErrorKind::UnexpectedEof`] where the source ends before.
pub fn read_exact_at<S: ReadAt + ?Sized>(source: &S, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    match source.fill_at(offset, buffer)? {
        read if read == buffer.len() => Ok(()),
        read => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{} bytes at {offset} were wanted, and the file ends after {read} of them", buffer.len()),
        )),
    }
}

/// Reads a range of which what is beyond the end reads as zeros.
///
/// # Errors
///
/// Those of reading.
pub fn read_padded_at<S: ReadAt + ?Sized>(source: &S, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let read = source.fill_at(offset, buffer)?;
    buffer[read..].fill(0);
    Ok(())
}

impl<S: Source + ?Sized> Source for &S {
    fn length(&self) -> io::Result<u64> {
        (**self).length()
    }
}

impl<S: Storage + ?Sized> Storage for &S {
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        (**self).write_all_at(offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        (**self).sync()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        (**self).set_len(length)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        (**self).punch(offset, length)
    }
}

impl Source for File {
    fn length(&self) -> io::Result<u64> {
        // A block device has no length in its metadata; the end that can be sought is that of both.
        rustix::fs::seek(self, rustix::fs::SeekFrom::End(0)).map_err(io::Error::from)
    }
}

impl Storage for File {
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        File::set_len(self, length)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.saturating_add(length).min(Source::length(self)?);
        if offset >= end {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(self, flags, offset, end - offset) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => write_zeros(self, offset, end),
            other => other.map_err(io::Error::from),
        }
    }
}

/// For filesystems without holes.
fn write_zeros(file: &File, mut offset: u64, end: u64) -> io::Result<()> {
    let zeros = [0; 64 << 10];
    while offset < end {
        let length = usize::try_from(end - offset).unwrap_or(zeros.len()).min(zeros.len());
        FileExt::write_all_at(file, &zeros[..length], offset)?;
        offset += length as u64;
    }
    Ok(())
}

/// The file of a disk that nobody uses yet, or any more: its faults are injected, and whoever records it sees all of this.
impl Source for Backend {
    fn length(&self) -> io::Result<u64> {
        Backend::length(self)
    }
}

impl Storage for Backend {
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        Backend::write_all_at(self, offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        Backend::sync(self)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.set_length(length)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        Backend::punch(self, offset, length)
    }
}

impl Source for [u8] {
    fn length(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
}

/// Storage in memory, for tests and fuzzers: it grows up to a limit, and then has no room.
#[derive(Debug)]
pub struct Memory {
    bytes: Mutex<Vec<u8>>,
    limit: usize,
}

impl Memory {
    /// Storage that holds these bytes, and `limit` at most.
    pub fn new(bytes: Vec<u8>, limit: usize) -> Self {
        Memory { bytes: Mutex::new(bytes), limit }
    }

    /// What is in it.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of what is in it.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The end of a range as an index, if there is room for it.
    fn end(&self, offset: u64, length: u64) -> io::Result<usize> {
        let end = offset.checked_add(length).and_then(|end| usize::try_from(end).ok());
        end.filter(|end| *end <= self.limit).ok_or_else(|| io::ErrorKind::StorageFull.into())
    }
}

impl ReadAt for Memory {
    fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.lock().fill_at(offset, buffer)
    }
}

impl Source for Memory {
    fn length(&self) -> io::Result<u64> {
        Ok(self.lock().len() as u64)
    }
}

impl Storage for Memory {
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = self.end(offset, bytes.len() as u64)?;
        let mut all = self.lock();
        if all.len() < end {
            all.resize(end, 0);
        }
        all[end - bytes.len()..end].copy_from_slice(bytes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let end = self.end(0, length)?;
        self.lock().resize(end, 0);
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut all = self.lock();
        let inside = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(all.len());
        let (start, end) = (inside(offset), inside(offset.saturating_add(length)));
        all[start..end].fill(0);
        Ok(())
    }
}
