//! The file that is checked, repaired or made larger while nobody uses it: a file, or memory in tests.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vbd_core::file::Backend;
use vbd_image::ReadAt;

/// Something that can be read and changed at an offset.
pub trait Storage: ReadAt {
    /// Its length in bytes.
    ///
    /// # Errors
    /// Those of asking.
    fn length(&self) -> io::Result<u64>;

    /// Writes all of the bytes at the offset, beyond the end too.
    ///
    /// # Errors
    /// Those of writing; some may have been written.
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Cuts it off, or lets it end in zeroes.
    ///
    /// # Errors
    /// Those of the storage.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes all that was done durable.
    ///
    /// # Errors
    /// Those of the storage; then nothing is known of what was done.
    fn sync(&self) -> io::Result<()>;
}

/// The file of a disk that nobody uses yet, or any more: its faults are injected, and whoever records it sees all of this.
impl Storage for Backend {
    fn length(&self) -> io::Result<u64> {
        Backend::length(self)
    }

    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        Backend::write_all_at(self, offset, bytes)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.set_length(len)
    }

    fn sync(&self) -> io::Result<()> {
        Backend::sync(self)
    }
}

impl Storage for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
}
