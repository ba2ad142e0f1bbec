//! References of many clusters at once: runs of clusters, each a part of a block of counts.

use std::collections::BTreeSet;
use std::ops::Range;

use vbd_core::memory::Buffer;
use vbd_core::{Error, ErrorKind, Result};

use super::super::image::Image;
use super::super::io::{Bytes, Io, Queue};
use super::super::map::PIECE;
use super::{State, bytes, corrupt};
use crate::format::RefcountWidth;

/// Adds clusters to a list of runs.
#[inline]
pub(in crate::live) fn add_run(runs: &mut Vec<Range<u64>>, clusters: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == clusters.start => last.end = clusters.end,
        _ if !clusters.is_empty() => runs.push(clusters),
        _ => {}
    }
}

impl State {
    /// Changes the counts of a run of clusters in one way, block by block. Where it cannot be done somewhere it is that
    /// cluster's number, and what was done before it stays.
    fn change(
        &mut self,
        run: Range<u64>,
        change: impl Fn(RefcountWidth, &mut [u8], Range<usize>) -> std::result::Result<(), usize>,
    ) -> std::result::Result<(), u64> {
        let (bits, width) = (self.layout.refcount_block_bits(), self.layout.refcount_width);
        let mut start = run.start;
        while start < run.end {
            let (number, first) = (start >> bits, start >> bits << bits);
            let end = run.end.min(first + (1 << bits));
            let part = bytes(start - first)..bytes(end - first);
            let Some(block) = self.blocks.get_mut(number) else { return Err(start) };
            change(width, &mut block.bytes, part.clone()).map_err(|index| first + index as u64)?;
            let piece = |index: usize| (index << width.order()) / 8 / PIECE;
            (piece(part.start)..=piece(part.end - 1)).for_each(|piece| block.dirty.mark(piece));
            self.dirty.insert(number);
            start = end;
        }
        Ok(())
    }

    /// Adds a reference to each cluster of a run, or to none of them: then the number of one that has none, or as many as
    /// there can be.
    fn raise(&mut self, run: Range<u64>) -> std::result::Result<(), u64> {
        let raised = self.change(run.clone(), RefcountWidth::raise);
        raised.inspect_err(|cluster| {
            // Whole blocks before the one that the cluster is in.
            let first = cluster >> self.layout.refcount_block_bits() << self.layout.refcount_block_bits();
            if first > run.start {
                self.lower(run.start..first);
            }
        })
    }

    /// Takes a reference away from each cluster of a run that has one.
    fn lower(&mut self, run: Range<u64>) {
        let mut start = run.start;
        while let Err(cluster) = self.change(start..run.end, |width, block, part| width.lower(block, part, 1))
        {
            // Up to the block that this one is in all is done.
            let first = cluster >> self.layout.refcount_block_bits() << self.layout.refcount_block_bits();
            for cluster in first.max(start)..cluster {
                self.set(cluster, self.count(cluster) - 1);
            }
            start = cluster + 1;
        }
    }

    /// Takes a reference away from each cluster of a run that has another one. Those that have not are added to `last`.
    fn lower_shared(&mut self, run: Range<u64>, last: &mut Vec<u64>) {
        let mut start = run.start;
        while let Err(cluster) = self.change(start..run.end, |width, block, part| width.lower(block, part, 2))
        {
            let first = cluster >> self.layout.refcount_block_bits() << self.layout.refcount_block_bits();
            for cluster in first.max(start)..cluster {
                self.set(cluster, self.count(cluster) - 1);
            }
            last.push(cluster);
            start = cluster + 1;
        }
    }
}

impl Image {
    /// Reads the blocks that the counts of these clusters are in, as far as there are some.
    pub(in crate::live) async fn load_counts(&self, io: &Io, runs: &[Range<u64>]) -> Result<()> {
        let bits = self.layout.refcount_block_bits();
        let mut missing = BTreeSet::new();
        {
            let state = self.counts.state();
            for run in runs {
                let blocks = run.start >> bits..=(run.end - 1) >> bits;
                missing.extend(blocks.filter(|number| state.blocks.get(*number).is_none()));
            }
        }
        self.load_blocks(io, missing.into_iter()).await
    }

    /// Reads all blocks of counts that there are.
    pub(in crate::live) async fn load_all_counts(&self, io: &Io) -> Result<()> {
        let blocks = self.counts.state().table.len() as u64;
        self.load_blocks(io, 0..blocks).await
    }

    async fn load_blocks(&self, io: &Io, numbers: impl Iterator<Item = u64>) -> Result<()> {
        let len = self.layout.cluster_len();
        let mut reads = Queue::default();
        for number in numbers {
            let Some(offset) = self.missing_block(io, number)? else { continue };
            while !reads.has_room(len) {
                self.take_block(&mut reads).await?;
            }
            let read = io.start_read(offset, Buffer::new(len));
            reads.push(len, async move { Ok((number, offset, read.await?)) });
        }
        while self.take_block(&mut reads).await? {}
        Ok(())
    }

    /// Takes the first block that is being read; false where there is none.
    async fn take_block(&self, reads: &mut Queue<(u64, u64, Bytes)>) -> Result<bool> {
        let Some(read) = reads.next().await else { return Ok(false) };
        let (number, offset, read) = read?;
        self.add_block(number, offset, read.to_vec());
        Ok(true)
    }

    /// Adds a reference to each of these clusters, all of which have some.
    ///
    /// # Errors
    /// A count would be more than it can say, and nothing was changed; or what reading counts meets.
    pub(in crate::live) async fn refer(&self, io: &Io, runs: &[Range<u64>]) -> Result<()> {
        self.load_counts(io, runs).await?;
        let mut state = self.counts.state();
        for (done, run) in runs.iter().enumerate() {
            let Err(cluster) = state.raise(run.clone()) else { continue };
            runs[..done].iter().for_each(|run| state.lower(run.clone()));
            let count = state.count(cluster);
            if count == 0 {
                return Err(corrupt(format!(
                    "cluster {cluster:#x} is in use, and its refcount is 0; check and repair the image"
                )));
            }
            let message = format!(
                "a cluster has {count} references, the most that {} bits can say; delete snapshots, or convert to an image with wider refcounts",
                self.layout.refcount_width.bits()
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(())
    }

    /// Adds a reference to a cluster that has some.
    ///
    /// # Errors
    /// As [`refer`](Self::refer).
    pub(in crate::live) async fn refer_to(&self, io: &Io, cluster: u64) -> Result<()> {
        self.refer(io, std::slice::from_ref(&(cluster..cluster + 1))).await
    }

    /// Takes a reference away from each of these clusters, all of which keep some.
    pub(in crate::live) async fn unrefer(&self, io: &Io, runs: &[Range<u64>]) -> Result<()> {
        self.load_counts(io, runs).await?;
        let mut state = self.counts.state();
        runs.iter().for_each(|run| state.lower(run.clone()));
        Ok(())
    }

    /// Takes a reference away from each of these clusters that has another one: those that have not.
    pub(in crate::live) async fn unrefer_shared(&self, io: &Io, runs: &[Range<u64>]) -> Result<Vec<u64>> {
        self.load_counts(io, runs).await?;
        let mut state = self.counts.state();
        let mut last = Vec::new();
        runs.iter().for_each(|run| state.lower_shared(run.clone(), &mut last));
        Ok(last)
    }
}
