//! Clusters for what is written while nobody serves the image: taken and given back in the refcount blocks of the file.

use super::{Error, Result};
use crate::check::{self, rebuild_with_room};
use crate::format::{Header, Layout, be64};
use crate::storage::{Storage, read_padded_at};

/// The refcounts of an image that nobody else uses.
pub(crate) struct Space<'a, S: Storage + ?Sized> {
    storage: &'a S,
    layout: Layout,
    table_offset: u64,
    /// Where the refcount blocks are; 0 where there is none.
    table: Vec<u64>,
    /// The block that is looked at.
    block: Option<(usize, Vec<u8>)>,
    /// Where to look first: clusters before this one were found in use.
    hint: u64,
}

impl<'a, S: Storage + ?Sized> Space<'a, S> {
    pub(crate) fn new(storage: &'a S, header: &Header) -> Result<Self> {
        let layout = header.layout();
        let mut bytes = vec![0; usize::try_from(header.refcount_table_bytes()).expect("within the limit")];
        read_padded_at(storage, header.refcount_table_offset, &mut bytes)
            .map_err(Error::io("read the refcount table"))?;
        let length = storage.length().map_err(Error::io("ask for the length of the file"))?;
        let mut table = Vec::with_capacity(bytes.len() / 8);
        for entry in bytes.chunks_exact(8) {
            let offset = be64(entry, 0);
            if !layout.is_aligned(offset) || offset >= length.max(1) {
                let message = format!(
                    "the refcount table leads to {offset:#x}, where no block can be; repair the image"
                );
                return Err(Error::Refused(message));
            }
            table.push(offset);
        }
        let table_offset = header.refcount_table_offset;
        Ok(Space { storage, layout, table_offset, table, block: None, hint: 0 })
    }

    fn load(&mut self, index: usize) -> Result<Option<&mut Vec<u8>>> {
        let Some(offset) = self.table.get(index).copied().filter(|offset| *offset != 0) else {
            return Ok(None);
        };
        if self.block.as_ref().is_none_or(|(loaded, _)| *loaded != index) {
            let mut block = vec![0; self.layout.cluster_len()];
            read_padded_at(self.storage, offset, &mut block).map_err(Error::io("read a refcount block"))?;
            self.block = Some((index, block));
        }
        Ok(self.block.as_mut().map(|(_, block)| block))
    }

    /// The block of a cluster and its index in it.
    fn place(&self, cluster: u64) -> (usize, usize) {
        let bits = self.layout.refcount_block_bits();
        let block = usize::try_from(cluster >> bits).unwrap_or(usize::MAX);
        (block, usize::try_from(cluster & ((1 << bits) - 1)).expect("an index within a block"))
    }

    fn count(&mut self, cluster: u64) -> Result<Option<u64>> {
        let (block, index) = self.place(cluster);
        let width = self.layout.refcount_width;
        Ok(self.load(block)?.map(|bytes| width.get(bytes, index)))
    }

    fn set(&mut self, cluster: u64, count: u64) -> Result<()> {
        let (block, index) = self.place(cluster);
        let width = self.layout.refcount_width;
        let Some(bytes) = self.load(block)? else { return Ok(()) };
        width.set(bytes, index, count);
        // The bytes that hold it: whole ones, also where a count is less.
        let bit = index << width.order();
        let range = bit / 8..(bit + width.bits() as usize).div_ceil(8);
        let (start, piece) = (range.start as u64, bytes[range].to_vec());
        let at = self.table[block] + start;
        self.storage.write_all_at(at, &piece).map_err(Error::io("write a refcount"))
    }

    /// Takes clusters that lie one behind the other, and gives the offset of the first. Their counts are written, and not
    /// yet durable.
    pub(crate) fn take(&mut self, clusters: u64) -> Result<u64> {
        let all = (self.table.len() as u64) << self.layout.refcount_block_bits();
        let (mut run, mut cluster) = (0, self.hint);
        while cluster < all {
            match self.count(cluster)? {
                Some(0) => run += 1,
                Some(_) => {
                    run = 0;
                    if clusters == 1 {
                        self.hint = cluster + 1;
                    }
                }
                None => {
                    self.add_block(cluster >> self.layout.refcount_block_bits())?;
                    continue;
                }
            }
            cluster += 1;
            if run == clusters {
                let first = cluster - clusters;
                for cluster in first..cluster {
                    self.set(cluster, 1)?;
                }
                return Ok(first << self.layout.cluster_bits);
            }
        }
        Err(Error::NoTable)
    }

    /// Makes a refcount block that was missing. Nothing that it counts is in use, so it goes there itself.
    fn add_block(&mut self, index: u64) -> Result<()> {
        let first = index << self.layout.refcount_block_bits();
        let offset = first << self.layout.cluster_bits;
        let mut block = vec![0; self.layout.cluster_len()];
        self.layout.refcount_width.set(&mut block, 0, 1);
        let io = Error::io("write a refcount block");
        self.storage.write_all_at(offset, &block).and_then(|()| self.storage.sync()).map_err(io)?;
        let entry = offset.to_be_bytes();
        let io = Error::io("write the refcount table");
        let at = self.table_offset + index * 8;
        self.storage.write_all_at(at, &entry).and_then(|()| self.storage.sync()).map_err(io)?;
        let index = usize::try_from(index).expect("an index of the table");
        self.table[index] = offset;
        self.block = Some((index, block));
        Ok(())
    }

    /// Takes references to a cluster away; whether that was the last. A count that is lower than that is left for a check.
    pub(crate) fn lower(&mut self, cluster: u64, times: u64) -> Result<bool> {
        match self.count(cluster)? {
            Some(count) if count >= times && count > 0 => {
                self.set(cluster, count - times)?;
                Ok(count == times)
            }
            _ => Ok(false),
        }
    }

    /// The cluster behind the last one that is in use.
    pub(crate) fn end(&mut self) -> Result<u64> {
        let bits = self.layout.refcount_block_bits();
        for block in (0..self.table.len()).rev() {
            let width = self.layout.refcount_width;
            let Some(bytes) = self.load(block)? else { continue };
            let last = (0..1usize << bits).rev().find(|index| width.get(bytes, *index) > 0);
            if let Some(last) = last {
                return Ok(((block as u64) << bits) + last as u64 + 1);
            }
        }
        Ok(0)
    }

    /// Gives back the clusters of a range, if each is used once: where a count says otherwise it is for a check to say what
    /// is right.
    pub(crate) fn give_back(&mut self, offset: u64, length: u64) -> Result<()> {
        let bits = self.layout.cluster_bits;
        for cluster in offset >> bits..offset.saturating_add(length).div_ceil(1 << bits) {
            if self.count(cluster)? == Some(1) {
                self.set(cluster, 0)?;
            }
        }
        Ok(())
    }
}

/// Makes room in the refcount table for more blocks, by a new one.
pub(crate) fn grow_table<S: Storage + ?Sized>(storage: &S) -> Result<()> {
    rebuild_with_room(storage, &check::Options::default()).map_err(|error| Error::Refused(error.to_string()))
}
