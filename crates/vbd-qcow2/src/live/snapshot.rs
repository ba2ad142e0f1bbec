//! Snapshots inside the image, made, applied and deleted while nobody else uses it.
//!
//! A snapshot is a copy of the L1 table; every cluster that can be reached through it has one reference more, so no entry
//! of the active tables is the only one and a write goes elsewhere. What counts say is durable before anything new leads
//! to a cluster, and the header's one sector says which tables are valid. While refcounts and the flags in the tables are
//! changed they do not fit together: the image says so (its dirty bit), and is repaired if the power goes meanwhile.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vbd_core::memory::Buffer;
use vbd_core::range_lock::RangeGuard;
use vbd_core::{Error, ErrorKind, Guard, Result, Snapshot};

use super::commit::Quiet;
use super::counts::{Freed, Run};
use super::grace::Exclusive;
use super::image::Image;
use super::io::{Io, MOST_AT_ONCE, Writes, bytes, corrupt, together};
use super::map::L1;
use super::walk::Walk;
use crate::format::{self, L1Entry, at, incompatible, limit, parse_snapshots};

/// Bytes of the snapshot table that are read at first.
const FIRST_READ: u64 = 64 << 10;
/// Tables that are read at once while guests go on.
const READERS: usize = 16;

impl Image {
    /// The snapshots as they are on disk, and how many bytes their table takes.
    pub(super) async fn snapshot_table(&self, io: &Io) -> Result<(Vec<format::Snapshot>, u64)> {
        let header = self.header().clone();
        read_table(io, &header, self.backend.size()).await
    }

    /// Keeps what the disk holds now.
    pub(super) async fn create_snapshot(self: &Arc<Self>, io: &Io, name: &str) -> Result<Snapshot> {
        if name.is_empty() || name.len() > usize::from(u16::MAX) || name.contains('\0') {
            return Err(refused("a snapshot has a name of 1 to 65535 bytes without a zero byte"));
        }
        if self.data_file.is_some() {
            return Err(refused(
                "an image with an external data file cannot have snapshots: its data would not be kept",
            ));
        }
        self.make_ready(io).await?;
        let alone = Alone::new(self, io).await?;
        let (mut snapshots, old_len) = self.snapshot_table(io).await?;
        if snapshots.iter().any(|other| other.name == name.as_bytes()) {
            return Err(refused(&format!("there is a snapshot named \"{name}\"")));
        }
        if snapshots.len() >= limit::SNAPSHOTS as usize {
            return Err(refused("the image has as many snapshots as its format allows"));
        }
        let entries: Vec<L1Entry> = self.l1().entries().map(|entry| entry.with_copied(false)).collect();
        snapshots.push(self.new_snapshot(name, &snapshots, entries.len()));
        let mut shared = 0;
        let made = async {
            let mut walk = Walk::active(self, io, &entries);
            // The first tables are read while the image is marked.
            walk.start()?;
            self.set_dirty(io, true).await?;
            self.share_all(io, walk, &mut shared, &alone).await?;
            self.add_snapshot(io, (&mut snapshots, old_len), &entries, &alone).await
        };
        match made.await {
            Ok(()) => Ok(told(self, snapshots.last().expect("just added"))),
            // What is on disk is not known, and nothing more is written.
            Err(error) if self.progress.check().is_err() => Err(error),
            Err(error) => {
                // Nothing on disk leads to it: what refers to it twice refers to it once.
                self.unshare_all(io, &entries[..shared]).await?;
                self.set_flags(io, &alone).await?;
                self.set_dirty(io, false).await?;
                Err(error)
            }
        }
    }

    /// A snapshot of now, which others are before; it is not said where its table is.
    fn new_snapshot(&self, name: &str, before: &[format::Snapshot], l1_entries: usize) -> format::Snapshot {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let ids = before.iter().filter_map(|other| std::str::from_utf8(&other.id).ok()?.parse::<u64>().ok());
        let id = ids.max().unwrap_or(0) + 1;
        format::Snapshot {
            l1_offset: 0,
            l1_entries: u32::try_from(l1_entries).unwrap_or(u32::MAX),
            id: id.to_string().into_bytes(),
            name: name.as_bytes().to_vec(),
            seconds: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
            nanoseconds: now.subsec_nanos(),
            guest_nanoseconds: 0,
            vm_state_size: 0,
            disk_size: Some(self.header().size),
            icount: None,
            extra: Vec::new(),
        }
    }

    /// Does, while guests go on, what they would else wait for: reads counts and tables, as many as may be kept, and brings
    /// to the disk what waits for that.
    async fn make_ready(self: &Arc<Self>, io: &Io) -> Result<()> {
        if self.read_only || !self.members.are_there() {
            return Ok(());
        }
        self.load_all_counts(io).await?;
        let l1 = self.l1();
        let is_missing = |index: &u64| l1.get(*index).offset() != 0 && !self.tables.has(*index);
        let missing: Vec<u64> = (0..l1.len() as u64).filter(is_missing).take(self.tables.room()).collect();
        let each = missing.len().div_ceil(READERS).max(1);
        let read = async |indices: &[u64]| {
            for index in indices {
                self.table(io, &l1, index << self.layout.l2_span_bits()).await?;
            }
            Ok(())
        };
        together(missing.chunks(each).map(read).collect()).await?;
        self.commit(io).await
    }

    /// Adds a reference to all that the active tables lead to, none of which is the only one to do so then: their flags
    /// say that, on disk too, if not durably. `shared` are the entries of the L1 table that this is done for.
    async fn share_all(&self, io: &Io, mut walk: Walk<'_>, shared: &mut usize, alone: &Alone) -> Result<()> {
        let (mut writes, keep) = (Writes::default(), alone.guard());
        let walked = async {
            while let Some(mut visit) = walk.next().await? {
                self.refer(io, &visit.clusters(self, io)?).await?;
                *shared = visit.index + 1;
                let changed = visit.set_flags(&self.layout, |_| false);
                if let Some(visit) = visit.write((self, io), changed, (&mut writes, &keep)).await {
                    walk.done(visit);
                }
                self.write_if_much(io, &keep).await?;
            }
            let l1 = self.l1();
            for (index, entry) in (0..).zip(l1.entries()) {
                self.set_l1_entry(&l1, index, entry.with_copied(false));
            }
            self.write_entries(io, &keep).await
        };
        let walked = walked.await;
        let ended = writes.end().await;
        walked.and(ended)
    }

    /// Writes entries that were changed before there are too many.
    async fn write_if_much(&self, io: &Io, keep: &Guard) -> Result<()> {
        if self.pending().tables.len() > MOST_AT_ONCE / self.layout.cluster_len() {
            self.write_entries(io, keep).await?;
        }
        Ok(())
    }

    /// Changes an entry of the active L1 table. Nobody else does.
    fn set_l1_entry(&self, l1: &L1, index: u64, entry: L1Entry) {
        if l1.get(index) != entry {
            let mut pending = self.pending();
            l1.set(index, entry);
            pending.l1.entry(index).or_default();
        }
    }

    /// Writes the L1 table of a new snapshot, the last of these, and the table of all snapshots, and has the header lead
    /// there: with one write, which also says that refcounts are right.
    async fn add_snapshot(
        self: &Arc<Self>,
        io: &Io,
        (snapshots, old_len): (&mut [format::Snapshot], u64),
        entries: &[L1Entry],
        alone: &Alone,
    ) -> Result<()> {
        let bits = self.layout.cluster_bits;
        let header = self.header().clone();
        let mut new = NewTables { image: self, runs: Vec::new() };
        let mut writes = Writes::default();
        let written = async {
            let copy = new.add(io, &l1_bytes(entries), &mut writes, alone).await?;
            if let Some(snapshot) = snapshots.last_mut() {
                snapshot.l1_offset = copy.start << bits;
            }
            let table = format::encode_snapshots(&header, snapshots);
            if table.len() as u64 > limit::SNAPSHOT_TABLE_BYTES {
                return Err(refused("the snapshot table is as long as its format allows"));
            }
            let table = new.add(io, &table, &mut writes, alone).await?;
            self.write_counts(io).await?;
            Ok(table.start << bits)
        };
        let written = written.await;
        let ended = writes.end().await;
        let place = ended.and(written)?;
        self.sync_file(io).await?;
        let count = u32::try_from(snapshots.len()).unwrap_or(u32::MAX);
        let features = self.header().incompatible & !incompatible::DIRTY;
        let mut fields = [&count.to_be_bytes()[..], &place.to_be_bytes()[..]].concat();
        if self.layout.version >= 3 {
            // They follow.
            fields.extend(features.to_be_bytes());
        }
        new.runs.clear();
        self.switch(io, at::SNAPSHOTS, &fields).await?;
        {
            let mut header = self.header();
            (header.snapshots, header.snapshots_offset) = (count, place);
            header.incompatible = features;
        }
        // It is made, whatever becomes of the room of the old table.
        if let Err(error) = self.forget_snapshot_table(io, &header, old_len).await {
            tracing::warn!("{}: cannot give space back now: {error}", self.label);
        }
        Ok(())
    }

    /// Gives the clusters of a snapshot table back that the header led to before.
    async fn forget_snapshot_table(
        self: &Arc<Self>,
        io: &Io,
        before: &format::Header,
        len: u64,
    ) -> Result<()> {
        if before.snapshots > 0 {
            let first = before.snapshots_offset >> self.layout.cluster_bits;
            let clusters = (first..first + self.layout.clusters(len)).collect();
            // Where no flag changes either, this alone is left for the end of the session to write.
            self.reclaim(io, Freed::new(self, clusters)).await?;
        }
        Ok(())
    }

    /// Says in the image that its refcounts may be wrong, or are right again. While they and the flags in the tables are
    /// changed they do not fit together, and a power cut may come; version 2 has no way to say so.
    async fn set_dirty(&self, io: &Io, dirty: bool) -> Result<()> {
        if self.layout.version < 3 {
            return Ok(());
        }
        let features = {
            let header = self.header();
            if dirty {
                header.incompatible | incompatible::DIRTY
            } else {
                header.incompatible & !incompatible::DIRTY
            }
        };
        self.switch(io, at::FEATURES, &features.to_be_bytes()).await?;
        self.header().incompatible = features;
        Ok(())
    }

    /// Gives the disk what it held at a snapshot.
    pub(super) async fn apply_snapshot(self: &Arc<Self>, io: &Io, wanted: &str) -> Result<()> {
        self.make_ready(io).await?;
        let alone = Alone::new(self, io).await?;
        let (snapshots, _) = self.snapshot_table(io).await?;
        let snapshot = &snapshots[find(&snapshots, wanted)?];
        let size = snapshot.disk_size.unwrap_or(self.header().size);
        if size != self.header().size {
            let message =
                format!("the disk had {size} bytes then and has {} now; resize it first", self.header().size);
            return Err(refused(&message));
        }
        let mut entries = self.l1_of(io, snapshot).await?;
        entries.resize(entries.len().max(self.l1().len()), L1Entry(0));
        let old: Vec<L1Entry> = self.l1().entries().collect();
        self.set_dirty(io, true).await?;
        if let Err(error) = self.refer_all(io, &entries).await {
            self.set_dirty(io, false).await?;
            return Err(error);
        }
        let made = self.write_l1_copy(io, &entries, &alone).await;
        let run = match made {
            Ok(run) => run,
            Err(error) => {
                self.unrefer_all(io, &entries).await?;
                self.write_counts(io).await?;
                self.set_dirty(io, false).await?;
                return Err(error);
            }
        };
        let (offset, len) = {
            let header = self.header();
            (header.l1_offset, header.l1_bytes())
        };
        let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        let place = run.start << self.layout.cluster_bits;
        let fields = [&count.to_be_bytes()[..], &place.to_be_bytes()[..]].concat();
        self.switch(io, at::L1, &fields).await?;
        {
            let mut header = self.header();
            (header.l1_entries, header.l1_offset) = (count, place);
        }
        self.tables.clear();
        self.set_l1(L1::new(entries.iter().map(|entry| entry.0)));
        // Whoever made the snapshot may have left flags in its tables.
        self.set_flags(io, &alone).await?;
        self.unrefer_all(io, &old).await?;
        let first = offset >> self.layout.cluster_bits;
        let clusters = (first..first + self.layout.clusters(len)).collect();
        self.reclaim(io, Freed::new(self, clusters)).await?;
        self.set_flags(io, &alone).await?;
        self.set_dirty(io, false).await
    }

    /// Forgets a snapshot.
    pub(super) async fn delete_snapshot(self: &Arc<Self>, io: &Io, wanted: &str) -> Result<()> {
        self.make_ready(io).await?;
        let alone = Alone::new(self, io).await?;
        let (mut snapshots, _) = self.snapshot_table(io).await?;
        let gone = snapshots.remove(find(&snapshots, wanted)?);
        let entries = self.l1_of(io, &gone).await?;
        self.set_dirty(io, true).await?;
        self.write_snapshot_table(io, &snapshots, &alone).await?;
        self.unrefer_all(io, &entries).await?;
        let first = gone.l1_offset >> self.layout.cluster_bits;
        let clusters = (first..first + self.layout.clusters(u64::from(gone.l1_entries) * 8)).collect();
        self.reclaim(io, Freed::new(self, clusters)).await?;
        self.set_flags(io, &alone).await?;
        self.set_dirty(io, false).await
    }

    /// The L1 table of a snapshot.
    pub(super) async fn l1_of(&self, io: &Io, snapshot: &format::Snapshot) -> Result<Vec<L1Entry>> {
        snapshot.validate(&self.header()).map_err(|error| corrupt(error.to_string()))?;
        let len = u64::from(snapshot.l1_entries) * 8;
        if len == 0 {
            return Ok(Vec::new());
        }
        if snapshot.l1_offset.checked_add(len).is_none_or(|end| end > self.backend.size()) {
            return Err(corrupt("the L1 table of a snapshot is beyond the end of the file"));
        }
        let table = io.read(snapshot.l1_offset, bytes(len)).await?;
        let entry = |bytes: &[u8]| {
            L1Entry(u64::from_be_bytes(bytes.try_into().expect("eight bytes"))).with_copied(false)
        };
        Ok(table.chunks_exact(8).map(entry).collect())
    }

    /// Adds a reference to all that L1 entries lead to, or to none of it.
    async fn refer_all(&self, io: &Io, entries: &[L1Entry]) -> Result<()> {
        let mut done = 0;
        let referred = async {
            let mut walk = Walk::new(self, io, entries);
            while let Some(visit) = walk.next().await? {
                self.refer(io, &visit.clusters(self, io)?).await?;
                done = visit.index + 1;
                walk.done(visit);
            }
            Ok(())
        };
        if let Err(error) = referred.await {
            self.unshare_all(io, &entries[..done]).await?;
            return Err(error);
        }
        Ok(())
    }

    /// Takes a reference away from all that L1 entries lead to, which keeps others.
    async fn unshare_all(&self, io: &Io, entries: &[L1Entry]) -> Result<()> {
        let mut walk = Walk::new(self, io, entries);
        while let Some(visit) = walk.next().await? {
            self.unrefer(io, &visit.clusters(self, io)?).await?;
            walk.done(visit);
        }
        Ok(())
    }

    /// Takes a reference away from all that L1 entries lead to, and gives back what had no other.
    async fn unrefer_all(self: &Arc<Self>, io: &Io, entries: &[L1Entry]) -> Result<()> {
        let mut walk = Walk::new(self, io, entries);
        while let Some(visit) = walk.next().await? {
            let last = self.unrefer_shared(io, &visit.clusters(self, io)?).await?;
            walk.done(visit);
            if !last.is_empty() {
                self.reclaim(io, Freed::new(self, last)).await?;
            }
        }
        Ok(())
    }

    /// Makes every flag of the active tables say whether its cluster has one reference, durably, and so all counts.
    async fn set_flags(&self, io: &Io, alone: &Alone) -> Result<()> {
        let l1 = self.l1();
        let entries: Vec<L1Entry> = l1.entries().collect();
        let (mut writes, keep) = (Writes::default(), alone.guard());
        let walked = async {
            let mut walk = Walk::active(self, io, &entries);
            while let Some(mut visit) = walk.next().await? {
                self.load_counts(io, &visit.clusters(self, io)?).await?;
                let changed = {
                    let state = self.counts.state();
                    let index = visit.index as u64;
                    let copied = state.is_alone(visit.place(&self.layout));
                    self.set_l1_entry(&l1, index, l1.get(index).with_copied(copied));
                    visit.set_flags(&self.layout, |cluster| state.is_alone(cluster))
                };
                if let Some(visit) = visit.write((self, io), changed, (&mut writes, &keep)).await {
                    walk.done(visit);
                }
                self.write_if_much(io, &keep).await?;
            }
            self.write_entries(io, &keep).await?;
            self.write_counts(io).await
        };
        let walked = walked.await;
        let ended = writes.end().await;
        walked.and(ended)?;
        self.sync_file(io).await
    }

    /// Writes an L1 table to new clusters, durably. Nothing leads there yet.
    pub(super) async fn write_l1_copy(&self, io: &Io, entries: &[L1Entry], alone: &Alone) -> Result<Run> {
        self.write_table(io, &l1_bytes(entries), alone).await
    }

    /// Writes a table to new clusters, and makes it and all counts durable.
    async fn write_table(&self, io: &Io, table: &[u8], alone: &Alone) -> Result<Run> {
        let mut new = NewTables { image: self, runs: Vec::new() };
        let mut writes = Writes::default();
        let written = async {
            let run = new.add(io, table, &mut writes, alone).await?;
            self.write_counts(io).await?;
            Ok(run)
        };
        let written = written.await;
        let ended = writes.end().await;
        let run = ended.and(written)?;
        self.sync_file(io).await?;
        new.runs.clear();
        Ok(run)
    }

    /// Writes the snapshot table anew, and gives the old one back.
    async fn write_snapshot_table(
        self: &Arc<Self>,
        io: &Io,
        snapshots: &[format::Snapshot],
        alone: &Alone,
    ) -> Result<()> {
        let header = self.header().clone();
        let (_, old_len) = self.snapshot_table(io).await?;
        let count = u32::try_from(snapshots.len()).unwrap_or(u32::MAX);
        let mut place = 0;
        if count > 0 {
            let table = format::encode_snapshots(&header, snapshots);
            if table.len() as u64 > limit::SNAPSHOT_TABLE_BYTES {
                return Err(refused("the snapshot table is as long as its format allows"));
            }
            let new = self.write_table(io, &table, alone).await?;
            place = new.start << self.layout.cluster_bits;
        } else {
            self.write_counts(io).await?;
        }
        let fields = [&count.to_be_bytes()[..], &place.to_be_bytes()[..]].concat();
        self.switch(io, at::SNAPSHOTS, &fields).await?;
        {
            let mut header = self.header();
            (header.snapshots, header.snapshots_offset) = (count, place);
        }
        self.forget_snapshot_table(io, &header, old_len).await
    }

    /// Changes a field of the header durably. Where that fails nobody knows which tables are valid, so nothing more is
    /// written.
    pub(super) async fn switch(&self, io: &Io, offset: u64, field: &[u8]) -> Result<()> {
        let written = async {
            self.write_header_field(io, offset, field).await?;
            self.sync_file(io).await
        };
        written.await.inspect_err(|_| self.progress.lose())
    }
}

/// Clusters of tables that nothing leads to yet, and that are given back in that case. No write to them is under way.
struct NewTables<'a> {
    image: &'a Image,
    runs: Vec<Run>,
}

impl NewTables<'_> {
    /// Takes clusters for a table, and starts to write it there.
    async fn add(&mut self, io: &Io, table: &[u8], writes: &mut Writes, alone: &Alone) -> Result<Run> {
        let layout = &self.image.layout;
        let run = self.image.allocate_table(io, layout.clusters(table.len() as u64).max(1)).await?;
        self.runs.push(run);
        let mut buffer = Buffer::new(bytes(run.count << layout.cluster_bits));
        buffer.bytes_mut()[..table.len()].copy_from_slice(table);
        let keep = alone.guard();
        writes.add(buffer.len(), || io.write(run.start << layout.cluster_bits, buffer, keep)).await;
        Ok(run)
    }
}

impl Drop for NewTables<'_> {
    fn drop(&mut self) {
        self.runs.drain(..).for_each(|run| self.image.give_back(run));
    }
}

fn l1_bytes(entries: &[L1Entry]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.0.to_be_bytes()).collect()
}

/// Nobody uses the image, nothing is pending, and nothing runs.
pub(super) struct Alone {
    quiet: Quiet,
    _reclaims: RangeGuard,
    _exclusive: Exclusive,
}

impl Alone {
    pub(super) async fn new(image: &Arc<Image>, io: &Io) -> Result<Self> {
        if image.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the image is open for reading only"));
        }
        image.check_writable()?;
        image.progress.check()?;
        let exclusive = image.members.exclusive().await;
        let reclaims = image.hold_reclaims().await;
        let quiet = Quiet::new(image).await;
        if !image.progress.is_clean() {
            image.commit_now(io, quiet.guard()).await?;
        }
        // A count that is still to fall would make a flag wrong.
        let freed = std::mem::take(&mut image.pending().reclaimable);
        image.reclaim(io, Freed::new(image, freed)).await?;
        Ok(Alone { quiet, _reclaims: reclaims, _exclusive: exclusive })
    }

    fn guard(&self) -> Guard {
        self.quiet.guard()
    }
}

/// The snapshots of an image, and how many bytes their table takes. The file has `end` bytes.
pub(super) async fn read_table(
    io: &Io,
    header: &format::Header,
    end: u64,
) -> Result<(Vec<format::Snapshot>, u64)> {
    if header.snapshots == 0 {
        return Ok((Vec::new(), 0));
    }
    let there = end.saturating_sub(header.snapshots_offset).min(limit::SNAPSHOT_TABLE_BYTES);
    let mut len = FIRST_READ.min(there);
    loop {
        let table = io.read(header.snapshots_offset, bytes(len)).await?;
        match parse_snapshots(header, &table) {
            Err(format::Error::Truncated { .. }) if len < there => len = (len * 4).min(there),
            Err(error) => return Err(corrupt(error.to_string())),
            Ok((snapshots, taken)) => return Ok((snapshots, taken as u64)),
        }
    }
}

/// The place of a snapshot, by its name or number.
fn find(snapshots: &[format::Snapshot], wanted: &str) -> Result<usize> {
    let wanted = wanted.as_bytes();
    let place = snapshots.iter().position(|snapshot| snapshot.name == wanted);
    let place = place.or_else(|| snapshots.iter().position(|snapshot| snapshot.id == wanted));
    place.ok_or_else(|| {
        let names: Vec<_> = snapshots.iter().take(20).map(|one| String::from_utf8_lossy(&one.name)).collect();
        let there = if names.is_empty() {
            "there is none".to_owned()
        } else {
            format!("there are: {}", names.join(", "))
        };
        refused(&format!("there is no snapshot \"{}\"; {there}", String::from_utf8_lossy(wanted)))
    })
}

/// A snapshot as others are told of it.
pub(super) fn told(image: &Image, snapshot: &format::Snapshot) -> Snapshot {
    let since = Duration::new(snapshot.seconds.into(), snapshot.nanoseconds.min(999_999_999));
    Snapshot {
        id: String::from_utf8_lossy(&snapshot.id).into_owned(),
        name: String::from_utf8_lossy(&snapshot.name).into_owned(),
        date: UNIX_EPOCH + since,
        size: snapshot.disk_size.unwrap_or(image.header().size),
        state: snapshot.vm_state_size,
    }
}

fn refused(message: &str) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}
