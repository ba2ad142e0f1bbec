//! An open image: what all its channels share.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use vbd_core::file::{Backend, Cache};
use vbd_core::memory::Buffer;
use vbd_core::range_lock::{RangeGuard, RangeLocks};
use vbd_core::{Error, ErrorKind, Flags, Operation, Result, Session};
use vbd_luks::Encrypted;
use vbd_ring::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vbd_ring::sync::{Mutex, MutexGuard};

use super::behind::Behind;
use super::compress::Rest;
use super::counts::{Counts, Run};
use super::grace::Members;
use super::io::{Files, Io, bytes, corrupt};
use super::log::{Log, Note};
use super::map::{Entry, L1, Registry, Span, Table, index_of, span};
use super::set::Look;
use crate::format::{Cluster, Compression, Header, L1Entry, Layout, at, incompatible};

/// What all channels of an image share.
pub(super) struct Image {
    pub(super) label: String,
    pub(super) layout: Layout,
    pub(super) compression: Compression,
    pub(super) backend: Arc<Backend>,
    pub(super) read_only: bool,
    pub(super) cache: Cache,
    /// Give no space back.
    pub(super) keep_space: bool,
    /// The external data file.
    pub(super) data_file: Option<Arc<dyn Session>>,
    /// The image behind.
    pub(super) below: Behind,
    /// What encrypts guest clusters.
    pub(super) encrypted: Option<Arc<Encrypted>>,
    header: Mutex<Header>,
    /// The virtual size in bytes.
    size: AtomicU64,
    l1: Mutex<Arc<L1>>,
    pub(super) tables: Registry,
    pub(super) counts: Counts,
    /// Held by whoever changes entries, by cluster of the disk.
    pub(super) clusters: Arc<RangeLocks>,
    pub(super) members: Arc<Members>,
    pub(super) pending: Mutex<Pending>,
    pub(super) progress: super::commit::Progress,
    /// Notes of what a process that is killed would take with it, and whether they were begun or given up.
    pub(super) log: Log,
    pub(super) log_started: AtomicBool,
    pub(super) log_starting: Arc<RangeLocks>,
    /// The image's file.
    pub(super) path: PathBuf,
    /// Held by whoever looks for room for compressed data.
    pub(super) packing: Arc<RangeLocks>,
    pub(super) rest: Mutex<Rest>,
    corrupt: AtomicBool,
}

/// What has changed in memory and not on disk, but for counts.
#[derive(Default)]
pub(super) struct Pending {
    /// Tables with dirty pieces.
    pub(super) tables: Vec<Arc<Table>>,
    /// Entries of the L1 table; whether the table that one leads to must be durable before it is written, because its
    /// cluster does not read as zeroes.
    pub(super) l1: BTreeMap<u64, bool>,
    /// Clusters that lost a reference with a change that is not durable yet.
    pub(super) freed: Vec<u64>,
    /// The same where the change is durable.
    pub(super) reclaimable: Vec<u64>,
    /// Clusters that were taken by tasks that were given up. The kernel may still write to them, so they stay as they
    /// are until the image is closed.
    pub(super) orphans: Vec<u64>,
}

/// What an image is made of when it is opened.
pub(super) struct Parts {
    pub(super) label: String,
    pub(super) path: PathBuf,
    pub(super) header: Header,
    pub(super) backend: Arc<Backend>,
    pub(super) read_only: bool,
    pub(super) cache: Cache,
    pub(super) keep_space: bool,
    pub(super) data_file: Option<Arc<dyn Session>>,
    pub(super) backing: Option<Arc<dyn Session>>,
    pub(super) encrypted: Option<Arc<Encrypted>>,
    pub(super) l1: L1,
    pub(super) counts: Counts,
    /// Bytes that L2 tables in memory may take.
    pub(super) cache_bytes: Option<u64>,
    /// Note changes beside the image.
    pub(super) notes: bool,
}

impl Image {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { header, l1, cache_bytes, .. } = parts;
        let layout = header.layout();
        let all = l1.len().max(1);
        let bound = cache_bytes.map_or(all, |most| bytes(most / layout.cluster_size()).clamp(4, all.max(4)));
        Image {
            label: parts.label,
            layout,
            compression: header.compression,
            backend: parts.backend,
            read_only: parts.read_only,
            cache: parts.cache,
            keep_space: parts.keep_space,
            data_file: parts.data_file,
            below: Behind::new(parts.backing),
            encrypted: parts.encrypted,
            size: AtomicU64::new(header.size.next_multiple_of(512)),
            corrupt: AtomicBool::new(header.has(incompatible::CORRUPT)),
            header: Mutex::new(header),
            l1: Mutex::new(Arc::new(l1)),
            tables: Registry::new(bound),
            counts: parts.counts,
            clusters: Arc::default(),
            members: Arc::default(),
            pending: Mutex::default(),
            progress: super::commit::Progress::default(),
            log: Log::default(),
            log_started: AtomicBool::new(parts.read_only || !parts.notes),
            log_starting: Arc::default(),
            path: parts.path,
            packing: Arc::default(),
            rest: Mutex::default(),
        }
    }

    /// What channels lead to.
    pub(super) fn files(&self) -> Files<'_> {
        Files {
            backend: &self.backend,
            data_file: self.data_file.as_ref(),
            encrypted: self.encrypted.as_ref(),
        }
    }

    /// The header as it is on disk.
    pub(super) fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The virtual size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    /// The active L1 table. It is replaced in the exclusive state only.
    pub(super) fn l1(&self) -> Arc<L1> {
        self.l1.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_l1(&self, l1: L1) {
        *self.l1.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(l1);
    }

    /// The file's end, as far as its last cluster may reach.
    pub(super) fn file_end(&self) -> u64 {
        self.backend.size().next_multiple_of(self.layout.cluster_size())
    }

    /// The length of a file that has so many bytes at least.
    pub(super) fn whole_blocks(&self, len: u64) -> u64 {
        whole_blocks(&self.backend, len)
    }

    /// How many bytes of the disk the image behind it has.
    pub(super) fn backing_size(&self) -> u64 {
        self.below.size()
    }

    pub(super) fn is_corrupt(&self) -> bool {
        self.corrupt.load(Ordering::SeqCst)
    }

    /// Says that the image is corrupt: in the log once, in its header where it may be written to. Gives the error for
    /// whoever met it.
    pub(super) fn corrupted(&self, io: &Io, what: &str) -> Error {
        if !self.corrupt.swap(true, Ordering::SeqCst) {
            tracing::error!("{}: the image is corrupt: {what}; check and repair it", self.label);
            if !self.read_only && self.layout.version >= 3 {
                let features = {
                    let mut header = self.header();
                    header.incompatible |= incompatible::CORRUPT;
                    header.incompatible
                };
                let mut buffer = Buffer::new(8);
                buffer.bytes_mut().copy_from_slice(&features.to_be_bytes());
                let write = io.write(at::FEATURES, buffer, Arc::new(()));
                let label = self.label.clone();
                io.local.spawn(async move {
                    if let Err(error) = write.await {
                        tracing::warn!("{label}: cannot say in the image that it is corrupt: {error}");
                    }
                });
            }
        }
        corrupt(format!("the image is corrupt: {what}")).of(&self.label)
    }

    /// Writes a field of the header.
    pub(super) async fn write_header_field(&self, io: &Io, offset: u64, field: &[u8]) -> Result<()> {
        let mut buffer = Buffer::new(field.len());
        buffer.bytes_mut().copy_from_slice(field);
        io.write(offset, buffer, Arc::new(())).await
    }

    /// Makes what was written to the image's file durable.
    pub(super) async fn sync_file(&self, io: &Io) -> Result<()> {
        io.plain(&io.file, Operation::Flush, (0, 0), Flags::default()).await
    }

    /// Takes a reference away from each of these clusters, once what was changed before is durable.
    pub(super) fn free(&self, clusters: Range<u64>) {
        self.pending().freed.extend(clusters);
        self.progress.changed();
    }

    /// The table that maps an offset; `None` where there is none.
    pub(super) async fn table(&self, io: &Io, l1: &L1, offset: u64) -> Result<Option<Arc<Table>>> {
        let index = offset >> self.layout.l2_span_bits();
        if l1.get(index).offset() == 0 {
            return Ok(None);
        }
        if let Some(table) = self.tables.get(index) {
            return Ok(Some(table));
        }
        let _turn = self.hold_table(index).await;
        self.load_table(io, l1, index).await
    }

    /// Keeps others from reading, making or moving a table.
    async fn hold_table(&self, index: u64) -> RangeGuard {
        self.tables.changing.lock(index..index + 1).await
    }

    /// The same with the table held.
    async fn load_table(&self, io: &Io, l1: &L1, index: u64) -> Result<Option<Arc<Table>>> {
        if let Some(table) = self.tables.get(index) {
            return Ok(Some(table));
        }
        let offset = match l1.get(index).decode(&self.layout) {
            Ok(None) => return Ok(None),
            Ok(Some(offset)) => offset,
            Err(error) => return Err(self.corrupted(io, &format!("entry {index} of the L1 table: {error}"))),
        };
        let size = self.layout.cluster_size();
        if offset.checked_add(size).is_none_or(|end| end > self.backend.size()) {
            let message = format!("L2 table {index} is at {offset:#x}, beyond the end of the file");
            return Err(self.corrupted(io, &message));
        }
        let read = io.read(offset, self.layout.cluster_len()).await?;
        let table = Arc::new(self.looked_at(index, &read));
        self.tables.add(&table);
        Ok(Some(table))
    }

    /// The table out of its bytes.
    pub(super) fn looked_at(&self, index: u64, bytes: &[u8]) -> Table {
        let fine = Table::new(index, bytes, false);
        if self.is_sound(&fine) { fine } else { Table::new(index, bytes, true) }
    }

    /// Whether every entry of a table may be used without another look.
    fn is_sound(&self, table: &Table) -> bool {
        let state = self.counts.state();
        let mut metadata = state.metadata.look();
        let end = self.data_end();
        (0..self.layout.l2_entries()).all(|index| {
            let entry = table.get(&self.layout, index);
            entry == Entry::NONE || self.fault(entry, &mut metadata, end).is_none()
        })
    }

    /// Where guest clusters end, in bytes.
    fn data_end(&self) -> u64 {
        match &self.data_file {
            Some(data) => data.geometry().size.next_multiple_of(self.layout.cluster_size()),
            None => self.file_end(),
        }
    }

    /// What is wrong with an entry, if something is.
    fn fault(&self, entry: Entry, metadata: &mut Look<'_>, end: u64) -> Option<String> {
        let cluster = match entry.cluster.decode(&self.layout) {
            Ok(cluster) => cluster,
            Err(error) => return Some(error.to_string()),
        };
        if self.layout.extended_l2
            && let Err(error) = entry.parts.validate(cluster)
        {
            return Some(error.to_string());
        }
        let (from, to) = match cluster {
            Cluster::Unallocated | Cluster::Zero { host: None } => return None,
            Cluster::Zero { host: Some(host) } | Cluster::Data { host } => {
                (host, host + self.layout.cluster_size())
            }
            Cluster::Compressed(compressed) => (compressed.offset, compressed.offset.saturating_add(1)),
        };
        if to > end {
            return Some(format!("it leads to {from:#x}, beyond the end of the file"));
        }
        let first = from >> self.layout.cluster_bits;
        let last = match cluster {
            Cluster::Compressed(compressed) => (compressed.end() - 1) >> self.layout.cluster_bits,
            _ => first,
        };
        let inside = self.data_file.is_none() && (first..=last).any(|cluster| metadata.contains(cluster));
        inside.then(|| format!("it leads to {from:#x}, where the image has a table of its own"))
    }

    /// What makes an entry one that no correct image has.
    pub(super) fn fault_of(&self, entry: Entry) -> Option<String> {
        self.fault(entry, &mut self.counts.state().metadata.look(), self.data_end())
    }

    /// Whether an entry is one that no correct image has.
    pub(super) fn is_faulty(&self, entry: Entry) -> bool {
        self.fault_of(entry).is_some()
    }

    /// An error where an entry is one that no correct image has.
    pub(super) fn check_entry(&self, io: &Io, entry: Entry, offset: u64) -> Result<()> {
        let fault = self.fault_of(entry);
        let cluster = offset >> self.layout.cluster_bits;
        match fault {
            Some(fault) => {
                Err(self.corrupted(io, &format!("the entry of the disk's cluster {cluster}: {fault}")))
            }
            None => Ok(()),
        }
    }

    /// What a range of at most `most` bytes is mapped to, and for how many bytes.
    pub(super) async fn span(&self, io: &Io, l1: &L1, offset: u64, most: u64) -> Result<(Span, u64)> {
        let covered = self.layout.cluster_size() << self.layout.l2_bits();
        let most = most.min(covered - (offset & (covered - 1)));
        let Some(table) = self.table(io, l1, offset).await? else { return Ok((Span::Below, most)) };
        if table.suspect {
            self.check_entry(io, table.get(&self.layout, index_of(&self.layout, offset)), offset)?;
            let rest = self.layout.cluster_size() - (offset & self.layout.offset_mask());
            return Ok(span(&self.layout, &table, offset, most.min(rest)));
        }
        Ok(span(&self.layout, &table, offset, most))
    }

    /// The table that maps an offset, made or moved so that it may be changed.
    pub(super) async fn own_table(&self, io: &Io, l1: &L1, offset: u64) -> Result<Arc<Table>> {
        if !self.log_started.load(Ordering::Acquire) {
            self.start_log(io).await;
        }
        let index = offset >> self.layout.l2_span_bits();
        if l1.get(index).copied()
            && let Some(table) = self.tables.get(index)
        {
            return Ok(table);
        }
        let _turn = self.hold_table(index).await;
        let table = self.load_table(io, l1, index).await?;
        let old = l1.get(index);
        if let Some(table) = &table
            && old.copied()
        {
            return Ok(table.clone());
        }
        let run = self.allocate_table(io, 1).await?;
        let is_new = table.is_none();
        let table =
            table.unwrap_or_else(|| Arc::new(Table::new(index, &vec![0; self.layout.cluster_len()], false)));
        if is_new {
            self.tables.add(&table);
        }
        self.lead_to(l1, &table, run, is_new && run.zeroed);
        Ok(table)
    }

    /// Has an entry of the L1 table lead to where its table is to be from now on. `fresh`: the table has nothing, and its
    /// new place reads as that. The table is held, or nobody else uses the image.
    pub(super) fn lead_to(&self, l1: &L1, table: &Arc<Table>, run: Run, fresh: bool) {
        let (index, start) = (table.index, run.start);
        let old = l1.get(index);
        {
            // At once for commits: one that found the table without its place would write it where it is not, and one that
            // found the place without its table would write an entry that leads nowhere yet.
            let mut log = self.log.state();
            let mut pending = self.pending();
            let entry = L1Entry::new(start << self.layout.cluster_bits, true);
            log.note([Note::Table { index, entry: entry.0, old: old.offset() }].into_iter());
            if !fresh {
                (0..table.pieces()).for_each(|piece| table.dirty.mark(piece));
                if !table.listed.swap(true, Ordering::SeqCst) {
                    pending.tables.push(table.clone());
                }
            }
            l1.set(index, entry);
            pending.l1.insert(index, !fresh);
            if old.offset() != 0 {
                pending.freed.push(old.offset() >> self.layout.cluster_bits);
            }
        }
        self.progress.changed();
    }

    /// Puts a table on the list of those that are written next, after its pieces were marked.
    pub(super) fn list(&self, table: &Arc<Table>) {
        if !table.listed.swap(true, Ordering::SeqCst) {
            self.pending().tables.push(table.clone());
        }
    }

    /// Sets entries from `first` on. The caller holds their clusters and owns the table.
    pub(super) fn set_entries(&self, table: &Arc<Table>, first: usize, entries: &[Entry]) {
        // Until they are set and marked, no commit says that what is noted is durable.
        let mut log = self.log.state();
        let cluster = (table.index << self.layout.l2_bits()) + first as u64;
        // Compressed clusters come from tools, which do not go on when they are killed.
        let guests = entries.iter().zip(cluster..).filter(|(entry, _)| !entry.cluster.is_compressed());
        let note = |(entry, cluster): (&Entry, u64)| Note::Entry {
            cluster,
            entry: (entry.cluster.0, entry.parts.0),
        };
        log.note(guests.map(note));
        for (at, entry) in entries.iter().enumerate() {
            table.set(&self.layout, first + at, *entry);
        }
        let piece = |index| Table::piece_of(&self.layout, index);
        (piece(first)..=piece(first + entries.len() - 1)).for_each(|piece| table.dirty.mark(piece));
        self.list(table);
        self.progress.changed();
    }

    /// The clusters of the file that an entry refers to.
    pub(super) fn referred(&self, entry: Entry) -> Range<u64> {
        let bits = self.layout.cluster_bits;
        if self.data_file.is_some() {
            return 0..0;
        }
        entry.cluster.decode(&self.layout).map_or(0..0, |cluster| clusters_of(cluster, bits))
    }

    /// Takes what is freed back, for another time.
    pub(super) fn put_back_freed(&self, clusters: Vec<u64>) {
        if !clusters.is_empty() {
            self.pending().reclaimable.extend(clusters);
        }
    }

    /// The error of an image that may not be changed any more.
    pub(super) fn check_writable(&self) -> Result<()> {
        if self.is_corrupt() {
            let message = "the image is corrupt; check and repair it before it is written to";
            return Err(Error::new(ErrorKind::Corrupt, message).of(&self.label));
        }
        Ok(())
    }
}

/// The clusters of the file that a cluster of the disk takes.
#[inline]
pub(super) fn clusters_of(cluster: Cluster, cluster_bits: u32) -> Range<u64> {
    let bits = cluster_bits;
    match cluster {
        Cluster::Data { host } | Cluster::Zero { host: Some(host) } => host >> bits..(host >> bits) + 1,
        Cluster::Compressed(it) => it.offset >> bits..((it.end() - 1) >> bits) + 1,
        Cluster::Unallocated | Cluster::Zero { host: None } => 0..0,
    }
}

/// The length of a file that has so many bytes at least: whole blocks of its filesystem. The kernel zeroes the rest of a
/// block in its page cache, and a direct write that meets that page makes the next flush fail.
pub(super) fn whole_blocks(backend: &Backend, len: u64) -> u64 {
    len.next_multiple_of(u64::from(backend.geometry().physical_block_size).clamp(4096, 1 << 20))
}
