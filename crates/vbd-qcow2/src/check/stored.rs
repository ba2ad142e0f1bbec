//! The counts that the image holds.

use std::collections::HashMap;

use super::image::Image;
use super::{Error, Result};
use crate::format::RefcountWidth;
use crate::storage::{Source, Storage};

/// Bytes of refcount blocks that are kept in memory.
const CACHE: usize = 64 << 20;

/// Refcount blocks, read when they are needed.
pub(super) struct Stored<'a, 'b, S: Source + ?Sized> {
    image: &'a Image<'b, S>,
    width: RefcountWidth,
    /// Where they are.
    pub(super) blocks: Vec<Option<u64>>,
    cache: HashMap<u64, Vec<u8>>,
}

impl<'a, 'b, S: Source + ?Sized> Stored<'a, 'b, S> {
    pub(super) fn new(image: &'a Image<'b, S>) -> Self {
        Stored { image, width: image.layout.refcount_width, blocks: image.blocks(), cache: HashMap::new() }
    }

    /// The block with an index, if there is a usable one.
    pub(super) fn block(&mut self, index: u64) -> Result<Option<&[u8]>> {
        let offset = usize::try_from(index).ok().and_then(|index| self.blocks.get(index).copied().flatten());
        let Some(offset) = offset else { return Ok(None) };
        if !self.cache.contains_key(&index) {
            let length = self.image.layout.cluster_len();
            if (self.cache.len() + 1) * length > CACHE {
                self.cache.clear();
            }
            let mut block = vec![0; length];
            self.image.read(offset, &mut block)?;
            self.cache.insert(index, block);
        }
        Ok(self.cache.get(&index).map(|block| &block[..]))
    }

    /// The count of a cluster; 0 where there is no block for it.
    pub(super) fn get(&mut self, cluster: u64) -> Result<u64> {
        let (width, bits) = (self.width, self.image.layout.refcount_block_bits());
        let index = usize::try_from(cluster & ((1 << bits) - 1)).expect("an index within a block");
        Ok(self.block(cluster >> bits)?.map_or(0, |block| width.get(block, index)))
    }
}

impl<S: Storage + ?Sized> Stored<'_, '_, S> {
    /// Writes a block.
    pub(super) fn put(&mut self, index: u64, block: &[u8]) -> Result<()> {
        let offset = usize::try_from(index).ok().and_then(|index| self.blocks.get(index).copied().flatten());
        let Some(offset) = offset else { return Ok(()) };
        self.cache.remove(&index);
        self.image
            .source
            .write_all_at(offset, block)
            .map_err(|error| Error::io(format!("write the refcount block at {offset}"), error))
    }
}
