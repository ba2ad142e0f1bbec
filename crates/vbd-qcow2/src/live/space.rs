//! Discard, zeroes, and telling what a range consists of.

use std::rc::Rc;
use std::sync::Arc;

use vbd_core::ask::{Ask, ask};
use vbd_core::{Error, ErrorKind, Extent, ExtentKind, Flags, Operation, Request, Result};

use super::channel::Qcow2Channel;
use super::io::{Part, all};
use super::map::{Entry, Span, Table, index_of};
use crate::format::{Cluster, L2Entry, Subclusters};

/// The most extents in one answer.
const MOST_EXTENTS: usize = 1024;

/// What is done with a whole cluster.
enum Change {
    /// Nothing.
    Keep,
    /// It gets this entry.
    Set(Entry),
    /// The cluster of the file is zeroed, and stays.
    InPlace(u64),
    /// Zeroes are written as a guest would.
    Write,
}

/// What a change of whole clusters is to come to.
#[derive(Clone, Copy)]
enum Goal {
    /// Space is given back.
    Discard,
    /// They read as zeroes, however that is done.
    Zeroes(Flags),
}

impl Qcow2Channel {
    pub(super) fn discard(self: Rc<Self>, request: Request) {
        self.work(request, async |this, request| {
            if this.image.keep_space {
                return Ok(());
            }
            let size = this.image.layout.cluster_size();
            let end = request.offset + request.len;
            let first = request.offset.div_ceil(size);
            // The last cluster of a disk is given back whole.
            let last = if end == this.image.size() { end.div_ceil(size) } else { end / size };
            this.change(first, last, Goal::Discard).await?;
            this.image.commit_if_much(&this.io);
            this.made_durable(request).await
        });
    }

    pub(super) fn write_zeroes(self: Rc<Self>, request: Request) {
        self.work(request, async |this, request| {
            let flags = Flags { fua: false, ..request.flags };
            this.zero_range(request.offset, request.len, flags).await?;
            this.image.commit_if_much(&this.io);
            this.made_durable(request).await
        });
    }

    /// Makes a range read as zeroes.
    pub(super) async fn zero_range(&self, offset: u64, len: u64, flags: Flags) -> Result<()> {
        let size = self.image.layout.cluster_size();
        let end = offset + len;
        let first = offset.div_ceil(size);
        let last = if end == self.image.size() { end.div_ceil(size) } else { end / size };
        if first >= last {
            return self.zero_part(offset, end, flags).await;
        }
        self.zero_part(offset, first * size, flags).await?;
        self.change(first, last, Goal::Zeroes(flags)).await?;
        self.zero_part((last * size).min(end), end, flags).await
    }

    /// Zeroes within a cluster.
    async fn zero_part(&self, mut from: u64, end: u64, flags: Flags) -> Result<()> {
        let l1 = self.l1();
        while from < end {
            let (span, len) = self.image.span(&self.io, &l1, from, end - from).await?;
            match span {
                Span::Zero { .. } => {}
                Span::Below if from >= self.image.backing_size() => {}
                Span::Data { host, owned: true } => {
                    let flags = Flags { may_unmap: false, ..flags };
                    self.io.plain(&self.io.data, Operation::WriteZeroes, (host, len), flags).await?;
                }
                Span::Bad(error) => return Err(self.image.corrupted(&self.io, &error.to_string())),
                _ if flags.fast_only => {
                    return Err(Error::new(ErrorKind::Unsupported, "these zeroes would have to be written"));
                }
                _ => self.write_zero_bytes(from, len).await?,
            }
            from += len;
        }
        Ok(())
    }

    /// Changes whole clusters of the disk, table by table.
    async fn change(&self, mut first: u64, last: u64, goal: Goal) -> Result<()> {
        let per_table = self.image.layout.l2_entries() as u64;
        while first < last {
            let end = last.min((first / per_table + 1) * per_table);
            self.change_in_table(first, end, goal).await?;
            first = end;
        }
        Ok(())
    }

    async fn change_in_table(&self, first: u64, end: u64, goal: Goal) -> Result<()> {
        let (image, layout) = (&*self.image, &self.image.layout);
        let (bits, l1) = (layout.cluster_bits, self.l1());
        let mut parts: Vec<Part> = Vec::new();
        let mut written = Vec::new();
        let result = async {
            let _turn = image.clusters.lock(first..end).await;
            image.check_writable()?;
            let table = image.table(&self.io, &l1, first << bits).await?;
            let entry = |cluster: u64| {
                let entry = |table: &Arc<Table>| table.get(layout, index_of(layout, cluster << bits));
                table.as_ref().map_or(Entry::NONE, entry)
            };
            let mut sets: Vec<(u64, Entry)> = Vec::new();
            for cluster in first..end {
                let old = entry(cluster);
                if table.as_ref().is_some_and(|table| table.suspect) {
                    image.check_entry(&self.io, old, cluster << bits)?;
                }
                match self.change_of(old, cluster << bits, goal)? {
                    Change::Keep => {}
                    Change::Set(new) => sets.push((cluster, new)),
                    Change::InPlace(host) => self.zero_in_place(host, goal, &mut parts),
                    Change::Write => written.push(cluster),
                }
            }
            let Some((cluster, _)) = sets.first() else { return Ok(()) };
            let table = image.own_table(&self.io, &l1, cluster << bits).await?;
            let mut freed = Vec::new();
            for group in sets.chunk_by(|(one, _), (next, _)| one + 1 == *next) {
                freed.extend(group.iter().flat_map(|(cluster, _)| image.referred(entry(*cluster))));
                let entries: Vec<Entry> = group.iter().map(|(_, entry)| *entry).collect();
                image.set_entries(&table, index_of(layout, group[0].0 << bits), &entries);
            }
            let mut kept: Vec<u64> = sets.iter().flat_map(|(_, new)| image.referred(*new)).collect();
            kept.sort_unstable();
            freed.retain(|cluster| kept.binary_search(cluster).is_err());
            image.pending().freed.append(&mut freed);
            image.progress.changed();
            Ok(())
        };
        let result = result.await;
        let ended = all(parts).await;
        result.and(ended)?;
        for cluster in written {
            if matches!(goal, Goal::Zeroes(flags) if flags.fast_only) {
                return Err(Error::new(ErrorKind::Unsupported, "these zeroes would have to be written"));
            }
            let (offset, size) = (cluster << bits, layout.cluster_size());
            // A data file ends where the disk does, and a disk that grows is not yet seen to.
            let len =
                if image.data_file.is_some() { image.size().saturating_sub(offset).min(size) } else { size };
            self.write_zero_bytes(offset, len).await?;
        }
        Ok(())
    }

    fn zero_in_place(&self, host: u64, goal: Goal, parts: &mut Vec<Part>) {
        let size = self.image.layout.cluster_size();
        let flags = match goal {
            Goal::Discard => Flags { may_unmap: true, ..Flags::default() },
            // The space stays, but in a file of its own, which nothing else is put into.
            Goal::Zeroes(flags) => {
                Flags { may_unmap: flags.may_unmap && self.image.data_file.is_some(), ..flags }
            }
        };
        let end = if self.image.data_file.is_some() { self.image.size() } else { u64::MAX };
        let range = (host, size.min(end.saturating_sub(host)));
        parts.push(Box::pin(self.io.plain(&self.io.data, Operation::WriteZeroes, range, flags)));
    }

    /// What is done with the cluster of an entry.
    fn change_of(&self, entry: Entry, offset: u64, goal: Goal) -> Result<Change> {
        let (image, layout) = (&self.image, &self.image.layout);
        let below = offset < image.backing_size();
        let cluster =
            entry.cluster.decode(layout).map_err(|error| image.corrupted(&self.io, &error.to_string()))?;
        let none = Entry::NONE;
        let zero = if layout.extended_l2 {
            Entry { cluster: L2Entry::UNALLOCATED, parts: Subclusters::ZERO }
        } else {
            Entry { cluster: L2Entry::ZERO, parts: Subclusters::NONE }
        };
        // How a cluster is described that reads as zeroes and has no space.
        let nothing = match (below, layout.version) {
            (false, _) => Some(none),
            (true, 3..) => Some(zero),
            (true, _) => None,
        };
        let gone = |entry: Entry| {
            if nothing == Some(entry) { Change::Keep } else { nothing.map_or(Change::Write, Change::Set) }
        };
        let unmap = match goal {
            Goal::Discard => true,
            Goal::Zeroes(flags) => flags.may_unmap && !image.keep_space,
        };
        Ok(match (cluster, goal) {
            // A raw image beside it has to read the same.
            (Cluster::Data { host }, _) if image.data_file.is_some() && self.is_whole(entry) => {
                Change::InPlace(host)
            }
            (Cluster::Data { .. } | Cluster::Zero { host: Some(_) }, _) if image.data_file.is_some() => {
                Change::Write
            }
            (Cluster::Unallocated, Goal::Discard) => Change::Keep,
            (Cluster::Zero { host: None }, Goal::Discard) => Change::Keep,
            // Version 2 cannot say that what is behind the cluster does not show.
            (_, Goal::Discard) if nothing.is_none() => Change::Keep,
            (_, Goal::Discard) => gone(entry),
            (Cluster::Unallocated, _) if !below && entry.parts.zero() == 0 => Change::Keep,
            (Cluster::Unallocated, _) => {
                if layout.extended_l2 && entry == zero {
                    Change::Keep
                } else {
                    gone(entry)
                }
            }
            (Cluster::Zero { host: None }, _) => Change::Keep,
            (Cluster::Zero { host: Some(_) }, _) => {
                if unmap {
                    gone(entry)
                } else {
                    Change::Keep
                }
            }
            // Zeroes are encrypted as everything else, and this saves writing them.
            (Cluster::Data { host }, Goal::Zeroes(_))
                if !unmap && image.encrypted.is_some() && entry.cluster.copied() && layout.version >= 3 =>
            {
                Change::Set(if layout.extended_l2 {
                    Entry { cluster: entry.cluster, parts: Subclusters::ZERO }
                } else {
                    Entry { cluster: L2Entry::zero(host, true), parts: Subclusters::NONE }
                })
            }
            (Cluster::Data { host }, _) if !unmap && entry.cluster.copied() && self.is_whole(entry) => {
                Change::InPlace(host)
            }
            (Cluster::Data { .. }, _) if !unmap && nothing.is_none() => Change::Write,
            (Cluster::Data { host }, Goal::Zeroes(_)) if nothing.is_none() && entry.cluster.copied() => {
                Change::InPlace(host)
            }
            _ => gone(entry),
        })
    }

    /// Whether all of an entry's cluster is there.
    fn is_whole(&self, entry: Entry) -> bool {
        !self.image.layout.extended_l2 || entry.parts == Subclusters::ALLOCATED
    }

    /// Tells what a range consists of.
    pub(super) fn extents(self: Rc<Self>, request: Request) {
        self.work(request, async |this, request| {
            request.extents = this.extents_of(request.offset, request.len).await?;
            Ok(())
        });
    }

    async fn extents_of(&self, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let (l1, mut done) = (self.l1(), 0);
        let mut extents = Vec::new();
        while done < len && extents.len() < MOST_EXTENTS {
            let (span, part) = self.image.span(&self.io, &l1, offset + done, len - done).await?;
            let kind = match span {
                Span::Data { .. } | Span::Compressed { .. } => ExtentKind::Data,
                Span::Zero { reserved: true } => ExtentKind::Zero,
                Span::Zero { reserved: false } => ExtentKind::Hole,
                Span::Below => {
                    done += self.extents_below(offset + done, part, &mut extents).await?;
                    continue;
                }
                Span::Bad(error) => return Err(self.image.corrupted(&self.io, &error.to_string())),
            };
            add(&mut extents, part, kind);
            done += part;
        }
        if extents.is_empty() {
            extents.push(Extent { len, kind: ExtentKind::Hole });
        }
        Ok(extents)
    }

    /// What the image behind says of a range, and how many bytes of it.
    pub(super) async fn extents_below(
        &self,
        offset: u64,
        len: u64,
        extents: &mut Vec<Extent>,
    ) -> Result<u64> {
        let there = self.image.backing_size().saturating_sub(offset).min(len);
        let Some(backing) = self.below().filter(|_| there > 0) else {
            add(extents, len, ExtentKind::Hole);
            return Ok(len);
        };
        let answer = ask(&backing, Ask::new(Operation::Extents, offset, there), self.io.local.now()).await?;
        let mut told = 0;
        for extent in answer {
            let len = extent.len.min(there - told);
            add(extents, len, extent.kind);
            told += len;
        }
        if told == 0 {
            return Err(Error::new(ErrorKind::Io, "the backing file does not tell what it consists of"));
        }
        Ok(told)
    }
}

fn add(extents: &mut Vec<Extent>, len: u64, kind: ExtentKind) {
    match extents.last_mut() {
        Some(last) if last.kind == kind => last.len += len,
        _ if len > 0 => extents.push(Extent { len, kind }),
        _ => {}
    }
}
