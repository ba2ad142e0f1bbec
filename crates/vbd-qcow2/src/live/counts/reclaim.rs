//! Clusters that were given up, on their way to the pool.
//!
//! A cluster may be used again when the entry that led to it is durably gone, every operation that began before has
//! ended, its space was given back, and its count is down: in this order.

use std::sync::Arc;

use vbd_core::Result;

use super::super::image::Image;
use super::super::io::Io;
use super::Run;

/// References that were given up, by cluster. One that is there twice lost two references.
pub(in crate::live) struct Freed {
    image: Arc<Image>,
    clusters: Vec<u64>,
    /// So many of the first are being given back to the filesystem.
    punched: usize,
}

impl Freed {
    pub(in crate::live) fn new(image: &Arc<Image>, mut clusters: Vec<u64>) -> Self {
        clusters.sort_unstable();
        Freed { image: image.clone(), clusters, punched: 0 }
    }
}

impl Drop for Freed {
    /// What was not done waits for the next time. Where the task was given up the kernel may still be at some of it, and
    /// would take away what is written there next.
    fn drop(&mut self) {
        let punched = self.clusters.drain(..self.punched);
        self.image.pending().orphans.extend(punched);
        self.image.put_back_freed(std::mem::take(&mut self.clusters));
    }
}

/// The most clusters whose space is given back at once.
const MOST: u64 = 1 << 20;

impl Image {
    /// Takes references away, of which no table tells any more and which no operation uses.
    pub(in crate::live) async fn reclaim(&self, io: &Io, mut freed: Freed) -> Result<()> {
        while let Some(first) = freed.clusters.first().copied() {
            self.load_count(io, first).await?;
            let bits = self.layout.refcount_block_bits();
            // What follows without a gap in the same block, and whether nothing else refers to it.
            let (run, alone) = {
                let state = self.counts.state();
                let mut count = 0;
                let alone = is_alone(&state, &freed.clusters, 0);
                while count < freed.clusters.len()
                    && freed.clusters[count] == first + count as u64
                    && freed.clusters[count] >> bits == first >> bits
                    && (count as u64) < MOST
                    && is_alone(&state, &freed.clusters, count) == alone
                {
                    count += 1;
                }
                (Run { start: first, count: count.max(1) as u64, zeroed: false }, alone)
            };
            let count = usize::try_from(run.count).unwrap_or(usize::MAX);
            freed.punched = count;
            let given = if alone { self.give_space_back(io, run).await } else { Ok(false) };
            freed.punched = 0;
            let zeroed = given?;
            let done: Vec<u64> = freed.clusters.drain(..count).collect();
            let mut wrong = None;
            {
                let mut state = self.counts.state();
                for cluster in done {
                    match state.count(cluster) {
                        0 => wrong = Some(cluster),
                        1 => {
                            state.set(cluster, 0);
                            state.metadata.remove(cluster);
                            state.give_freed(cluster, zeroed);
                        }
                        more => state.set(cluster, more - 1),
                    }
                }
            }
            if let Some(cluster) = wrong {
                return Err(
                    self.corrupted(io, &format!("cluster {cluster:#x} was in use, and its refcount is 0"))
                );
            }
        }
        Ok(())
    }

    /// Gives the space of clusters back; true if they read as zeroes.
    pub(in crate::live) async fn give_space_back(&self, io: &Io, run: Run) -> Result<bool> {
        if self.keep_space || self.layout.cluster_size() < 4096 {
            return Ok(false);
        }
        let size = self.layout.cluster_size();
        io.punch(run.start * size, run.count * size).await
    }
}

/// Whether this is the only reference that is left to a cluster, which is the case of most.
fn is_alone(state: &super::State, clusters: &[u64], at: usize) -> bool {
    let twice = clusters.get(at + 1) == Some(&clusters[at]);
    !twice && state.count(clusters[at]) == 1
}
