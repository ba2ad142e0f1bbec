//! Free clusters as whoever wants the file shorter sees them.

use std::ops::Range;
use std::sync::Arc;

use vbd_core::memory::Buffer;
use vbd_core::{Guard, Result};

use super::super::image::Image;
use super::super::io::{Io, all};
use super::{Run, State};

impl Image {
    /// Puts all that is free into the pool: how many clusters are in use.
    pub(in crate::live) async fn find_free(&self, io: &Io) -> Result<u64> {
        let _turn = self.counts.filling.lock(0..1).await;
        self.load_all_counts(io).await?;
        self.find_end(io).await?;
        let mut state = self.counts.state();
        state.scan_rest();
        Ok(state.used())
    }

    /// Gives the space of everything in the pool back that does not read as zeroes.
    pub(in crate::live) async fn punch_free(&self, io: &Io) -> Result<()> {
        let runs: Vec<Run> = std::mem::take(&mut self.counts.state().pool).into();
        let mut result = Ok(());
        for run in runs {
            let end = self.file_end() / self.layout.cluster_size();
            let inside = Run { count: run.count.min(end.saturating_sub(run.start)), ..run };
            let punched = match (&result, run.zeroed || inside.count == 0) {
                (Ok(()), false) => self.give_space_back(io, inside).await,
                _ => Ok(false),
            };
            let zeroed = run.zeroed || matches!(punched, Ok(true));
            self.counts.state().give(Run { zeroed, ..run });
            result = result.and(punched.map(drop));
        }
        result
    }

    /// Takes blocks at the end out of the table that count nothing but themselves; false where there are none.
    pub(in crate::live) async fn drop_blocks(&self, io: &Io) -> Result<bool> {
        let (gone, place) = {
            let state = self.counts.state();
            (state.idle_blocks(), state.table_offset)
        };
        if gone.is_empty() {
            return Ok(false);
        }
        let mut table = self.counts.state().table.clone();
        for number in &gone {
            table[super::bytes(*number)] = 0;
        }
        let keep: Guard = Arc::new(());
        let mut sectors: Vec<usize> = gone.iter().map(|number| super::bytes(*number) / 64).collect();
        sectors.sort_unstable();
        sectors.dedup();
        let mut writes = Vec::new();
        for sector in sectors {
            let part = &table[sector * 64..table.len().min(sector * 64 + 64)];
            let bytes: Vec<u8> = part.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            let mut buffer = Buffer::new(bytes.len());
            buffer.bytes_mut().copy_from_slice(&bytes);
            writes.push(io.write(place + sector as u64 * 512, buffer, keep.clone()));
        }
        all(writes).await?;
        self.sync_file(io).await?;
        self.counts.state().forget_blocks(&gone);
        Ok(true)
    }
}

impl State {
    /// Looks through what nobody has looked at yet, and sorts the pool.
    fn scan_rest(&mut self) {
        let bits = self.layout.refcount_block_bits();
        while self.scanned << bits < self.known {
            let first = self.scanned << bits;
            let runs = self.free_runs(first, self.known.min(first + (1 << bits)));
            runs.into_iter().for_each(|run| self.give(run));
        }
        self.sort();
    }

    /// Has the pool begin with what comes first in the file.
    pub(in crate::live) fn sort(&mut self) {
        let mut runs: Vec<Run> = std::mem::take(&mut self.pool).into();
        runs.sort_unstable_by_key(|run| run.start);
        runs.into_iter().for_each(|run| self.give(run));
    }

    /// The clusters that a block counts, but for those behind all that is in use.
    fn counted(&self, number: u64) -> Range<u64> {
        let bits = self.layout.refcount_block_bits();
        let end = self.end.unwrap_or(0).max(self.known);
        number << bits..((number + 1) << bits).min(end)
    }

    /// How many clusters have a count.
    fn used(&self) -> u64 {
        let used = |number| self.counted(number).filter(|cluster| self.count(*cluster) > 0).count() as u64;
        (0..self.table.len() as u64).map(used).sum()
    }

    /// Takes the first cluster of the pool, if it is before this one.
    pub(in crate::live) fn take_first(&mut self, before: u64) -> Option<u64> {
        self.pool.front().filter(|run| run.start < before)?;
        self.take(1).map(|run| run.start)
    }

    /// Whether so many clusters in a row are free before this one, and would be taken for a table.
    pub(in crate::live) fn has_room_before(&mut self, cluster: u64, count: u64) -> bool {
        self.sort();
        let run = self.pool.iter().find(|run| run.count >= count);
        run.is_some_and(|run| run.start + count <= cluster)
    }

    /// The blocks of clusters behind all that is in use, which count nothing but their own cluster, if that.
    fn idle_blocks(&self) -> Vec<u64> {
        let mut idle = Vec::new();
        for number in (0..self.table.len() as u64).rev() {
            let offset = self.table[super::bytes(number)];
            if offset == 0 {
                continue;
            }
            let own = offset / self.layout.cluster_size();
            let alone = self.blocks.get(number).is_some()
                && self.counted(number).all(|cluster| cluster == own || self.count(cluster) == 0);
            if !alone || number == 0 {
                break;
            }
            idle.push(number);
        }
        idle
    }

    fn forget_blocks(&mut self, numbers: &[u64]) {
        let bits = self.layout.refcount_block_bits();
        for number in numbers {
            let own = std::mem::take(&mut self.table[super::bytes(*number)]) / self.layout.cluster_size();
            self.metadata.remove(own);
            self.blocks.remove(*number);
            self.dirty.remove(number);
            if self.is_loaded(own) {
                self.set(own, 0);
                self.give(Run { start: own, count: 1, zeroed: false });
            }
            let (first, end) = (number << bits, (number + 1) << bits);
            for run in &mut self.pool {
                if run.start >= first && run.start < end {
                    run.count = 0;
                } else if run.start < first && run.start + run.count > first {
                    run.count = first - run.start;
                }
            }
            self.pool.retain(|run| run.count > 0);
        }
    }

    /// The end of all that is in use, in clusters. Nothing behind it is in the pool any more: the file grows over it.
    pub(in crate::live) fn cut(&mut self) -> u64 {
        let last = |number| self.counted(number).rev().find(|cluster| self.count(*cluster) > 0);
        let end = (0..self.table.len() as u64).rev().find_map(last).map_or(1, |last| last + 1);
        for run in &mut self.pool {
            run.count = run.count.min(end.saturating_sub(run.start));
        }
        self.pool.retain(|run| run.count > 0);
        self.end = Some(end);
        self.known = self.known.min(end);
        end
    }
}
