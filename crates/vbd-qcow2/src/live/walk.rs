//! All tables that an L1 table leads to, one after the other, with many being read at a time.

use std::ops::Range;
use std::sync::Arc;

use vbd_core::memory::Buffer;
use vbd_core::{Guard, Operation, Result};

use super::counts::add_run;
use super::image::{Image, clusters_of};
use super::io::{Bytes, Io, MOST_AT_ONCE, Queue, Writes};
use super::map::{Entry, PIECE, Pieces, Table};
use crate::format::{L1Entry, L2Entry, Layout, Malformed};

/// Bytes of a table that are looked at together for whether they have anything.
const LOOK: usize = 512;

/// A walk over the tables that are on disk as they are in memory: nobody else uses the image.
pub(super) struct Walk<'a> {
    image: &'a Image,
    io: &'a Io,
    entries: &'a [L1Entry],
    /// They are the active ones, so that a table in memory is the one that counts.
    active: bool,
    next: usize,
    ahead: Queue<Visit>,
    /// Buffers of tables that are done with.
    spare: Vec<Buffer>,
}

/// A table on the way.
pub(super) struct Visit {
    /// Its entry in the L1 table.
    pub(super) index: usize,
    /// Where it is in the file.
    offset: u64,
    content: Content,
}

enum Content {
    Memory(Arc<Table>),
    Disk(Buffer),
}

impl<'a> Walk<'a> {
    /// A walk over all tables that these entries lead to.
    pub(super) fn new(image: &'a Image, io: &'a Io, entries: &'a [L1Entry]) -> Self {
        Walk { image, io, entries, active: false, next: 0, ahead: Queue::default(), spare: Vec::new() }
    }

    /// The same for the active L1 table.
    pub(super) fn active(image: &'a Image, io: &'a Io, entries: &'a [L1Entry]) -> Self {
        Walk { active: true, ..Walk::new(image, io, entries) }
    }

    /// Starts to read as many tables as may be read at once.
    ///
    /// # Errors
    /// An entry is none that a correct image has.
    pub(super) fn start(&mut self) -> Result<()> {
        let layout = &self.image.layout;
        let len = layout.cluster_len();
        while self.next < self.entries.len() && self.ahead.has_room(len) {
            let (index, entry) = (self.next, self.entries[self.next]);
            self.next += 1;
            let offset = match entry.decode(layout) {
                Ok(None) => continue,
                Ok(Some(offset)) => offset,
                Err(error) => {
                    let message = format!("an entry of an L1 table: {error}");
                    return Err(self.image.corrupted(self.io, &message));
                }
            };
            if offset + layout.cluster_size() > self.image.backend.size() {
                let message = format!("an L2 table is at {offset:#x}, beyond the end of the file");
                return Err(self.image.corrupted(self.io, &message));
            }
            let there = if self.active { self.image.tables.get(index as u64) } else { None };
            if let Some(table) = there {
                let content = Content::Memory(table);
                self.ahead.push(len, async move { Ok(Visit { index, offset, content }) });
                continue;
            }
            let buffer = self.spare.pop().unwrap_or_else(|| Buffer::new(len));
            let read = self.io.start_read(offset, buffer);
            self.ahead.push(len, async move {
                let content = Content::Disk(read.await.map(Bytes::into_buffer)?);
                Ok(Visit { index, offset, content })
            });
        }
        Ok(())
    }

    /// The next table.
    ///
    /// # Errors
    /// It cannot be read, or an entry is none that a correct image has.
    pub(super) async fn next(&mut self) -> Result<Option<Visit>> {
        self.start()?;
        self.ahead.next().await.transpose()
    }

    /// Takes a table back whose content is not needed any more.
    pub(super) fn done(&mut self, visit: Visit) {
        if let Content::Disk(buffer) = visit.content
            && self.spare.len() * buffer.len() < MOST_AT_ONCE
        {
            self.spare.push(buffer);
        }
    }
}

impl Visit {
    /// The cluster that the table is in.
    pub(super) fn place(&self, layout: &Layout) -> u64 {
        self.offset >> layout.cluster_bits
    }

    /// The clusters of the file that the table takes and refers to.
    ///
    /// # Errors
    /// An entry is none that a correct image has.
    pub(super) fn clusters(&self, image: &Image, io: &Io) -> Result<Vec<Range<u64>>> {
        let layout = &image.layout;
        let place = self.place(layout);
        let mut runs = Vec::new();
        add_run(&mut runs, place..place + 1);
        let found = self.each_used(layout, |_, entry| {
            let cluster = entry.decode(layout)?;
            if !layout.data_file {
                add_run(&mut runs, clusters_of(cluster, layout.cluster_bits));
            }
            Ok(())
        });
        found.map_err(|error| {
            image.corrupted(io, &format!("an entry of the L2 table at {:#x}: {error}", self.offset))
        })?;
        Ok(runs)
    }

    /// Calls with each entry that is not 0, and its index.
    fn each_used(
        &self,
        layout: &Layout,
        mut with: impl FnMut(usize, L2Entry) -> std::result::Result<(), Malformed>,
    ) -> std::result::Result<(), Malformed> {
        match &self.content {
            Content::Memory(table) => {
                for index in 0..layout.l2_entries() {
                    let entry = table.get(layout, index).cluster;
                    if entry.0 != 0 {
                        with(index, entry)?;
                    }
                }
            }
            Content::Disk(buffer) => {
                // SAFETY: its read has ended, and nothing else was started with it.
                let bytes = unsafe { buffer.bytes() };
                let size = layout.l2_entry_size();
                for (part, bytes) in bytes.chunks(LOOK).enumerate().filter(|(_, bytes)| !is_zero(bytes)) {
                    for (at, bytes) in bytes.chunks_exact(size).enumerate() {
                        let entry = word(bytes);
                        if entry != 0 {
                            with(part * (LOOK / size) + at, L2Entry(entry))?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes the flag of each entry that leads to a cluster of its own say whether that has one reference: the runs of
    /// pieces that have changed.
    pub(super) fn set_flags(
        &mut self,
        layout: &Layout,
        is_alone: impl FnMut(u64) -> bool,
    ) -> Vec<Range<usize>> {
        match &mut self.content {
            Content::Memory(table) => set_in_memory(layout, table, is_alone),
            Content::Disk(buffer) => set_in_bytes(layout, buffer.bytes_mut(), is_alone),
        }
    }

    /// Brings pieces that have changed on their way to the disk: in `writes`, or with what is pending. The table is given
    /// back where nothing has.
    pub(super) async fn write(
        self,
        (image, io): (&Image, &Io),
        pieces: Vec<Range<usize>>,
        (writes, keep): (&mut Writes, &Guard),
    ) -> Option<Visit> {
        if pieces.is_empty() {
            return Some(self);
        }
        match self.content {
            Content::Memory(table) => {
                pieces.into_iter().flatten().for_each(|piece| table.dirty.mark(piece));
                image.list(&table);
            }
            Content::Disk(buffer) => {
                let buffer = Arc::new(buffer);
                for run in pieces {
                    let (from, to) = (run.start * PIECE, (run.end * PIECE).min(buffer.len()));
                    let memory = vec![buffer.piece(from, to - from)];
                    let guard: Guard = Arc::new((buffer.clone(), keep.clone()));
                    let offset = self.offset + from as u64;
                    let start = || io.transfer(&io.file, Operation::Write, offset, memory, Some(guard));
                    writes.add(to - from, start).await;
                }
            }
        }
        None
    }
}

/// The entry with its flag as it should be, if it is another.
#[inline]
fn changed(layout: &Layout, entry: L2Entry, is_alone: &mut impl FnMut(u64) -> bool) -> Option<L2Entry> {
    if entry.0 == 0 || entry.is_compressed() || layout.data_file {
        return None;
    }
    let clusters = clusters_of(entry.decode(layout).ok()?, layout.cluster_bits);
    let copied = !clusters.is_empty() && is_alone(clusters.start);
    (!clusters.is_empty() && copied != entry.copied()).then(|| entry.with_copied(copied))
}

/// Sets the flags of a table in memory: the runs of pieces that have changed.
fn set_in_memory(layout: &Layout, table: &Table, mut is_alone: impl FnMut(u64) -> bool) -> Vec<Range<usize>> {
    let pieces = Pieces::new(table.pieces());
    for index in 0..layout.l2_entries() {
        let old = table.get(layout, index);
        if let Some(cluster) = changed(layout, old.cluster, &mut is_alone) {
            table.set(layout, index, Entry { cluster, ..old });
            pieces.mark(Table::piece_of(layout, index));
        }
    }
    pieces.take()
}

/// Sets the flags of a table as it lies on disk: the runs of pieces that have changed.
fn set_in_bytes(
    layout: &Layout,
    bytes: &mut [u8],
    mut is_alone: impl FnMut(u64) -> bool,
) -> Vec<Range<usize>> {
    let pieces = Pieces::new(bytes.len().div_ceil(PIECE));
    let size = layout.l2_entry_size();
    for (part, bytes) in bytes.chunks_mut(LOOK).enumerate().filter(|(_, bytes)| !is_zero(bytes)) {
        let mut any = false;
        for bytes in bytes.chunks_exact_mut(size) {
            if let Some(entry) = changed(layout, L2Entry(word(bytes)), &mut is_alone) {
                bytes[..8].copy_from_slice(&entry.0.to_be_bytes());
                any = true;
            }
        }
        if any {
            pieces.mark(part * LOOK / PIECE);
        }
    }
    pieces.take()
}

fn word(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |word| u64::from_be_bytes(*word))
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<8>();
    rest.is_empty() && words.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0
}
