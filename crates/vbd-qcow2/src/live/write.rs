//! Writes that need new clusters, or are not one run of one file.
//!
//! Whoever changes entries holds the locks of their clusters of the disk, so two writes to one new cluster come one after
//! the other, and the second goes in place. Data is written before the entry that leads to it is set, so a reader sees
//! what was there before or what is there now. What is written in place takes no lock.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use vbd_core::memory::Buffer;
use vbd_core::{Guard, IoVec, Operation, Request, Result};

use super::channel::Qcow2Channel;
use super::counts::Run;
use super::image::Image;
use super::io::{Part, all, bytes, together};
use super::map::{Entry, Span, Table, index_of, span};
use super::read::Target;
use crate::format::{Cluster, L2Entry, Subclusters};

/// What has to happen for a cluster to be written to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Nothing for the part that is written first.
    Nothing,
    /// It gets a cluster of the file.
    New,
    /// It has one that is its own, and whose content does not count.
    Prepared(u64),
}

/// What may be written to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Where {
    /// All.
    Anywhere,
    /// What the image leaves to the one behind it.
    Below,
}

/// Clusters that were taken and that nothing leads to yet.
struct Unpublished<'a> {
    image: &'a Image,
    run: Option<Run>,
}

impl Drop for Unpublished<'_> {
    fn drop(&mut self) {
        if let Some(run) = self.run.take() {
            self.image.pending().orphans.extend(run.start..run.start + run.count);
        }
    }
}

/// Memory, and what keeps it.
type Piece = (Arc<Buffer>, IoVec);

/// Data of so many bytes is read with what lies on both sides of it, so that one read does. It is not used.
const MOST_BETWEEN: u64 = 16 << 10;

/// What lies beside data that is written to a new cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    /// Nothing, or zeroes where those are there.
    Nothing,
    /// Zeroes, which have to be written.
    Zeroes,
    /// What has to be read from where it is now.
    Content,
}

/// A part of a disk that is written with what lies beside it in its clusters.
struct Plan {
    /// Where the data begins and ends.
    begin: u64,
    stop: u64,
    /// Where the whole begins and ends.
    from: u64,
    to: u64,
    /// Where the whole goes.
    host: u64,
    /// That place reads as zeroes.
    zeroed: bool,
}

impl Qcow2Channel {
    pub(super) fn write_slowly(self: Rc<Self>, request: Request) {
        self.work(request, async |this, request| {
            let source = Target { memory: std::mem::take(&mut request.memory), guard: request.guard.clone() };
            let result = this.write_range(request.offset, request.len, &source).await;
            request.memory = source.memory;
            result?;
            this.image.commit_if_much(&this.io);
            this.made_durable(request).await
        });
    }

    /// Writes memory to a range of the disk.
    pub(super) async fn write_range(&self, offset: u64, len: u64, source: &Target) -> Result<()> {
        let mut parts: Vec<Part> = Vec::new();
        let result = self.start_writes(offset, len, source, &mut parts).await;
        let ended = all(parts).await;
        result.and(ended)
    }

    async fn start_writes(
        &self,
        offset: u64,
        len: u64,
        source: &Target,
        parts: &mut Vec<Part>,
    ) -> Result<()> {
        let (l1, mut done) = (self.l1(), 0);
        while done < len {
            let (span, part) = self.span(&l1, offset + done, len - done).await?;
            match span {
                Span::Data { host, owned: true } => {
                    let (memory, guard) = (source.part(done, part), source.guard.clone());
                    parts.push(Box::pin(self.io.transfer(
                        &self.io.data,
                        Operation::Write,
                        host,
                        memory,
                        guard,
                    )));
                    done += part;
                }
                Span::Bad(error) => return Err(self.image.corrupted(&self.io, &error.to_string())),
                _ => {
                    done +=
                        self.write_new(offset + done, len - done, (source, done), Where::Anywhere).await?.0
                }
            }
        }
        Ok(())
    }

    /// Writes memory to a range of the disk, but only where the image holds nothing: how many bytes were written.
    pub(super) async fn write_if_below(&self, offset: u64, len: u64, source: &Target) -> Result<u64> {
        let (mut done, mut written) = (0, 0);
        while done < len {
            let (wrote, passed) =
                self.write_new(offset + done, len - done, (source, done), Where::Below).await?;
            written += wrote;
            done += wrote + passed;
        }
        Ok(written)
    }

    /// Writes to the first clusters of a range that have none of their own: how many bytes were written, which is 0 where
    /// somebody else was quicker, and how many are not to be.
    async fn write_new(
        &self,
        offset: u64,
        most: u64,
        (source, skip): (&Target, u64),
        to: Where,
    ) -> Result<(u64, u64)> {
        let (image, layout) = (&*self.image, &self.image.layout);
        let (bits, l1) = (layout.cluster_bits, self.l1());
        let table_end = ((offset >> layout.l2_span_bits()) + 1) << layout.l2_span_bits();
        let mut end = (offset + most).min(table_end);
        let (first, last) = (offset >> bits, (end - 1) >> bits);
        let _turn = image.clusters.lock(first..last + 1).await;
        image.check_writable()?;
        let table = self.own_table(&l1, offset).await?;
        let index = index_of(layout, offset);
        if to == Where::Below {
            let (span, len) = image.span(&self.io, &l1, offset, end - offset).await?;
            if span != Span::Below {
                return Ok((0, len));
            }
            end = offset + len;
        }
        let last = (end - 1) >> bits;
        let (need, uniform) = self.need(&table, offset)?;
        let mut taken = Unpublished { image, run: None };
        let plan = match need {
            Need::Nothing => return Ok((0, 0)),
            Need::Prepared(host) => {
                let stop = end.min(offset + uniform);
                self.plan(&table, (offset, stop), (host, false))
            }
            Need::New => {
                let mut want = 1;
                while first + want <= last && self.need(&table, (first + want) << bits)?.0 == Need::New {
                    want += 1;
                }
                let run = match image.data_file {
                    // There, each cluster has its place.
                    Some(_) => Run { start: first, count: want, zeroed: false },
                    None => *taken.run.insert(image.allocate(&self.io, want).await?),
                };
                let stop = end.min((first + run.count) << bits);
                // What was never written reads as zeroes only where nothing is decrypted.
                let zeroed = run.zeroed && image.encrypted.is_none();
                self.plan(&table, (offset, stop), (run.start << bits, zeroed))
            }
        };
        if let Err(error) = self.write_plan(&plan, source, skip).await {
            // It has ended, so nobody writes there any more.
            if let Some(run) = taken.run.take() {
                image.give_back(run);
            }
            return Err(error);
        }
        let count = ((plan.stop - 1) >> bits) - first + 1;
        let old: Vec<Entry> = (0..bytes(count)).map(|at| table.get(layout, index + at)).collect();
        let host = plan.host & !layout.offset_mask();
        let new =
            old.iter().zip(0..).map(|(old, at)| self.entry(*old, &plan, first + at, host + (at << bits)));
        image.set_entries(&table, index, &new.collect::<Vec<_>>());
        taken.run = None;
        if need == Need::New {
            old.iter().for_each(|old| image.free(image.referred(*old)));
        }
        Ok((plan.stop - plan.begin, 0))
    }

    /// What a cluster needs to be written to at an offset, and for how many bytes from there on it is in the same state.
    fn need(&self, table: &Arc<Table>, offset: u64) -> Result<(Need, u64)> {
        let (image, layout) = (&self.image, &self.image.layout);
        let entry = table.get(layout, index_of(layout, offset));
        if table.suspect {
            image.check_entry(&self.io, entry, offset)?;
        }
        let rest = layout.cluster_size() - (offset & layout.offset_mask());
        let (span, uniform) = span(layout, table, offset, rest);
        let cluster = entry.cluster.decode(layout);
        let need = match (span, cluster) {
            (Span::Bad(error), _) | (_, Err(error)) => {
                return Err(image.corrupted(&self.io, &error.to_string()));
            }
            (Span::Data { owned: true, .. }, _) => Need::Nothing,
            (_, Ok(Cluster::Data { host } | Cluster::Zero { host: Some(host) }))
                if entry.cluster.copied() =>
            {
                Need::Prepared(host)
            }
            _ => Need::New,
        };
        Ok((need, uniform))
    }

    /// What is written beside a range, so that whole clusters or subclusters are.
    fn plan(&self, table: &Table, (begin, stop): (u64, u64), (cluster, zeroed): (u64, bool)) -> Plan {
        let layout = &self.image.layout;
        let unit = |offset: u64| {
            let entry = table.get(layout, index_of(layout, offset));
            match entry.cluster.decode(layout) {
                // What its subclusters have moves with it.
                Ok(Cluster::Data { .. }) if !entry.cluster.copied() => layout.cluster_size(),
                Ok(Cluster::Compressed(_)) => layout.cluster_size(),
                _ => layout.subcluster_size(),
            }
        };
        let from = begin / unit(begin) * unit(begin);
        let to = stop.next_multiple_of(unit(stop - 1));
        let to = match self.image.data_file {
            // It ends where the disk does.
            Some(_) => to.min(self.image.size()).max(stop),
            None => to,
        };
        Plan { begin, stop, from, to, host: cluster + (from & layout.offset_mask()), zeroed }
    }

    /// Writes the data of a plan and what is missing beside it, at once.
    async fn write_plan(&self, plan: &Plan, source: &Target, skip: u64) -> Result<()> {
        let (head, tail) = self.sides(plan).await?;
        let mut memory: Vec<IoVec> = head.iter().map(|(_, piece)| *piece).collect();
        memory.extend(source.part(skip, plan.stop - plan.begin));
        memory.extend(tail.iter().map(|(_, piece)| *piece));
        let skipped = if head.is_some() { 0 } else { plan.begin - plan.from };
        let buffer = |side: Option<Piece>| side.map(|(buffer, _)| buffer);
        let guard: Guard = Arc::new((source.guard.clone(), buffer(head), buffer(tail)));
        self.io.transfer(&self.io.data, Operation::Write, plan.host + skipped, memory, Some(guard)).await
    }

    /// What lies before and behind the data of a plan, where it has to be written.
    async fn sides(&self, plan: &Plan) -> Result<(Option<Piece>, Option<Piece>)> {
        let (before, behind) = (plan.from..plan.begin, plan.stop..plan.to);
        let head = self.side(&before, plan.zeroed).await?;
        let tail = self.side(&behind, plan.zeroed).await?;
        let both = head == Side::Content && tail == Side::Content;
        if both && plan.stop - plan.begin <= MOST_BETWEEN {
            // One read, with what is between, costs less than two.
            let (buffer, _) = self.held(plan.from..plan.to, true).await?;
            let (split, last) = (bytes(plan.begin - plan.from), bytes(plan.stop - plan.from));
            let (head, tail) = (buffer.piece(0, split), buffer.piece(last, buffer.len() - last));
            return Ok((Some((buffer.clone(), head)), Some((buffer, tail))));
        }
        let (mut found, mut other) = (None, None);
        let held = async |side: Side, range: Range<u64>, found: &mut Option<Piece>| {
            if side != Side::Nothing {
                *found = Some(self.held(range, side == Side::Content).await?);
            }
            Ok(())
        };
        together(vec![held(head, before, &mut found), held(tail, behind, &mut other)]).await?;
        Ok((found, other))
    }

    /// What of a range beside data is to be written.
    async fn side(&self, range: &Range<u64>, zeroed: bool) -> Result<Side> {
        if range.is_empty() {
            return Ok(Side::Nothing);
        }
        // Behind the end of the disk there is nothing.
        let end = range.end.min(self.image.size()).max(range.start);
        Ok(match self.is_zero(range.start, end).await? {
            true if zeroed => Side::Nothing,
            true => Side::Zeroes,
            false => Side::Content,
        })
    }

    /// Memory with what a range holds now, or with zeroes.
    async fn held(&self, range: Range<u64>, read: bool) -> Result<Piece> {
        let buffer = Arc::new(Buffer::new(bytes(range.end - range.start)));
        let end = range.end.min(self.image.size()).max(range.start);
        if read && end > range.start {
            let memory = vec![buffer.piece(0, bytes(end - range.start))];
            let target = Target { memory, guard: Some(buffer.clone()) };
            self.read_range(range.start, end - range.start, &target).await?;
        }
        let piece = buffer.whole();
        Ok((buffer, piece))
    }

    /// Whether a range reads as zeroes, as far as the tables tell.
    pub(super) async fn is_zero(&self, mut from: u64, end: u64) -> Result<bool> {
        let l1 = self.l1();
        while from < end {
            let (span, len) = self.span(&l1, from, end - from).await?;
            match span {
                Span::Zero { .. } => {}
                Span::Below if from >= self.image.backing_size() => {}
                _ => return Ok(false),
            }
            from += len;
        }
        Ok(true)
    }

    /// The entry of a cluster of the disk that was written to at `host`.
    fn entry(&self, old: Entry, plan: &Plan, cluster: u64, host: u64) -> Entry {
        let layout = &self.image.layout;
        let new = L2Entry::data(host, true);
        if !layout.extended_l2 {
            return Entry { cluster: new, parts: Subclusters::NONE };
        }
        let start = cluster << layout.cluster_bits;
        let (size, unit) = (layout.cluster_size(), layout.subcluster_size());
        let from = plan.from.saturating_sub(start) / unit;
        let to = plan.to.min(start + size).saturating_sub(start).div_ceil(unit);
        let written = (from..to).fold(0u32, |bits, part| bits | 1 << part);
        let allocated = if matches!(old.cluster.decode(layout), Ok(Cluster::Data { .. })) {
            old.parts.allocated()
        } else {
            0
        };
        let zero = if old.cluster.is_compressed() { 0 } else { old.parts.zero() };
        Entry { cluster: new, parts: Subclusters::new(allocated | written, zero & !written) }
    }

    /// Writes zeroes to a range, of whatever it is made.
    pub(super) async fn write_zero_bytes(&self, offset: u64, len: u64) -> Result<()> {
        const CHUNK: u64 = 64 << 10;
        let buffer = Arc::new(Buffer::new(bytes(len.min(CHUNK))));
        let mut memory = vec![buffer.whole(); bytes(len / CHUNK)];
        if !len.is_multiple_of(CHUNK) {
            memory.push(buffer.piece(0, bytes(len % CHUNK)));
        }
        self.write_range(offset, len, &Target { memory, guard: Some(buffer) }).await
    }
}
