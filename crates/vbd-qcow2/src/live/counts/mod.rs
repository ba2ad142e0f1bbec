//! Reference counts, and which clusters of the file are free.
//!
//! Blocks of counts are in memory once they were needed. Free clusters wait in a pool of runs, all of whose blocks are in
//! memory, so that taking some is a matter of a short lock; the pool is filled ([`refill`]) from what was given up, from
//! blocks that nobody has looked at yet, and by growing the file.

mod reclaim;
mod refill;
mod write;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vbd_core::Result;
use vbd_core::range_lock::RangeLocks;

use super::image::Image;
use super::io::{Io, bytes, corrupt};
use super::map::{PIECE, Pieces};
use super::set::ClusterSet;
use crate::format::Layout;

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

/// A block of counts, as it lies on disk.
struct Block {
    offset: u64,
    bytes: Vec<u8>,
    dirty: Pieces,
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
    blocks: HashMap<u64, Block>,
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
        self.blocks.contains_key(&(cluster >> self.layout.refcount_block_bits()))
    }

    /// The count of a cluster. One without a block has none.
    fn count(&self, cluster: u64) -> u64 {
        let bits = self.layout.refcount_block_bits();
        let block = self.blocks.get(&(cluster >> bits));
        block.map_or(0, |block| {
            self.layout.refcount_width.get(&block.bytes, bytes(cluster & ((1 << bits) - 1)))
        })
    }

    /// Sets the count of a cluster whose block is in memory.
    fn set(&mut self, cluster: u64, count: u64) {
        let (bits, width) = (self.layout.refcount_block_bits(), self.layout.refcount_width);
        let (number, index) = (cluster >> bits, bytes(cluster & ((1 << bits) - 1)));
        let Some(block) = self.blocks.get_mut(&number) else {
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
            blocks: HashMap::new(),
            dirty: BTreeSet::new(),
            pool: VecDeque::new(),
            end: None,
            scanned: 0,
            known,
            metadata,
        };
        Counts { state: Mutex::new(state), filling: Arc::default(), writing: Arc::default() }
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
        let layout = &self.layout;
        let number = cluster >> layout.refcount_block_bits();
        let offset = {
            let state = self.counts.state();
            if state.blocks.contains_key(&number) {
                return Ok(());
            }
            usize::try_from(number).ok().and_then(|number| state.table.get(number)).copied().unwrap_or(0)
        };
        if offset == 0 {
            return Ok(());
        }
        if !layout.is_aligned(offset)
            || offset.checked_add(layout.cluster_size()).is_none_or(|end| end > self.file_end())
        {
            return Err(self.corrupted(
                io,
                &format!("refcount block {number} is at {offset:#x}, which is no cluster of the file"),
            ));
        }
        let read = io.read(offset, layout.cluster_len()).await?;
        let dirty = Pieces::new(layout.cluster_len().div_ceil(PIECE));
        // Whoever was quicker may have changed it.
        let block = Block { offset, bytes: read.to_vec(), dirty };
        self.counts.state().blocks.entry(number).or_insert(block);
        Ok(())
    }

    /// Adds a reference to each of these clusters, all of which have some.
    ///
    /// # Errors
    /// A count would be more than it can say, and nothing was changed; or what reading counts meets.
    pub(super) async fn refer(&self, io: &Io, clusters: &[u64]) -> Result<()> {
        for cluster in clusters {
            self.load_count(io, *cluster).await?;
        }
        let mut state = self.counts.state();
        let most = self.layout.refcount_width.max();
        for (done, cluster) in clusters.iter().enumerate() {
            let count = state.count(*cluster);
            if count == 0 || count >= most {
                for cluster in &clusters[..done] {
                    let count = state.count(*cluster);
                    state.set(*cluster, count - 1);
                }
                if count == 0 {
                    return Err(corrupt(format!(
                        "cluster {cluster:#x} is in use, and its refcount is 0; check and repair the image"
                    )));
                }
                let message = format!(
                    "a cluster has {count} references, the most that {} bits can say; delete snapshots, or convert to an image with wider refcounts",
                    self.layout.refcount_width.bits()
                );
                return Err(vbd_core::Error::new(vbd_core::ErrorKind::Unsupported, message));
            }
            state.set(*cluster, count + 1);
        }
        Ok(())
    }

    /// The count of a cluster.
    pub(super) async fn count_of(&self, io: &Io, cluster: u64) -> Result<u64> {
        self.load_count(io, cluster).await?;
        Ok(self.counts.state().count(cluster))
    }

    /// Takes a reference away from each of these clusters, all of which keep some.
    pub(super) async fn unrefer(&self, io: &Io, clusters: &[u64]) -> Result<()> {
        for cluster in clusters {
            self.load_count(io, *cluster).await?;
        }
        let mut state = self.counts.state();
        for cluster in clusters {
            let count = state.count(*cluster);
            state.set(*cluster, count.saturating_sub(1));
        }
        Ok(())
    }
}
