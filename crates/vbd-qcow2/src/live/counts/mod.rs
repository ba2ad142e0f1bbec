//! Reference counts, and which clusters of the file are free.
//!
//! Blocks of counts are in memory once they were needed. Free clusters wait in a pool of runs, all of whose blocks are in
//! memory, so that taking some is a matter of a short lock; the pool is filled ([`refill`]) from what was given up, from
//! blocks that nobody has looked at yet, and by growing the file.

mod blocks;
mod cut;
mod many;
mod reclaim;
mod refill;
mod write;

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, PoisonError};

use vbd_core::Result;
use vbd_core::range_lock::RangeLocks;
use vbd_ring::sync::{Mutex, MutexGuard};

use super::image::Image;
use super::io::{Io, bytes, corrupt};
use super::map::{PIECE, Pieces};
use super::set::ClusterSet;
use crate::format::Layout;
use blocks::{Block, Blocks};

pub(super) use many::add_run;
pub(super) use reclaim::Freed;

/// Clusters one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The number of the first: its offset divided by the size of a cluster.
    pub(super) start: u64,
    /// How many.
    pub(super) count: u64,
    /// They read as zeroes.
    pub(super) zeroed: bool,
}

/// The counts of an image.
pub(super) struct Counts {
    state: Mutex<State>,
    /// Held by whoever fills the pool.
    filling: Arc<RangeLocks>,
    /// Held by whoever writes blocks: two writes of one piece at once might land in the wrong order.
    writing: Arc<RangeLocks>,
}

pub(super) struct State {
    layout: Layout,
    /// The refcount table: where each block is, or 0.
    pub(super) table: Vec<u64>,
    pub(super) table_offset: u64,
    blocks: Blocks,
    dirty: BTreeSet<u64>,
    pool: VecDeque<Run>,
    /// The end of what is used or in the pool, in clusters. Not known before the pool is filled first.
    end: Option<u64>,
    /// Of the clusters below `known`, which the file had when it was opened, those in blocks from this one on may be
    /// free without being in the pool.
    scanned: u64,
    known: u64,
    /// Clusters that tables are in. None of them may be guest data, or be given out.
    pub(super) metadata: ClusterSet,
}

impl State {
    /// The end of what is used or in the pool, in clusters, where that was found out.
    pub(super) fn end(&self) -> Option<u64> {
        self.end
    }

    /// Whether the count of a cluster can be told and changed now.
    fn is_loaded(&self, cluster: u64) -> bool {
        self.blocks.get(cluster >> self.layout.refcount_block_bits()).is_some()
    }

    /// The count of a cluster. One without a block has none.
    fn count(&self, cluster: u64) -> u64 {
        let bits = self.layout.refcount_block_bits();
        let block = self.blocks.get(cluster >> bits);
        block.map_or(0, |block| {
            self.layout.refcount_width.get(&block.bytes, bytes(cluster & ((1 << bits) - 1)))
        })
    }

    /// Whether a cluster has one reference.
    #[inline]
    pub(super) fn is_alone(&self, cluster: u64) -> bool {
        self.count(cluster) == 1
    }

    /// Sets the count of a cluster whose block is in memory.
    fn set(&mut self, cluster: u64, count: u64) {
        let (bits, width) = (self.layout.refcount_block_bits(), self.layout.refcount_width);
        let (number, index) = (cluster >> bits, bytes(cluster & ((1 << bits) - 1)));
        let Some(block) = self.blocks.get_mut(number) else {
            debug_assert!(false, "the block of cluster {cluster} is in memory");
            return;
        };
        width.set(&mut block.bytes, index, count);
        block.dirty.mark((index << width.order()) / 8 / PIECE);
        self.dirty.insert(number);
    }

    /// Counts a cluster that is in use, if it is not counted; false where it cannot be.
    pub(super) fn use_again(&mut self, cluster: u64) -> bool {
        if !self.is_loaded(cluster) {
            return false;
        }
        if self.count(cluster) == 0 {
            self.set(cluster, 1);
        }
        true
    }

    /// Takes up to `want` clusters that follow each other.
    fn take(&mut self, want: u64) -> Option<Run> {
        let run = self.pool.front_mut()?;
        let taken = Run { count: want.min(run.count), ..*run };
        run.start += taken.count;
        run.count -= taken.count;
        if run.count == 0 {
            self.pool.pop_front();
        }
        self.use_run(taken);
        Some(taken)
    }

    /// Takes exactly `want` clusters that follow each other, for a table.
    fn take_table(&mut self, want: u64) -> Option<Run> {
        let place = self.pool.iter().position(|run| run.count >= want)?;
        let run = &mut self.pool[place];
        let taken = Run { count: want, ..*run };
        run.start += want;
        run.count -= want;
        if run.count == 0 {
            self.pool.remove(place);
        }
        self.use_run(taken);
        for cluster in taken.start..taken.start + want {
            self.metadata.insert(cluster);
        }
        Some(taken)
    }

    fn use_run(&mut self, run: Run) {
        for cluster in run.start..run.start + run.count {
            self.set(cluster, 1);
        }
    }

    /// Puts a run of free clusters into the pool.
    fn give(&mut self, run: Run) {
        match self.pool.back_mut() {
            Some(last) if last.start + last.count == run.start && last.zeroed == run.zeroed => {
                last.count += run.count;
            }
            _ if run.count > 0 => self.pool.push_back(run),
            _ => {}
        }
    }

    /// Puts a cluster that has become free into the pool, unless its block will be looked through anyway.
    fn give_freed(&mut self, cluster: u64, zeroed: bool) {
        let is_scanned = cluster >> self.layout.refcount_block_bits() < self.scanned;
        if is_scanned || cluster >= self.known {
            self.give(Run { start: cluster, count: 1, zeroed });
        }
    }
}

impl Counts {
    /// The counts that this table leads to. `known` are the clusters of the file.
    pub(super) fn new(
        layout: Layout,
        table: Vec<u64>,
        table_offset: u64,
        metadata: ClusterSet,
        known: u64,
    ) -> Self {
        let state = State {
            layout,
            table,
            table_offset,
            blocks: Blocks::default(),
            dirty: BTreeSet::new(),
            pool: VecDeque::new(),
            end: None,
            scanned: 0,
            known,
            metadata,
        };
        Counts { state: Mutex::new(state), filling: Arc::default(), writing: Arc::default() }
    }

    /// Whether some have changed and are not on disk.
    pub(super) fn are_dirty(&self) -> bool {
        !self.state().dirty.is_empty()
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Image {
    /// Takes up to `want` clusters, at least one, that follow each other. Their counts are 1.
    ///
    /// # Errors
    /// There is no room, or what making some meets.
    pub(super) async fn allocate(&self, io: &Io, want: u64) -> Result<Run> {
        loop {
            if let Some(run) = self.counts.state().take(want) {
                return Ok(run);
            }
            self.refill(io, 1).await?;
        }
    }

    /// Takes exactly `want` clusters that follow each other, for a table.
    pub(super) async fn allocate_table(&self, io: &Io, want: u64) -> Result<Run> {
        loop {
            if let Some(run) = self.counts.state().take_table(want) {
                return Ok(run);
            }
            self.refill(io, want).await?;
        }
    }

    /// Gives clusters back that were taken and that nothing refers to, in memory or on disk.
    pub(super) fn give_back(&self, run: Run) {
        let mut state = self.counts.state();
        for cluster in run.start..run.start + run.count {
            state.set(cluster, 0);
            state.metadata.remove(cluster);
        }
        // Something may have been written to them.
        state.give(Run { zeroed: false, ..run });
    }

    /// Reads the block that the count of a cluster is in, if there is one and it is not in memory.
    pub(super) async fn load_count(&self, io: &Io, cluster: u64) -> Result<()> {
        let number = cluster >> self.layout.refcount_block_bits();
        let Some(offset) = self.missing_block(io, number)? else { return Ok(()) };
        let read = io.read(offset, self.layout.cluster_len()).await?;
        self.add_block(number, offset, read.to_vec());
        Ok(())
    }

    /// Where a block of counts is that is not in memory.
    fn missing_block(&self, io: &Io, number: u64) -> Result<Option<u64>> {
        let layout = &self.layout;
        let offset = {
            let state = self.counts.state();
            if state.blocks.get(number).is_some() {
                return Ok(None);
            }
            usize::try_from(number).ok().and_then(|number| state.table.get(number)).copied().unwrap_or(0)
        };
        if offset == 0 {
            return Ok(None);
        }
        if !layout.is_aligned(offset)
            || offset.checked_add(layout.cluster_size()).is_none_or(|end| end > self.file_end())
        {
            return Err(self.corrupted(
                io,
                &format!("refcount block {number} is at {offset:#x}, which is no cluster of the file"),
            ));
        }
        Ok(Some(offset))
    }

    /// Adds a block that was read, unless somebody else was quicker: it may be changed already.
    fn add_block(&self, number: u64, offset: u64, bytes: Vec<u8>) {
        let dirty = Pieces::new(bytes.len().div_ceil(PIECE));
        let mut state = self.counts.state();
        if state.blocks.get(number).is_none() {
            state.blocks.insert(number, Block { offset, bytes, dirty });
        }
    }

    /// The count of a cluster.
    pub(super) async fn count_of(&self, io: &Io, cluster: u64) -> Result<u64> {
        self.load_count(io, cluster).await?;
        Ok(self.counts.state().count(cluster))
    }
}
