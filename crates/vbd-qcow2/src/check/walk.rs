//! Everything that an image uses: each structure that its header leads to is looked at, and each cluster of it claimed.

use std::collections::{BTreeMap, BTreeSet};

use super::Result;
use super::counts::{Counts, Kind};
use super::image::Image;
use super::report::{Class, Report};
use crate::format::{BitmapTableEntry, Cluster, L1Entry, L2Entry, Malformed, Subclusters, be64, limit};
use crate::storage::Source;

/// L2 tables that are remembered before they are read: those that several L1 tables lead to are read once.
const BATCH: usize = 1 << 20;

/// One way through an image.
pub(super) struct Walk<'a, 'b, S: Source + ?Sized> {
    pub(super) image: &'a Image<'b, S>,
    pub(super) counts: Counts,
    pub(super) report: &'a mut Report,
    /// Whether this is the first way through, on which what is found outside the counts is told.
    pub(super) first: bool,
    /// Whether the refcount structure is left out, since a new one is made.
    pub(super) without_refcounts: bool,
    walked: Walked,
    tables: BTreeMap<u64, Use>,
}

/// What was seen on the way.
#[derive(Default)]
pub(super) struct Walked {
    /// Whether something else is where the refcount structure is, or it is malformed.
    pub(super) refcounts_damaged: bool,
    /// Clusters of the window that are used for two things.
    pub(super) overlaps: BTreeSet<u64>,
}

/// How an L2 table is used.
#[derive(Clone, Copy)]
struct Use {
    /// Entries that lead to it.
    times: u64,
    /// The index of an entry of the active L1 table that leads to it.
    active: Option<u64>,
}

impl<'a, 'b, S: Source + ?Sized> Walk<'a, 'b, S> {
    pub(super) fn new(image: &'a Image<'b, S>, counts: Counts, report: &'a mut Report, first: bool) -> Self {
        Walk {
            image,
            counts,
            report,
            first,
            without_refcounts: false,
            walked: Walked::default(),
            tables: BTreeMap::new(),
        }
    }

    /// The counts, and what was seen.
    pub(super) fn finish(self) -> (Counts, Walked) {
        (self.counts, self.walked)
    }

    /// Looks at all of the image.
    pub(super) fn all(&mut self) -> Result<()> {
        let (image, header) = (self.image, &self.image.header);
        self.claim(Kind::Header, 0, image.layout.cluster_size());
        self.refcounts();
        if let Some(crypto) = header.crypto() {
            self.claim(Kind::Luks, crypto.offset, crypto.length.max(1));
        }
        self.claim(Kind::L1Table, header.l1_offset, header.l1_bytes());
        self.l1_table(header.l1_offset, header.l1_entries, None)?;
        if !image.snapshots.is_empty() {
            self.claim(Kind::SnapshotTable, header.snapshots_offset, image.snapshot_bytes);
        }
        let mut budget = image.length;
        for (index, snapshot) in image.snapshots.iter().enumerate() {
            let whole = header.version < 3 || snapshot.disk_size.is_some();
            if let Err(error) = snapshot.validate(header) {
                self.found(Class::Snapshot, || (format!("snapshot {index}"), error.to_string()));
            } else if !whole {
                self.found(Class::Snapshot, || {
                    let reason = "it does not tell the size of its disk, as version 3 demands".to_owned();
                    (format!("snapshot {index}"), reason)
                });
            }
            if !image.can_follow(snapshot) {
                self.report.incomplete = true;
                continue;
            }
            if !self.afford(&mut budget, u64::from(snapshot.l1_entries) * 8, "the L1 tables of snapshots") {
                break;
            }
            self.claim(Kind::SnapshotL1, snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8);
            self.l1_table(snapshot.l1_offset, snapshot.l1_entries, Some(index))?;
        }
        self.l2_tables()?;
        self.bitmaps()
    }

    /// Whether tables that share nothing can be so large in this file: otherwise they lie over each other, and looking at
    /// all of them would take for ever.
    fn afford(&mut self, budget: &mut u64, bytes: u64, what: &str) -> bool {
        match budget.checked_sub(bytes) {
            Some(rest) => *budget = rest,
            None => {
                self.report.incomplete = true;
                self.found(Class::Overlap, || {
                    (what.to_owned(), "together they are larger than the file, so they overlap".to_owned())
                });
                return false;
            }
        }
        true
    }

    /// Adds to the report what is found on the first way.
    fn found(&mut self, class: Class, text: impl FnOnce() -> (String, String)) {
        if self.first {
            self.report.add(class, 1, text);
        }
    }

    /// Claims all clusters of a range, so often as entries lead to it.
    fn claim_times(&mut self, kind: Kind, offset: u64, length: u64, times: u64) {
        if length == 0 {
            return;
        }
        let (image, bits) = (self.image, self.image.layout.cluster_bits);
        if !image.holds(offset, length) {
            self.found(Class::BeyondEnd, || {
                let reason = format!("it ends behind the end of the file, {:#x}", image.length);
                (format!("{} at {offset:#x}, {length} bytes", kind.text()), reason)
            });
            self.walked.refcounts_damaged |= kind.is_refcount();
            // What is not there cannot be followed; what only holds data is no more than lost.
            self.report.incomplete |=
                !matches!(kind, Kind::Data | Kind::Compressed | Kind::BitmapData) && !kind.is_refcount();
        }
        let end = offset.saturating_add(length).min(limit::SIZE);
        // A count behind all that can be counted is no use, and the entry that leads there was told.
        let clusters = offset >> bits..(end.div_ceil(1 << bits)).min(self.end_of_counts());
        for cluster in clusters {
            if let Some(other) = self.counts.add(cluster, kind, times) {
                self.walked.refcounts_damaged |= kind.is_refcount() || other.is_refcount();
                self.walked.overlaps.insert(cluster);
                self.report.add(Class::Overlap, 1, || {
                    let two = format!("it is used for {} and for {}", other.text(), kind.text());
                    (format!("the cluster at {:#x}", cluster << bits), two)
                });
            }
        }
    }

    /// The first cluster that is counted no more: behind both the file and what the refcount table reaches.
    pub(super) fn end_of_counts(&self) -> u64 {
        self.image.layout.clusters(self.image.length).max(self.image.countable())
    }

    fn claim(&mut self, kind: Kind, offset: u64, length: u64) {
        self.claim_times(kind, offset, length, 1);
    }

    fn refcounts(&mut self) {
        let (image, header) = (self.image, &self.image.header);
        if self.without_refcounts {
            return;
        }
        if header.refcount_table_clusters == 0 {
            self.walked.refcounts_damaged = true;
            self.found(Class::Header, || ("the header".to_owned(), "there is no refcount table".to_owned()));
        }
        self.claim(Kind::RefcountTable, header.refcount_table_offset, header.refcount_table_bytes());
        for (index, entry) in image.refcount_table.iter().enumerate() {
            let place = || format!("entry {index} of the refcount table, {:#x}", entry.0);
            if entry.reserved() != 0 {
                self.walked.refcounts_damaged = true;
                self.found(Class::Entry, || {
                    (place(), format!("reserved bits {:#x} are set", entry.reserved()))
                });
            }
            match entry.decode(&image.layout) {
                Ok(Some(offset)) => self.claim(Kind::RefcountBlock, offset, image.layout.cluster_size()),
                Ok(None) => {}
                Err(error) => {
                    self.walked.refcounts_damaged = true;
                    self.found(Class::Entry, || (place(), error.to_string()));
                }
            }
        }
    }

    fn l1_table(&mut self, offset: u64, entries: u32, snapshot: Option<usize>) -> Result<()> {
        let image = self.image;
        image.entries(offset, entries.into(), |index, entry| {
            let entry = L1Entry(entry);
            let place = || match snapshot {
                None => format!("entry {index} of the L1 table, {:#x}", entry.0),
                Some(number) => format!("entry {index} of the L1 table of snapshot {number}, {:#x}", entry.0),
            };
            if entry.reserved() != 0 {
                self.found(Class::Entry, || {
                    (place(), format!("reserved bits {:#x} are set", entry.reserved()))
                });
            }
            if entry.copied() && entry.offset() == 0 {
                self.found(Class::Entry, || {
                    (place(), "it has a flag of a table, and leads to none".to_owned())
                });
            }
            match entry.decode(&image.layout) {
                Ok(Some(table)) => {
                    let used = self.tables.entry(table).or_insert(Use { times: 0, active: None });
                    used.times += 1;
                    if snapshot.is_none() {
                        used.active.get_or_insert(index);
                    }
                    if self.tables.len() >= BATCH { self.l2_tables() } else { Ok(()) }
                }
                Ok(None) => Ok(()),
                Err(error) => {
                    self.report.incomplete = true;
                    self.found(Class::Entry, || (place(), error.to_string()));
                    Ok(())
                }
            }
        })
    }

    /// Looks at the L2 tables that are remembered, in the order of the file.
    fn l2_tables(&mut self) -> Result<()> {
        let mut bytes = vec![0; self.image.layout.cluster_len()];
        for (table, used) in std::mem::take(&mut self.tables) {
            self.claim_times(Kind::L2Table, table, self.image.layout.cluster_size(), used.times);
            if table < self.image.length {
                self.image.read(table, &mut bytes)?;
                self.l2_table(table, used, &bytes);
            }
        }
        Ok(())
    }

    fn l2_table(&mut self, table: u64, used: Use, bytes: &[u8]) {
        let layout = self.image.layout;
        for (index, raw) in bytes.chunks_exact(layout.l2_entry_size()).enumerate() {
            let entry = L2Entry(be64(raw, 0));
            let bitmap = Subclusters(if layout.extended_l2 { be64(raw, 8) } else { 0 });
            if entry.0 == 0 && bitmap.0 == 0 {
                continue;
            }
            let guest =
                used.active.map(|l1| (l1 << layout.l2_span_bits()) + ((index as u64) << layout.cluster_bits));
            self.l2_entry(&Place { table, index, guest, entry }, bitmap, used.times);
        }
    }

    fn l2_entry(&mut self, place: &Place, bitmap: Subclusters, times: u64) {
        let (layout, entry) = (self.image.layout, place.entry);
        if entry.reserved() != 0 {
            self.found(Class::Entry, || {
                (place.text(), format!("reserved bits {:#x} are set", entry.reserved()))
            });
        }
        let cluster = match entry.decode(&layout) {
            Ok(cluster) => cluster,
            Err(error) => {
                self.found(Class::Entry, || (place.text(), error.to_string()));
                // Where a part of the offset can be believed, the cluster stays claimed.
                if let Malformed::ZeroFlag = error {
                    self.data(place, entry.offset(), times);
                }
                return;
            }
        };
        if layout.extended_l2
            && let Err(error) = bitmap.validate(cluster)
        {
            self.found(Class::Entry, || (place.text(), error.to_string()));
        }
        let active = self.first && place.guest.is_some();
        self.report.allocated +=
            u64::from(active && !matches!(cluster, Cluster::Unallocated | Cluster::Zero { host: None }));
        match cluster {
            Cluster::Unallocated | Cluster::Zero { host: None } => {}
            Cluster::Data { host } | Cluster::Zero { host: Some(host) } => self.data(place, host, times),
            Cluster::Compressed(compressed) => {
                self.report.compressed += u64::from(active);
                if entry.copied() {
                    self.found(Class::Copied, || {
                        let reason = "a compressed cluster has the flag that it is used once".to_owned();
                        (place.text(), reason)
                    });
                }
                self.claim_times(Kind::Compressed, compressed.offset, compressed.length, times);
            }
        }
    }

    fn data(&mut self, place: &Place, host: u64, times: u64) {
        if !self.image.layout.data_file {
            if host != 0 {
                self.claim_times(Kind::Data, host, self.image.layout.cluster_size(), times);
            }
        } else if let Some(guest) = place.guest
            && guest != host
        {
            self.found(Class::Entry, || {
                let reason = "in an external data file, a cluster is where the guest has it".to_owned();
                (place.text(), reason)
            });
        }
    }

    fn bitmaps(&mut self) -> Result<()> {
        let image = self.image;
        if let Some(extension) = image.header.bitmaps()
            && !image.bitmaps.is_empty()
        {
            self.claim(Kind::BitmapDirectory, extension.directory_offset, extension.directory_size);
        }
        let mut budget = image.length;
        for bitmap in &image.bitmaps {
            let (offset, entries) = (bitmap.table_offset, u64::from(bitmap.table_entries));
            let place = || format!("the table of bitmap \"{}\"", bitmap.text());
            if !image.can_follow_bitmap(bitmap) {
                self.report.incomplete = true;
                self.found(Class::Bitmap, || {
                    (place(), format!("there can be none at {offset:#x} with {entries} entries"))
                });
                continue;
            }
            let wanted = bitmap.clusters(&image.layout, image.header.size);
            // One that was not saved need not know of the disk's present size.
            if entries != wanted && !bitmap.flags.in_use {
                self.found(Class::Bitmap, || {
                    (place(), format!("it has {entries} entries, and the disk's size needs {wanted}"))
                });
            }
            if !self.afford(&mut budget, entries * 8, "the tables of bitmaps") {
                break;
            }
            self.claim(Kind::BitmapTable, offset, entries * 8);
            image.entries(offset, entries, |index, entry| {
                let entry = BitmapTableEntry(entry);
                let place = || format!("entry {index} of {}, {:#x}", place(), entry.0);
                if entry.reserved() != 0 {
                    self.found(Class::Bitmap, || {
                        (place(), format!("reserved bits {:#x} are set", entry.reserved()))
                    });
                }
                match entry.decode(&image.layout) {
                    Ok(Some(bits)) => self.claim(Kind::BitmapData, bits, image.layout.cluster_size()),
                    Ok(None) => {}
                    Err(error) => self.found(Class::Bitmap, || (place(), error.to_string())),
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// An L2 entry, for messages.
struct Place {
    table: u64,
    index: usize,
    guest: Option<u64>,
    entry: L2Entry,
}

impl Place {
    fn text(&self) -> String {
        let guest = self.guest.map_or(String::new(), |guest| format!(" (guest offset {guest:#x})"));
        format!("entry {} of the L2 table at {:#x}{guest}, {:#x}", self.index, self.table, self.entry.0)
    }
}
