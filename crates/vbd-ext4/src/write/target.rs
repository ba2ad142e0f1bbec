//! The file, or the part of it, that the filesystem is written into.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::error::{Result, WriteError};
use crate::format::Block;

/// Bytes that adjacent writes are gathered up to.
const GATHER: usize = 1 << 20;

/// Writes whole blocks at their places, adjacent ones together.
#[derive(Debug)]
pub(crate) struct Target {
    file: File,
    /// Where the filesystem begins in the file, in bytes.
    offset: u64,
    block_size: u32,
    gathered: Vec<u8>,
    /// The block that the gathered bytes begin at.
    at: Block,
}

impl Target {
    /// A filesystem of so many bytes at an offset of the file, which is made longer when it is shorter.
    pub(crate) fn new(file: File, offset: u64, size: u64, block_size: u32) -> Result<Target> {
        let end = offset.saturating_add(size);
        let extend = |source: io::Error| WriteError::Extend { size: end, source };
        let metadata = file.metadata().map_err(extend)?;
        if metadata.is_file() && metadata.len() < end {
            file.set_len(end).map_err(extend)?;
        }
        Ok(Target { file, offset, block_size, gathered: Vec::new(), at: 0 })
    }

    /// Where a block begins in the file, in bytes.
    pub(crate) fn position(&self, block: Block) -> u64 {
        self.offset + block * u64::from(self.block_size)
    }

    /// Writes blocks, perhaps later; see [`Target::flush`].
    pub(crate) fn write(&mut self, block: Block, bytes: &[u8]) -> Result<()> {
        let end = self.at + (self.gathered.len() / self.block_size as usize) as u64;
        if block != end || self.gathered.len() + bytes.len() > GATHER {
            self.flush()?;
            self.at = block;
        }
        if bytes.len() >= GATHER {
            return self.write_now(block, bytes);
        }
        self.gathered.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes what is gathered.
    pub(crate) fn flush(&mut self) -> Result<()> {
        let gathered = std::mem::take(&mut self.gathered);
        if !gathered.is_empty() {
            self.write_now(self.at, &gathered)?;
        }
        self.gathered = gathered;
        self.gathered.clear();
        Ok(())
    }

    /// Writes blocks at once.
    pub(crate) fn write_now(&self, block: Block, bytes: &[u8]) -> Result<()> {
        self.write_within(block, 0, bytes)
    }

    /// Writes bytes at an offset from a block's beginning at once.
    pub(crate) fn write_within(&self, block: Block, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all_at(bytes, self.position(block) + offset)
            .map_err(|source| WriteError::Io { block, source })
    }
}
