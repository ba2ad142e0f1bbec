//! What a filesystem that is changed is in.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::{EditError, Editor, Result};
use crate::format::Block;
use crate::read::{Part, Source, Window};

/// Something that holds a filesystem and can be written, too.
pub trait Storage: Source {
    /// Writes all bytes from that one on.
    ///
    /// # Errors
    ///
    /// Those of writing; a place beyond the end.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Returns when everything that was written is durable.
    ///
    /// # Errors
    ///
    /// Those of the system. After one, nothing that was written since the last success counts as written.
    fn sync(&self) -> io::Result<()>;
}

impl Storage for Part {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.size()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.file.write_all_at(bytes, self.start + offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

impl<S: Storage> Storage for Window<S> {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.of.write_all_at(bytes, self.place(offset, bytes.len())?)
    }

    fn sync(&self) -> io::Result<()> {
        self.of.sync()
    }
}

/// Storage that several use.
impl<S: Storage + ?Sized> Storage for Arc<S> {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        (**self).write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        (**self).sync()
    }
}

/// The same storage for reader and editor.
pub(super) struct Shared(pub(super) Arc<dyn Storage>);

impl Source for Shared {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }
}

/// Bytes of one write at most.
const LARGE: usize = 4 << 20;

impl Editor {
    /// Writes at a byte of the filesystem.
    pub(super) fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let length = bytes.len();
        self.storage.write_all_at(bytes, offset).map_err(|error| EditError::Io { offset, length, error })
    }

    /// Waits until what was written is durable.
    pub(super) fn sync(&self) -> Result<()> {
        self.storage.sync().map_err(EditError::Sync)
    }

    /// Writes blocks, those that lie behind one another with one call.
    pub(super) fn write_blocks<'a>(&self, blocks: impl IntoIterator<Item = (Block, &'a [u8])>) -> Result<()> {
        let size = u64::from(self.block_size());
        let (mut first, mut next) = (0, 0);
        let mut gathered: Vec<u8> = Vec::new();
        for (block, bytes) in blocks {
            if !gathered.is_empty() && (block != next || gathered.len() >= LARGE) {
                self.write_at(&gathered, first * size)?;
                gathered.clear();
            }
            if gathered.is_empty() {
                first = block;
            }
            gathered.extend_from_slice(bytes);
            next = block + 1;
        }
        if gathered.is_empty() { Ok(()) } else { self.write_at(&gathered, first * size) }
    }
}
