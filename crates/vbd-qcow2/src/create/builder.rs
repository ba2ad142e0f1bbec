//! A new image written in one go, with all its data: clusters are taken in order, whoever calls writes them where it is
//! told, and what leads to them is put together in memory. The header comes last, so that what is not whole is no image.
//!
//! A job that is interrupted can go on: up to a [checkpoint](Builder::checkpoint) the tables are on the disk, and
//! [`Builder::resume`] finds its way from the L1 table, which has a place of its own from the beginning. Refcounts are
//! counted anew then.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::CreateError;
use super::options::{CreateOptions, Preallocation, Version};
use super::plan::Plan;
use crate::format::{self, Cluster, Header, L1Entry, L2Entry, Layout, limit};
use crate::storage::{Storage, read_exact_at};

/// Why an image was not written.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// There can be no such image, or what is there is no part of it.
    #[error("{0}")]
    Refused(String),
    /// The file could not be read or written.
    #[error("cannot {doing}: {error}")]
    Io {
        /// What failed.
        doing: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// The options are none that an image can be made with.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The header cannot hold it.
    #[error(transparent)]
    Format(#[from] format::Error),
}

type Result<T, E = BuildError> = std::result::Result<T, E>;

/// Clusters of the disk that lie one behind the other in the file, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Where the first of them is to be written, in bytes of the file.
    pub host: u64,
    /// Which they are.
    pub clusters: Range<u64>,
}

/// An image that is being written. All of its methods may be called by several threads at once.
pub struct Builder<S> {
    storage: S,
    layout: Layout,
    header: Header,
    state: Mutex<State>,
}

struct State {
    /// The first cluster of the file that nobody has.
    next: u64,
    /// The L1 table.
    l1: Vec<L1Entry>,
    /// L2 tables that are not whole yet, by index.
    open: BTreeMap<u64, Open>,
    /// Refcount blocks that are not whole yet, by index.
    blocks: BTreeMap<u64, Vec<u8>>,
    /// Where those are that are, in bytes; 0 for others.
    refcounts: Vec<u64>,
    /// What is left of the last cluster with compressed data, in bytes of the file.
    rest: Range<u64>,
}

/// An L2 table.
struct Open {
    host: u64,
    bytes: Vec<u8>,
}

fn io(doing: &'static str) -> impl FnOnce(io::Error) -> BuildError {
    move |error| BuildError::Io { doing, error }
}

impl<S: Storage> Builder<S> {
    /// Whether images of this kind can be written so: the data is in them, plain or compressed, and no room is set aside.
    pub fn fits(options: &CreateOptions) -> bool {
        options.data_file.is_none()
            && options.luks_header.is_none()
            && !options.extended_l2
            && options.preallocation == Preallocation::Off
            // Clusters of zeroes in front of a backing file are not known there.
            && (options.version != Version::V2 || options.backing.is_none())
    }

    /// Begins an image in storage that is empty.
    ///
    /// # Errors
    /// The options go not together, or are none that [`fits`](Self::fits).
    pub fn new(storage: S, options: &CreateOptions) -> Result<Self> {
        if !Self::fits(options) {
            return Err(BuildError::Refused("such an image cannot be written in one go".to_owned()));
        }
        let plan = Plan::new(options)?;
        let layout = plan.layout;
        let mut header = plan.header(options);
        header.l1_offset = layout.cluster_size();
        header.refcount_table_offset = 0;
        header.refcount_table_clusters = 0;
        // What it cannot hold is to be known before all the work.
        header.encode()?;
        let l1 = vec![L1Entry(0); usize::try_from(header.l1_entries).expect("within the limit")];
        let mut state = State {
            next: 0,
            l1,
            open: BTreeMap::new(),
            blocks: BTreeMap::new(),
            refcounts: Vec::new(),
            rest: 0..0,
        };
        for _ in 0..1 + layout.clusters(header.l1_bytes()) {
            state.take(&layout);
        }
        Ok(Builder { storage, layout, header, state: Mutex::new(state) })
    }

    /// Goes on with an image that was begun with these options, and of which all below `done` (bytes of the disk, whole
    /// clusters) was written before a checkpoint that is durable. What it has beyond that is given up.
    ///
    /// # Errors
    /// What is there is nothing of that kind, or cannot be read.
    pub fn resume(storage: S, options: &CreateOptions, done: u64) -> Result<Self> {
        let builder = Self::new(storage, options)?;
        builder.find(done)?;
        Ok(builder)
    }

    /// The storage.
    pub fn storage(&self) -> &S {
        &self.storage
    }

    /// How the image is laid out.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes room for clusters of the disk, compressed ones (with their length in bytes) and others, each for the first
    /// time. Gives where each compressed one is to be written, and where the others; they are in the order of the calls, and
    /// in each call the compressed ones come first.
    ///
    /// # Errors
    /// The file would become too long for its format, or what leads to the clusters cannot be written.
    pub fn place(&self, packed: &[(u64, u64)], plain: &[Range<u64>]) -> Result<(Vec<u64>, Vec<Placed>)> {
        let (layout, mut state) = (&self.layout, self.state());
        let mut hosts = Vec::with_capacity(packed.len());
        for (cluster, len) in packed {
            self.open_table(&mut state, *cluster)?;
            let host = state.place_packed(layout, *len);
            let entry = L2Entry::compressed(layout, host, *len).ok_or_else(too_long)?;
            state.set(layout, *cluster, entry);
            hosts.push(host);
        }
        let mut placed: Vec<Placed> = Vec::new();
        for cluster in plain.iter().cloned().flatten() {
            self.open_table(&mut state, cluster)?;
            let host = state.take(layout) << layout.cluster_bits;
            state.set(layout, cluster, L2Entry::data(host, true));
            match placed.last_mut() {
                Some(last)
                    if last.clusters.end == cluster
                        && last.host + ((last.clusters.end - last.clusters.start) << layout.cluster_bits)
                            == host =>
                {
                    last.clusters.end += 1;
                }
                _ => placed.push(Placed { host, clusters: cluster..cluster + 1 }),
            }
        }
        self.write_whole_blocks(&mut state)?;
        Ok((hosts, placed))
    }

    /// Has clusters of the disk read as zeroes, whatever the backing file has.
    ///
    /// # Errors
    /// As [`place`](Self::place); and version 2 has no such clusters.
    pub fn zero(&self, clusters: Range<u64>) -> Result<()> {
        if self.layout.version < 3 {
            return Err(BuildError::Refused("version 2 of the format has no clusters of zeroes".to_owned()));
        }
        let mut state = self.state();
        for cluster in clusters {
            self.open_table(&mut state, cluster)?;
            state.set(&self.layout, cluster, L2Entry::ZERO);
        }
        self.write_whole_blocks(&mut state)
    }

    /// Nothing below this offset of the disk (bytes) will be placed any more: the tables there can be written.
    ///
    /// # Errors
    /// They cannot.
    pub fn settled(&self, below: u64) -> Result<()> {
        let mut state = self.state();
        while let Some(entry) = state.open.first_entry() {
            if (entry.key() + 1) << self.layout.l2_span_bits() > below {
                break;
            }
            let table = entry.remove();
            self.write("write a table", table.host, &table.bytes)?;
        }
        Ok(())
    }

    /// Writes all that a later [`resume`](Self::resume) needs of what was placed so far. It is not durable by that.
    ///
    /// # Errors
    /// That cannot be written.
    pub fn checkpoint(&self) -> Result<()> {
        let state = self.state();
        for table in state.open.values() {
            self.write("write a table", table.host, &table.bytes)?;
        }
        self.write_l1(&state)
    }

    /// Writes what is left. Then the storage holds the image, whole, and not durable by that.
    ///
    /// # Errors
    /// It cannot be written, or the file would become too long for its format.
    pub fn finish(&self) -> Result<()> {
        let (layout, mut state) = (&self.layout, self.state());
        for (_, table) in std::mem::take(&mut state.open) {
            self.write("write a table", table.host, &table.bytes)?;
        }
        state.rest = 0..0;
        self.write_l1(&state)?;
        let (table_clusters, blocks) = state.remaining(layout);
        if table_clusters << layout.cluster_bits > limit::REFCOUNT_TABLE_BYTES {
            return Err(too_long());
        }
        let table = state.next << layout.cluster_bits;
        for _ in 0..table_clusters + blocks {
            state.take(layout);
        }
        debug_assert_eq!(state.blocks.len() as u64, blocks, "all that count the last clusters");
        let mut at = table + (table_clusters << layout.cluster_bits);
        for (index, block) in std::mem::take(&mut state.blocks) {
            self.write("write refcounts", at, &block)?;
            state.refer_block(index, at);
            at += layout.cluster_size();
        }
        let mut entries: Vec<u8> = state.refcounts.iter().flat_map(|block| block.to_be_bytes()).collect();
        entries.resize(entries.len().next_multiple_of(layout.cluster_len()), 0);
        self.write("write refcounts", table, &entries)?;
        self.storage.set_len(at).map_err(io("set its length"))?;
        let header = Header {
            refcount_table_offset: table,
            refcount_table_clusters: u32::try_from(table_clusters).expect("within the limit"),
            ..self.header.clone()
        };
        self.write("write the header", 0, &header.encode()?)
    }

    fn write(&self, doing: &'static str, offset: u64, bytes: &[u8]) -> Result<()> {
        self.storage.write_all_at(offset, bytes).map_err(io(doing))
    }

    fn write_l1(&self, state: &State) -> Result<()> {
        let bytes: Vec<u8> = state.l1.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        self.write("write the L1 table", self.header.l1_offset, &bytes)
    }

    /// Makes the table that leads to a cluster, if there is none.
    fn open_table(&self, state: &mut State, cluster: u64) -> Result<()> {
        let layout = &self.layout;
        let index = cluster >> layout.l2_bits();
        if state.open.contains_key(&index) {
            return Ok(());
        }
        let entry = usize::try_from(index).ok().filter(|index| *index < state.l1.len());
        let entry = entry.ok_or_else(|| BuildError::Refused(format!("the disk has no cluster {cluster}")))?;
        let mut bytes = vec![0; layout.cluster_len()];
        let known = state.l1[entry].offset();
        let host = if known == 0 {
            let host = state.take(layout) << layout.cluster_bits;
            state.l1[entry] = L1Entry::new(host, true);
            host
        } else {
            // It was taken for whole.
            read_exact_at(&self.storage, known, &mut bytes).map_err(io("read a table"))?;
            known
        };
        state.open.insert(index, Open { host, bytes });
        Ok(())
    }

    /// Writes the refcount blocks whose clusters have all been taken, each to a cluster of its own.
    fn write_whole_blocks(&self, state: &mut State) -> Result<()> {
        let layout = &self.layout;
        while let Some(entry) = state.blocks.first_entry() {
            let (index, end) = (*entry.key(), (entry.key() + 1) << layout.refcount_block_bits());
            let rest = state.rest.start >> layout.cluster_bits;
            if end > state.next || (!state.rest.is_empty() && rest < end) {
                break;
            }
            let block = entry.remove();
            let host = state.take(layout) << layout.cluster_bits;
            self.write("write refcounts", host, &block)?;
            state.refer_block(index, host);
            if state.refcounts.len() as u64 * 8 > limit::REFCOUNT_TABLE_BYTES {
                return Err(too_long());
            }
        }
        Ok(())
    }

    /// Finds what was written below an offset of the disk.
    fn find(&self, done: u64) -> Result<()> {
        let (layout, mut guard) = (&self.layout, self.state());
        let state = &mut *guard;
        let refused = |what: String| {
            BuildError::Refused(format!("what there is cannot be gone on with ({what}): begin anew"))
        };
        let length = self.storage.length().map_err(io("tell its length"))?;
        let mut bytes = vec![0; state.l1.len() * 8];
        read_exact_at(&self.storage, self.header.l1_offset, &mut bytes).map_err(io("read the L1 table"))?;
        let inside = |host: u64, len: u64| host.checked_add(len).is_some_and(|end| end <= length);
        let end = done >> layout.cluster_bits;
        for (index, entry) in (0u64..).zip(bytes.chunks_exact(8)) {
            let entry = L1Entry(u64::from_be_bytes(entry.try_into().expect("eight bytes")));
            let first = index << layout.l2_bits();
            let place = entry.decode(layout).map_err(|error| refused(error.to_string()))?;
            let Some(host) = place.filter(|_| first < end) else { continue };
            if !inside(host, layout.cluster_size()) {
                return Err(refused(format!("a table at {host:#x} is beyond its end")));
            }
            let mut table = vec![0; layout.cluster_len()];
            read_exact_at(&self.storage, host, &mut table).map_err(io("read a table"))?;
            for (cluster, word) in (first..).zip(table.chunks_exact_mut(8)) {
                if cluster >= end {
                    word.fill(0);
                    continue;
                }
                let entry = L2Entry(u64::from_be_bytes((&*word).try_into().expect("eight bytes")));
                let (from, to) = match entry.decode(layout).map_err(|error| refused(error.to_string()))? {
                    Cluster::Unallocated | Cluster::Zero { host: None } => continue,
                    Cluster::Zero { host: Some(host) } | Cluster::Data { host } => {
                        (host, host.saturating_add(1))
                    }
                    Cluster::Compressed(it) => (it.offset, it.end()),
                };
                // The last cluster of the file may have been cut short by what was written of it.
                if !inside(from, 0) || to > length.next_multiple_of(layout.cluster_size()) {
                    return Err(refused(format!("a cluster at {from:#x} is beyond its end")));
                }
                for cluster in from >> layout.cluster_bits..=(to - 1) >> layout.cluster_bits {
                    if !state.refer(layout, cluster) {
                        return Err(refused(format!("the cluster {cluster} is used too often")));
                    }
                }
            }
            if !state.refer(layout, host >> layout.cluster_bits) {
                return Err(refused(format!("the table at {host:#x} is used for something else")));
            }
            state.l1[usize::try_from(index).expect("an index")] = L1Entry::new(host, true);
            if first + layout.l2_entries() as u64 > end {
                state.open.insert(index, Open { host, bytes: table });
            }
        }
        // What belongs to one of them alone and is used by another is found here.
        let single = |host: u64| state.count(layout, host >> layout.cluster_bits) == 1;
        if !state.l1.iter().all(|entry| entry.offset() == 0 || single(entry.offset())) {
            return Err(refused("tables lie over one another".to_owned()));
        }
        state.next = state.used_to(layout);
        self.storage.set_len(state.next << layout.cluster_bits).map_err(io("cut off what is not used"))?;
        Ok(())
    }
}

fn too_long() -> BuildError {
    BuildError::Refused(
        "the file becomes too long for its format: use larger clusters or narrower refcounts".to_owned(),
    )
}

impl State {
    /// Takes the next cluster of the file, which has one user from now on.
    fn take(&mut self, layout: &Layout) -> u64 {
        let cluster = self.next;
        self.next += 1;
        self.refer(layout, cluster);
        cluster
    }

    fn split(layout: &Layout, cluster: u64) -> (u64, usize) {
        let bits = layout.refcount_block_bits();
        let index = usize::try_from(cluster & ((1 << bits) - 1)).expect("a block is small");
        (cluster >> bits, index)
    }

    /// How many use a cluster.
    fn count(&self, layout: &Layout, cluster: u64) -> u64 {
        let (block, index) = Self::split(layout, cluster);
        self.blocks.get(&block).map_or(0, |block| layout.refcount_width.get(block, index))
    }

    /// Counts one more who uses a cluster; false where more cannot be counted.
    fn refer(&mut self, layout: &Layout, cluster: u64) -> bool {
        let (block, index) = Self::split(layout, cluster);
        let block = self.blocks.entry(block).or_insert_with(|| vec![0; layout.cluster_len()]);
        let count = layout.refcount_width.get(block, index);
        if count == layout.refcount_width.max() {
            return false;
        }
        layout.refcount_width.set(block, index, count + 1);
        true
    }

    /// Room for compressed data, one behind the other, over the end of a cluster where the next one is free.
    fn place_packed(&mut self, layout: &Layout, len: u64) -> u64 {
        let size = layout.cluster_size();
        let begun =
            !self.rest.is_empty() && self.count(layout, self.rest.start / size) < layout.refcount_width.max();
        let host = if begun && (len <= self.rest.end - self.rest.start || self.rest.end == self.next * size) {
            self.rest.start
        } else {
            let start = self.next * size;
            self.rest = start..start;
            start
        };
        let end = host + len;
        if end > self.rest.end {
            // Those who use it are counted below.
            self.next = end.div_ceil(size);
        }
        self.rest = end..end.next_multiple_of(size);
        for cluster in host / size..=(end - 1) / size {
            self.refer(layout, cluster);
        }
        host
    }

    fn set(&mut self, layout: &Layout, cluster: u64, entry: L2Entry) {
        let index = usize::try_from(cluster & (layout.l2_entries() as u64 - 1)).expect("a table is small");
        let table = self.open.get_mut(&(cluster >> layout.l2_bits())).expect("opened before");
        table.bytes[index * 8..][..8].copy_from_slice(&entry.0.to_be_bytes());
    }

    fn refer_block(&mut self, index: u64, host: u64) {
        let index = usize::try_from(index).expect("a 64-bit host");
        if self.refcounts.len() <= index {
            self.refcounts.resize(index + 1, 0);
        }
        self.refcounts[index] = host;
    }

    /// Clusters of the refcount table, and of blocks that are not written yet, counting themselves.
    fn remaining(&self, layout: &Layout) -> (u64, u64) {
        let (mut table, mut blocks) = (1, 1);
        loop {
            let last = (self.next + table + blocks - 1) >> layout.refcount_block_bits();
            let new = self.next >> layout.refcount_block_bits()..last + 1;
            let need_blocks = self.blocks.len() as u64
                + new.filter(|index| !self.blocks.contains_key(index)).count() as u64;
            let need_table = layout.clusters((last + 1) * 8);
            if (need_table, need_blocks) == (table, blocks) {
                return (table, blocks);
            }
            // Both only grow, so this ends.
            (table, blocks) = (need_table.max(table), need_blocks.max(blocks));
        }
    }

    /// The end of the clusters that are used.
    fn used_to(&self, layout: &Layout) -> u64 {
        let last = self.blocks.iter().rev().find_map(|(index, block)| {
            let entries = 0..usize::try_from(layout.refcount_block_entries()).expect("a block is small");
            let last = entries.rev().find(|entry| layout.refcount_width.get(block, *entry) > 0)?;
            Some((index << layout.refcount_block_bits()) + last as u64 + 1)
        });
        last.unwrap_or(0)
    }
}
