//! A new refcount structure beside the old one, where that cannot be mended in its place.
//!
//! It is written behind everything else, made durable, and then the header leads to it: one write within a sector, so that
//! after a crash the image has the old one or the new one.

use std::collections::BTreeSet;

use super::counts::Counts;
use super::image::Image;
use super::report::Report;
use super::stored::Stored;
use super::{Error, Options, Result, Whole, windows};
use crate::format::{Header, Layout, RefcountWidth, at, limit};
use crate::storage::Storage;

/// Entries that lead behind the end of the file, at most: none of them may lead to the new structure.
const BEHIND: usize = 1 << 20;

/// Where the fields of the header end that every image of version 3 has.
const FIXED: usize = 104;

/// Where the new structure goes, in clusters.
struct Place {
    start: u64,
    table_clusters: u64,
    /// The indices of the blocks that there are, in rising order.
    blocks: Vec<u64>,
}

/// What a new structure is to be like.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    /// The width of its counts. Another one than now needs `keep` to be false.
    pub(super) width: RefcountWidth,
    /// Whether no count is lower than it was, for something may be in use that nothing was found to use.
    pub(super) keep: bool,
    /// Entries that the table has at least.
    pub(super) room: u64,
}

/// Makes a new refcount structure with the counts that are true.
pub(super) fn rebuild<S: Storage + ?Sized>(
    image: &Image<'_, S>,
    wanted: Wanted,
    options: &Options,
    actions: &mut Vec<String>,
) -> Result<()> {
    let keep = wanted.keep;
    let layout = Layout { refcount_width: wanted.width, ..image.layout };
    let mut stored = Stored::new(image);
    let place = find_place(image, &mut stored, &layout, wanted, options)?;
    let offset = |cluster: u64| cluster << layout.cluster_bits;
    let first_block = place.start + place.table_clusters;
    let end = first_block + place.blocks.len() as u64;
    let mut writer = Writer { image, layout, stored, keep, place: &place, current: None };
    windows(image, options, &mut Report::new(0), whole(), |counts, _, _| {
        for (cluster, count) in in_file(image, counts) {
            writer.put(cluster, count)?;
        }
        Ok(())
    })?;
    // The structure's own clusters, and blocks of which only old counts are kept.
    for index in &place.blocks {
        let first = index << layout.refcount_block_bits();
        if keep {
            writer.touch(*index)?;
        }
        for cluster in first.max(place.start)..end.min(first + layout.refcount_block_entries()) {
            writer.put(cluster, 1)?;
        }
    }
    writer.finish()?;

    let last = place.blocks.last().copied().unwrap_or(0);
    let mut table = vec![0; usize::try_from((last + 1) * 8).expect("within the limit")];
    for (number, index) in place.blocks.iter().enumerate() {
        let at = usize::try_from(index * 8).expect("within the limit");
        table[at..at + 8].copy_from_slice(&offset(first_block + number as u64).to_be_bytes());
    }
    let failed = |doing: &'static str| move |error| Error::io(doing, error);
    table.resize(usize::try_from(offset(place.table_clusters)).expect("within the limit"), 0);
    let source = image.source;
    source.write_all_at(offset(place.start), &table).map_err(failed("write a new refcount table"))?;
    source.sync().map_err(failed("make the new refcount table durable"))?;
    let clusters = u32::try_from(place.table_clusters).expect("within the limit");
    let mut pointer = [&offset(place.start).to_be_bytes()[..], &clusters.to_be_bytes()].concat();
    if wanted.width != image.layout.refcount_width {
        // With the width, and what lies between, in one write within a sector.
        let mut header = Header { refcount_width: wanted.width, ..image.header.clone() };
        (header.refcount_table_offset, header.refcount_table_clusters) = (offset(place.start), clusters);
        pointer = header.encode()?[usize::try_from(at::REFCOUNT_TABLE).expect("small")..FIXED].to_vec();
    }
    source.write_all_at(at::REFCOUNT_TABLE, &pointer).map_err(failed("write the header"))?;
    source.sync().map_err(failed("make the header durable"))?;
    actions.push(format!(
        "made a new refcount table at {:#x} with {} blocks, instead of that at {:#x}",
        offset(place.start),
        place.blocks.len(),
        image.header.refcount_table_offset
    ));
    Ok(())
}

fn whole() -> Whole {
    Whole { start: 0, without_refcounts: true }
}

/// The clusters of a window that are used and in the file. The last may be missing from it: what takes a part of a cluster
/// may end behind the end.
fn in_file<'a, S: Storage + ?Sized>(
    image: &Image<'_, S>,
    counts: &'a Counts,
) -> impl Iterator<Item = (u64, u64)> + 'a {
    let window = counts.window();
    let end = image.layout.clusters(image.length) + 1;
    counts.used(window.start..window.end.min(end).max(window.start))
}

fn find_place<S: Storage + ?Sized>(
    image: &Image<'_, S>,
    stored: &mut Stored<'_, '_, S>,
    layout: &Layout,
    wanted: Wanted,
    options: &Options,
) -> Result<Place> {
    let Wanted { keep, room, .. } = wanted;
    let bits = layout.refcount_block_bits();
    let mut blocks = BTreeSet::new();
    let (mut too_often, mut behind) = (None, BTreeSet::new());
    windows(image, options, &mut Report::new(0), whole(), |counts, _, _| {
        for (cluster, count) in in_file(image, counts) {
            if blocks.last() != Some(&(cluster >> bits)) {
                blocks.insert(cluster >> bits);
            }
            if count > layout.refcount_width.max() {
                too_often.get_or_insert((cluster, count));
            }
        }
        let end = layout.clusters(image.length);
        behind.extend(
            counts.used(counts.window().start.max(end)..counts.window().end).map(|(cluster, _)| cluster),
        );
        if behind.len() > BEHIND {
            return Err(Error::Impossible(format!(
                "more than {BEHIND} entries lead behind the end of the file; copy the image with convert instead"
            )));
        }
        Ok(())
    })?;
    if let Some((cluster, count)) = too_often {
        return Err(Error::Impossible(format!(
            "the cluster at {:#x} is used {count} times, which refcounts of {} bits cannot say; copy the image with \
             convert instead",
            cluster << layout.cluster_bits,
            layout.refcount_width.bits()
        )));
    }
    if keep {
        for index in 0..stored.blocks.len() as u64 {
            if stored.block(index)?.is_some_and(|block| block.iter().any(|byte| *byte != 0)) {
                blocks.insert(index);
            }
        }
    }
    let mut start = layout.clusters(image.length);
    let most = limit::REFCOUNT_TABLE_BYTES >> layout.cluster_bits;
    let mut table_clusters = 1;
    loop {
        let end = start + table_clusters + blocks.len() as u64;
        // Where an entry leads, the guest would read it.
        if let Some(taken) = behind.range(start..end).next_back() {
            start = taken + 1;
            continue;
        }
        let before = blocks.len();
        blocks.extend(start >> bits..=(end - 1) >> bits);
        let entries = blocks.last().map_or(0, |last| last + 1).max(room);
        let needed = layout.clusters(entries.saturating_mul(8));
        if needed > most {
            return Err(Error::Impossible(format!(
                "a refcount table for a file of {} bytes is larger than it may be ({} bytes); copy the image with convert \
                 instead",
                image.length,
                limit::REFCOUNT_TABLE_BYTES
            )));
        }
        if needed <= table_clusters && blocks.len() == before {
            return Ok(Place { start, table_clusters, blocks: blocks.into_iter().collect() });
        }
        table_clusters = table_clusters.max(needed);
    }
}

/// Writes blocks, whose counts come in rising order of the clusters.
struct Writer<'a, 'b, 'p, S: Storage + ?Sized> {
    image: &'a Image<'b, S>,
    /// With the width of the new counts.
    layout: Layout,
    stored: Stored<'a, 'b, S>,
    keep: bool,
    place: &'p Place,
    current: Option<(u64, Vec<u8>)>,
}

impl<S: Storage + ?Sized> Writer<'_, '_, '_, S> {
    /// Makes a block the present one. Blocks that come back are read again.
    fn touch(&mut self, index: u64) -> Result<()> {
        if self.current.as_ref().is_some_and(|(current, _)| *current == index) {
            return Ok(());
        }
        self.finish()?;
        let mut block = vec![0; self.image.layout.cluster_len()];
        if self.offset(index) < self.written_to()? {
            self.image.read(self.offset(index), &mut block)?;
        }
        let empty = block.iter().all(|byte| *byte == 0);
        if empty
            && self.keep
            && let Some(old) = self.stored.block(index)?
        {
            block.copy_from_slice(old);
        }
        self.current = Some((index, block));
        Ok(())
    }

    /// The end of what was written, which the file's length says.
    fn written_to(&self) -> Result<u64> {
        self.image.source.length().map_err(|error| Error::io("ask for the length of the file", error))
    }

    fn offset(&self, index: u64) -> u64 {
        let number = self.place.blocks.partition_point(|before| *before < index) as u64;
        (self.place.start + self.place.table_clusters + number) << self.image.layout.cluster_bits
    }

    fn put(&mut self, cluster: u64, count: u64) -> Result<()> {
        let (width, bits) = (self.layout.refcount_width, self.layout.refcount_block_bits());
        self.touch(cluster >> bits)?;
        if let Some((_, block)) = &mut self.current {
            let index = usize::try_from(cluster & ((1 << bits) - 1)).expect("an index within a block");
            let before = if self.keep { width.get(block, index) } else { 0 };
            width.set(block, index, count.max(before));
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        if let Some((index, block)) = self.current.take() {
            let offset = self.offset(index);
            let written = self.image.source.write_all_at(offset, &block);
            written.map_err(|error| Error::io(format!("write a refcount block at {offset}"), error))?;
        }
        Ok(())
    }
}
