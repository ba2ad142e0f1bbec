//! Compacting: what lies at the end of the file is moved to where it is free before, and the file is cut off behind the rest.
//!
//! A few clusters at a time are moved in the exclusive state: copied, and led to anew as a write to a new cluster does it, so
//! what holds for that under a power cut holds here. In between guests go on. Only what has one reference is moved: guest
//! data and tables of the disk as it is now. What snapshots share, compressed clusters and bitmaps stay where they are.

use std::sync::Arc;

use vbd_core::memory::Buffer;
use vbd_core::{Error, ErrorKind, Operation, Result, Watch};

use super::counts::Run;
use super::image::Image;
use super::io::{Io, Part, all};
use super::map::{Entry, L1, index_of};
use super::session::Qcow2Session;
use super::snapshot::Alone;
use super::worker::Worker;
use crate::format::{Cluster, L1Entry, L2Entry, at};

/// Bytes that are moved while guests wait.
const BATCH: u64 = 4 << 20;

/// How often it is begun anew at most.
const MOST_ROUNDS: usize = 4;

/// Something that lies behind where everything could end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Far {
    /// Its cluster of the file.
    host: u64,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// A cluster of the disk, by its number.
    Data(u64),
    /// An L2 table, by its index.
    Table(u64),
}

impl Qcow2Session {
    /// Makes the file as short as it can be: its length before and after, in bytes.
    pub(super) fn compact_while_served(&self, watch: &dyn Watch) -> Result<(u64, u64)> {
        let image = self.image();
        if image.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the image is open for reading only"));
        }
        let worker = Worker::new(image)?;
        let before = image.backend.size();
        for _ in 0..MOST_ROUNDS {
            let length = image.backend.size();
            self.compact_once(&worker, watch)?;
            // Counts of what was cut off are not needed any more, which leaves gaps again.
            if image.backend.size() >= length {
                break;
            }
        }
        Ok((before, image.backend.size()))
    }

    fn compact_once(&self, worker: &Worker, watch: &dyn Watch) -> Result<()> {
        let image = self.image();
        watch.step("looking for what is free", 0);
        let mut far = worker.run(|channel| async move {
            let image = channel.image.clone();
            image.start_log(&channel.io).await;
            image.commit(&channel.io).await?;
            image.reclaim_all(&channel.io).await?;
            let _busy = channel.clone().begin().await;
            image.find_far(&channel.io).await
        })?;
        let size = image.layout.cluster_size();
        let most = usize::try_from(BATCH / size).unwrap_or(1).max(1);
        watch.step("moving", far.len() as u64 * size);
        far.sort_unstable();
        while !far.is_empty() {
            let batch = far.split_off(far.len().saturating_sub(most));
            let bytes = batch.len() as u64 * size;
            let goes_on = worker.run(move |channel| async move {
                let image = channel.image.clone();
                // What the batch before has left is given back while guests go on.
                image.commit(&channel.io).await?;
                image.reclaim_all(&channel.io).await?;
                let alone = Alone::new(&image, &channel.io).await?;
                image.move_down(&channel.io, &alone, batch).await
            })?;
            watch.advance(bytes, if goes_on { bytes } else { 0 })?;
            if !goes_on {
                break;
            }
        }
        watch.step("cutting", 0);
        worker.run(|channel| async move {
            let image = channel.image.clone();
            image.commit(&channel.io).await?;
            image.reclaim_all(&channel.io).await?;
            image.cut(&channel.io).await
        })
    }
}

impl Image {
    /// What could be moved from behind where everything would end without gaps.
    async fn find_far(&self, io: &Io) -> Result<Vec<Far>> {
        let used = self.find_free(io).await?;
        let (l1, layout) = (self.l1(), &self.layout);
        let mut far = Vec::new();
        for (index, entry) in (0..).zip(l1.entries()) {
            let offset = index << layout.l2_span_bits();
            let Some(table) = self.table(io, &l1, offset).await? else { continue };
            if table.suspect {
                let message = "entries of its tables are damaged: `vbd check --repair` first";
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
            if entry.copied() && entry.offset() >> layout.cluster_bits >= used {
                far.push(Far { host: entry.offset() >> layout.cluster_bits, what: What::Table(index) });
            }
            let first = offset >> layout.cluster_bits;
            for at in 0..layout.l2_entries() {
                let host = self.movable(table.get(layout, at));
                if let Some(host) = host.filter(|host| *host >= used) {
                    far.push(Far { host, what: What::Data(first + at as u64) });
                }
            }
        }
        Ok(far)
    }

    /// The cluster of an entry that may be led elsewhere.
    fn movable(&self, entry: Entry) -> Option<u64> {
        if self.data_file.is_some() || !entry.cluster.copied() {
            return None;
        }
        match entry.cluster.decode(&self.layout) {
            Ok(Cluster::Data { host } | Cluster::Zero { host: Some(host) }) => {
                Some(host >> self.layout.cluster_bits)
            }
            _ => None,
        }
    }

    /// Moves some of what is far to the first free places, while nobody uses the image; false where there are none before.
    async fn move_down(self: &Arc<Self>, io: &Io, _alone: &Alone, mut batch: Vec<Far>) -> Result<bool> {
        self.check_writable()?;
        self.counts.state().sort();
        let (l1, layout) = (self.l1(), &self.layout);
        // In the order of the disk, so that what belongs together stays so.
        batch.sort_unstable_by_key(|far| far.what);
        let mut goes_on = true;
        let mut moved: Vec<(u64, Entry, u64)> = Vec::new();
        for far in batch {
            let what = match far.what {
                What::Data(cluster) => {
                    let offset = cluster << layout.cluster_bits;
                    let table = self.table(io, &l1, offset).await?;
                    let entry = table.map(|table| table.get(layout, index_of(layout, offset)));
                    entry.filter(|entry| self.movable(*entry) == Some(far.host)).map(|entry| (cluster, entry))
                }
                What::Table(index) => {
                    let entry = l1.get(index);
                    let there = entry.copied() && entry.offset() >> layout.cluster_bits == far.host;
                    if there && !self.move_table(io, &l1, index, far.host).await? {
                        goes_on = false;
                    }
                    None
                }
            };
            // It may have become something else since.
            let Some((cluster, entry)) = what else { continue };
            match self.take_before(far.host) {
                Some(to) => moved.push((cluster, entry, to)),
                None => goes_on = false,
            }
        }
        let copied = self.copy_clusters(io, &moved).await;
        if let Err(error) = copied {
            for (_, _, to) in moved {
                self.give_back(Run { start: to, count: 1, zeroed: false });
            }
            return Err(error);
        }
        for (cluster, old, to) in moved {
            let offset = cluster << layout.cluster_bits;
            let table = self.own_table(io, &l1, offset).await?;
            let place = to << layout.cluster_bits;
            let new = match old.cluster.decode(layout) {
                Ok(Cluster::Zero { .. }) => L2Entry::zero(place, true),
                _ => L2Entry::data(place, true),
            };
            self.set_entries(&table, index_of(layout, offset), &[Entry { cluster: new, ..old }]);
            self.free(self.referred(old));
        }
        Ok(goes_on)
    }

    /// Copies guest clusters to where they are to be: through what encrypts them, if they are, since that goes by the place.
    async fn copy_clusters(&self, io: &Io, moved: &[(u64, Entry, u64)]) -> Result<()> {
        let (bits, len) = (self.layout.cluster_bits, self.layout.cluster_len());
        let mut reads: Vec<Part> = Vec::new();
        let mut buffers = Vec::new();
        for (_, old, to) in moved {
            let from = old.cluster.offset();
            // The last cluster of a file may end early: what is missing reads as zeroes.
            let there = usize::try_from(self.backend.size().saturating_sub(from)).unwrap_or(len).min(len);
            let buffer = Arc::new(Buffer::new(len));
            if there > 0 {
                let memory = vec![buffer.piece(0, there)];
                let guard = Some(buffer.clone() as vbd_core::Guard);
                reads.push(Box::pin(io.transfer(&io.data, Operation::Read, from, memory, guard)));
            }
            buffers.push((buffer, to << bits));
        }
        all(reads).await?;
        let write = |(buffer, to): (Arc<Buffer>, u64)| -> Part {
            let memory = vec![buffer.whole()];
            Box::pin(io.transfer(&io.data, Operation::Write, to, memory, Some(buffer)))
        };
        all(buffers.into_iter().map(write).collect()).await
    }

    /// Moves an L2 table; false where nothing is free before it.
    async fn move_table(&self, io: &Io, l1: &L1, index: u64, host: u64) -> Result<bool> {
        let Some(table) = self.table(io, l1, index << self.layout.l2_span_bits()).await? else {
            return Ok(true);
        };
        let Some(to) = self.take_before(host) else { return Ok(false) };
        self.counts.state().metadata.insert(to);
        self.lead_to(l1, &table, Run { start: to, count: 1, zeroed: false }, false);
        Ok(true)
    }

    /// Takes the first free cluster, if it is before this one.
    fn take_before(&self, host: u64) -> Option<u64> {
        self.counts.state().take_first(host)
    }

    /// Punches holes where nothing is, and cuts the file off behind what there is.
    async fn cut(self: &Arc<Self>, io: &Io) -> Result<()> {
        let alone = Alone::new(self, io).await?;
        self.check_writable()?;
        self.move_l1(io, &alone).await?;
        while self.drop_blocks(io).await? {}
        self.punch_free(io).await?;
        self.write_counts(io).await?;
        let end = self.counts.state().cut();
        if self.backend.is_block_device() {
            return Ok(());
        }
        let end = self.whole_blocks(end * self.layout.cluster_size());
        if end < self.backend.size() {
            let backend = self.backend.clone();
            io.local.unblock(move || backend.trim(end)).await?;
        }
        self.sync_file(io).await
    }

    /// Moves the L1 table to the first place that it fits in, if that is before where it is.
    async fn move_l1(self: &Arc<Self>, io: &Io, alone: &Alone) -> Result<()> {
        let (offset, len) = {
            let header = self.header();
            (header.l1_offset, header.l1_bytes())
        };
        let (first, count) = (offset >> self.layout.cluster_bits, self.layout.clusters(len));
        if len == 0 || !self.counts.state().has_room_before(first, count) {
            return Ok(());
        }
        let entries: Vec<L1Entry> = self.l1().entries().collect();
        let run = self.write_l1_copy(io, &entries, alone).await?;
        let place = run.start << self.layout.cluster_bits;
        self.switch(io, at::L1 + 4, &place.to_be_bytes()).await?;
        self.header().l1_offset = place;
        let clusters = (first..first + count).collect();
        self.reclaim(io, super::counts::Freed::new(self, clusters)).await?;
        self.write_counts(io).await
    }
}
