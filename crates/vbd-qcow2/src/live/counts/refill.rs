//! Filling the pool of free clusters.

use std::sync::Arc;

use vbd_core::memory::Buffer;
use vbd_core::{Error, ErrorKind, Guard, Result};

use super::super::image::Image;
use super::super::io::{Io, all};
use super::super::map::{PIECE, Pieces};
use super::{Block, Run, State};
use crate::format::{at, limit};

/// Blocks of counts that are read at once to look for free clusters.
const LOOK: usize = 4;
/// Runs that are given back to the filesystem at once, so that they read as zeroes.
const MOST_RUNS: usize = 256;
/// The least and the most that the file grows by, in bytes, and the least in clusters. Little for the checker, so that
/// clusters come again soon.
const GROWTH: std::ops::RangeInclusive<u64> = if cfg!(shuttle) { 512..=4096 } else { 1 << 20..=64 << 20 };
const LEAST: u64 = if cfg!(shuttle) { 2 } else { 16 };

/// Blocks, and perhaps a table, for counts of clusters that had none.
#[derive(Default)]
struct Structures {
    /// The new place of the refcount table.
    table: Option<Run>,
    /// New blocks: number and cluster.
    blocks: Vec<(u64, u64)>,
}

impl Image {
    /// Makes sure that the pool has a run of `need` clusters, or at least one cluster where that is 1.
    pub(super) async fn refill(&self, io: &Io, need: u64) -> Result<()> {
        let _turn = self.counts.filling.lock(0..1).await;
        if self.is_corrupt() {
            return Err(super::corrupt("the image is corrupt; check and repair it before it is written to"));
        }
        if self.counts.state().pool.iter().any(|run| run.count >= need) {
            return Ok(());
        }
        let end = self.find_end(io).await?;
        if need == 1 && self.look_for_free(io).await? {
            return Ok(());
        }
        self.grow_file(io, end, need).await
    }

    /// The end of what is used or in the pool.
    pub(super) async fn find_end(&self, io: &Io) -> Result<u64> {
        let known = {
            let state = self.counts.state();
            if let Some(end) = state.end {
                return Ok(end);
            }
            state.known
        };
        let end = self.last_used(io, known).await?;
        let mut state = self.counts.state();
        // What is behind is not looked at for free clusters: the file grows over it.
        state.known = end;
        Ok(*state.end.get_or_insert(end))
    }

    /// The end of the last used cluster below `end`, as far back as a few blocks tell.
    pub(in crate::live) async fn last_used(&self, io: &Io, mut end: u64) -> Result<u64> {
        let bits = self.layout.refcount_block_bits();
        for _ in 0..LOOK * 2 {
            let Some(last) = end.checked_sub(1) else { break };
            self.load_count(io, last).await?;
            let first = last >> bits << bits;
            let state = self.counts.state();
            let used = |cluster: &u64| state.count(*cluster) > 0 || state.metadata.contains(*cluster);
            if let Some(used) = (first..end).rev().find(used) {
                return Ok(used + 1);
            }
            end = first;
        }
        Ok(end)
    }

    /// Looks for free clusters in blocks that nobody has looked at yet.
    async fn look_for_free(&self, io: &Io) -> Result<bool> {
        let bits = self.layout.refcount_block_bits();
        for _ in 0..LOOK {
            let (first, known) = {
                let state = self.counts.state();
                (state.scanned << bits, state.known)
            };
            if first >= known {
                return Ok(false);
            }
            self.load_count(io, first).await?;
            let runs = self.counts.state().free_runs(first, known.min(first + (1 << bits)));
            let found = !runs.is_empty();
            let few = runs.len() <= MOST_RUNS;
            for run in runs {
                let zeroed = few && self.give_space_back(io, run).await?;
                self.counts.state().give(Run { zeroed, ..run });
            }
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Grows the file, with what counts the new clusters need.
    async fn grow_file(&self, io: &Io, start: u64, need: u64) -> Result<()> {
        let layout = &self.layout;
        let size = layout.cluster_size();
        let step = (start * size / 4).clamp(*GROWTH.start(), *GROWTH.end()) / size;
        let mut count = step.max(need.saturating_mul(2)).max(LEAST);
        if self.backend.is_block_device() {
            count = count.min((self.backend.size() / size).saturating_sub(start));
        }
        let most = limit::SIZE.min(1 << 56) / size;
        if start.saturating_add(count) > most {
            return Err(no_room("the image has the largest size that its format allows"));
        }
        let end = (start + count) * size;
        // Blocks may be there already, of clusters that the file has had.
        let bits = layout.refcount_block_bits();
        for block in start >> bits..=(start + count - 1) >> bits {
            self.load_count(io, (block << bits).max(start)).await?;
        }
        let structures = self.counts.state().plan(start, count)?;
        let taken = structures.blocks.len() as u64 + structures.table.map_or(0, |run| run.count);
        if count < taken + need {
            return Err(no_room("the block device has no room left; grow the volume"));
        }
        let there = self.file_end() / size;
        if !self.backend.is_block_device() && end > self.backend.size() {
            let (backend, end) = (self.backend.clone(), self.whole_blocks(end));
            io.local.unblock(move || backend.grow(end)).await?;
        }
        if taken > 0 {
            let added = Added { image: self, structures: &structures, done: false };
            self.add_structures(io, added).await?;
        }
        let run = Run { start: start + taken, count: count - taken, zeroed: false };
        // What the file had already behind its last cluster may hold anything; the rest is new and reads as zeroes.
        let old = Run { count: run.count.min(there.saturating_sub(run.start)), ..run };
        let zeroed = match old.count {
            _ if self.backend.is_block_device() => false,
            0 => true,
            _ => self.give_space_back(io, old).await?,
        };
        let mut state = self.counts.state();
        state.end = Some(start + count);
        state.give(Run { zeroed, ..run });
        Ok(())
    }

    /// Brings new blocks, and a new table, to the disk: each is durable before anything leads to it.
    async fn add_structures(&self, io: &Io, mut added: Added<'_>) -> Result<()> {
        let size = self.layout.cluster_size();
        let Structures { table, blocks } = added.structures;
        let place = self.counts.state().add(added.structures);
        self.write_counts(io).await?;
        let keep: Guard = Arc::new(());
        let entries =
            |table: &[u64]| -> Vec<u8> { table.iter().flat_map(|entry| entry.to_be_bytes()).collect() };
        let mut grown = place.clone();
        for (number, cluster) in blocks {
            grown[super::bytes(*number)] = cluster * size;
        }
        if let Some(run) = table {
            let mut buffer = Buffer::new(super::bytes(run.count * size));
            let bytes = entries(&grown);
            buffer.bytes_mut()[..bytes.len()].copy_from_slice(&bytes);
            io.write(run.start * size, buffer, keep.clone()).await?;
        }
        self.sync_file(io).await?;
        if let Some(run) = table {
            let clusters = u32::try_from(run.count).unwrap_or(u32::MAX);
            let fields = [&(run.start * size).to_be_bytes()[..], &clusters.to_be_bytes()[..]].concat();
            self.write_header_field(io, at::REFCOUNT_TABLE, &fields).await?;
        } else {
            let offset = self.counts.state().table_offset;
            // Whole sectors of the table: an entry is old or new.
            let mut sectors: Vec<usize> =
                blocks.iter().map(|(number, _)| super::bytes(*number) / 64).collect();
            sectors.dedup();
            let mut writes = Vec::new();
            for sector in sectors {
                let part = &grown[sector * 64..grown.len().min(sector * 64 + 64)];
                let bytes = entries(part);
                let mut buffer = Buffer::new(bytes.len());
                buffer.bytes_mut().copy_from_slice(&bytes);
                writes.push(io.write(offset + sector as u64 * 512, buffer, keep.clone()));
            }
            all(writes).await?;
        }
        added.done = true;
        let mut state = self.counts.state();
        let old = Run {
            start: state.table_offset / size,
            count: (state.table.len() as u64 * 8).div_ceil(size),
            zeroed: false,
        };
        state.table = grown;
        if let Some(run) = table {
            state.table_offset = run.start * size;
            drop(state);
            self.header().refcount_table_offset = run.start * size;
            self.header().refcount_table_clusters = u32::try_from(run.count).unwrap_or(u32::MAX);
            // Durable with the next sync, which is before these are given back.
            self.free(old.start..old.start + old.count);
        }
        Ok(())
    }
}

/// New structures in memory; taken out again where they do not reach the disk.
struct Added<'a> {
    image: &'a Image,
    structures: &'a Structures,
    done: bool,
}

impl Drop for Added<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut state = self.image.counts.state();
        for (number, _) in &self.structures.blocks {
            state.blocks.remove(*number);
            state.dirty.remove(number);
        }
        let blocks = self.structures.blocks.iter().map(|(_, cluster)| *cluster);
        let table = self.structures.table.iter().flat_map(|run| run.start..run.start + run.count);
        for cluster in blocks.chain(table) {
            if state.is_loaded(cluster) {
                state.set(cluster, 0);
            }
            state.metadata.remove(cluster);
        }
    }
}

impl State {
    /// The runs of free clusters in a range of one block, which counts as looked at from now on.
    pub(super) fn free_runs(&mut self, first: u64, end: u64) -> Vec<Run> {
        self.scanned += 1;
        let mut runs: Vec<Run> = Vec::new();
        if !self.is_loaded(first) {
            // Without a block there is no count: the clusters can be counted only when there is one.
            return runs;
        }
        for cluster in first..end {
            if self.count(cluster) > 0 || self.metadata.contains(cluster) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.start + run.count == cluster => run.count += 1,
                _ => runs.push(Run { start: cluster, count: 1, zeroed: false }),
            }
        }
        runs
    }

    /// What is missing to count the clusters of a run, and where it goes: at the run's start.
    fn plan(&self, start: u64, count: u64) -> Result<Structures> {
        let (bits, size) = (self.layout.refcount_block_bits(), self.layout.cluster_size());
        let (first, last) = (start >> bits, (start + count - 1) >> bits);
        let mut structures = Structures::default();
        let mut next = start;
        if last >= self.table.len() as u64 {
            // Half as large again, so that this is rare.
            let clusters = ((last + 1 + last / 2) * 8).div_ceil(size);
            let most = limit::REFCOUNT_TABLE_BYTES / size;
            let clusters = clusters.min(most);
            if (last + 1) * 8 > clusters * size {
                return Err(no_room(
                    "the image's refcount table has the largest size that its format allows; convert it to larger clusters",
                ));
            }
            structures.table = Some(Run { start: next, count: clusters, zeroed: true });
            next += clusters;
        }
        for number in first..=last {
            if usize::try_from(number)
                .ok()
                .and_then(|number| self.table.get(number))
                .is_none_or(|entry| *entry == 0)
            {
                structures.blocks.push((number, next));
                next += 1;
            }
        }
        Ok(structures)
    }

    /// Adds structures in memory: the table as it is, but with its new length.
    fn add(&mut self, structures: &Structures) -> Vec<u64> {
        let (size, len) = (self.layout.cluster_size(), self.layout.cluster_len());
        for (number, cluster) in &structures.blocks {
            let dirty = Pieces::new(len.div_ceil(PIECE));
            // It may lie where another was: all of it is written.
            (0..len.div_ceil(PIECE)).for_each(|piece| dirty.mark(piece));
            self.blocks.insert(*number, Block { offset: cluster * size, bytes: vec![0; len], dirty });
            self.dirty.insert(*number);
        }
        let table = structures.table.iter().flat_map(|run| run.start..run.start + run.count);
        for cluster in table.chain(structures.blocks.iter().map(|(_, cluster)| *cluster)) {
            self.set(cluster, 1);
            self.metadata.insert(cluster);
        }
        let mut entries = self.table.clone();
        if let Some(run) = structures.table {
            entries.resize(super::bytes(run.count * size / 8), 0);
        }
        entries
    }
}

fn no_room(message: &str) -> Error {
    Error::new(ErrorKind::NoSpace, message)
}
