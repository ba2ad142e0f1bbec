//! Mending what a check found.
//!
//! - A file that was cut off gets its length back, where its refcounts say that something was there; it reads as zeros.
//! - Bits that are reserved and set are cleared; entries of bitmaps that lead nowhere become "all dirty".
//! - Counts become what they should be, in their place, or in a new refcount structure behind everything else where the old
//!   one is damaged.
//! - Then the flags that depend on them.
//!
//! Nothing that holds data is given up: an entry that leads to a wrong place stays, and so does the count of everything
//! that may still be in use while a table could not be followed. A table that something else lies over is not written to.
//! Each step is durable before the next begins, and an image between two steps is no worse than before.

use std::collections::BTreeSet;

use serde::Serialize;

use super::counts::CHUNK;
use super::flags;
use super::flags::Wrong;
use super::image::Image;
use super::rebuild::{Wanted, rebuild};
use super::report::{Class, Report};
use super::stored::Stored;
use super::{Error, Look, Options, Result, Whole, check, look, windows};
use crate::format::{
    BitmapTableEntry, Cluster, L1Entry, L2Entry, Malformed, at, autoclear, be64, incompatible,
};
use crate::storage::{Source, Storage};

/// What is to be mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Counts that are too high, so that their clusters can be used again.
    Leaks,
    /// Everything that can be.
    All,
}

/// What was done to an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Repaired {
    /// What was found at first.
    pub before: Report,
    /// What was written, in order.
    pub actions: Vec<String>,
    /// What is found now.
    pub after: Report,
}

/// Checks an image, mends what was found, and checks it again. Nobody else may use the image meanwhile: whoever calls this
/// holds its lease.
///
/// # Errors
///
/// Those of [`check`] and of writing; [`Error::Impossible`] where counts cannot be made right.
pub fn repair<S: Storage + ?Sized>(storage: &S, what: Repair, options: &Options) -> Result<Repaired> {
    let mut before = Report::new(options.kept);
    let image = Image::open(storage, &mut before)?;
    let found = look(&image, options, &mut before)?;
    let mut actions = Vec::new();
    match what {
        Repair::Leaks if before.leaks == 0 => {}
        Repair::Leaks if before.incomplete => actions.push(
            "left the leaks alone: a table could not be followed, so that what nothing was found to use may be in use"
                .to_owned(),
        ),
        Repair::Leaks if found.refcounts_damaged => actions.push(
            "left the leaks alone: the refcount structure is damaged, and has to be repaired first".to_owned(),
        ),
        Repair::Leaks => recount(&image, Direction { raise: false, lower: true }, options, &mut actions)?,
        Repair::All if before.is_clean() => {}
        Repair::All => all(storage, &before, &found, options, &mut actions)?,
    }
    let marks = image.header.incompatible & (incompatible::DIRTY | incompatible::CORRUPT);
    drop(image);
    let mut after = if actions.is_empty() { before.clone() } else { check(storage, options)? };
    if marks != 0 && after.errors == 0 {
        let mut image = Image::open(storage, &mut Report::new(0))?;
        image.header.incompatible &= !(incompatible::DIRTY | incompatible::CORRUPT);
        write_features(&image)?;
        actions.push("cleared the marks that the image was not closed or is corrupt".to_owned());
        after.notes.clear();
        Image::open(storage, &mut after)?;
    }
    Ok(Repaired { before, actions, after })
}

fn all<S: Storage + ?Sized>(
    storage: &S,
    before: &Report,
    found: &Look,
    options: &Options,
    actions: &mut Vec<String>,
) -> Result<()> {
    let quiet = &mut Report::new(0);
    if before.has(Class::BeyondEnd) {
        give_length_back(&Image::open(storage, quiet)?, options, actions)?;
    }
    let mut image = Image::open(storage, quiet)?;
    if before.has(Class::Header) || before.has(Class::Bitmap) {
        mend_bitmap_header(&mut image, before, actions)?;
    }
    mend_entries(&image, &found.overlaps, actions)?;
    sync(&image)?;
    // Seen again, for what was behind the end is not any more, and entries that were malformed may lead somewhere now.
    let image = Image::open(storage, &mut Report::new(0))?;
    let now = look(&image, options, &mut Report::new(0))?;
    let keep = before.incomplete;
    if now.refcounts_damaged {
        let width = image.layout.refcount_width;
        rebuild(&image, Wanted { width, keep, room: 0 }, options, actions)?;
    } else {
        recount(&image, Direction { raise: true, lower: !keep }, options, actions)?;
    }
    drop(image);
    let image = Image::open(storage, &mut Report::new(0))?;
    // What lay over the old refcount structure may be in its place alone now.
    let overlaps = match now.refcounts_damaged {
        true => look(&image, options, &mut Report::new(0))?.overlaps,
        false => now.overlaps,
    };
    mend_flags(&image, &overlaps, actions)?;
    sync(&image)
}

fn sync<S: Storage + ?Sized>(image: &Image<'_, S>) -> Result<()> {
    image.source.sync().map_err(|error| Error::io("make the image durable", error))
}

/// Writes the features that the header has.
fn write_features<S: Storage + ?Sized>(image: &Image<'_, S>) -> Result<()> {
    let header = &image.header;
    let features = [header.incompatible, header.compatible, header.autoclear];
    let bytes: Vec<u8> = features.iter().flat_map(|set| set.to_be_bytes()).collect();
    let written = image.source.write_all_at(at::FEATURES, &bytes).and_then(|()| image.source.sync());
    written.map_err(|error| Error::io("write the header", error))
}

/// What a file may have been longer than twice its length or the disk's size, in bytes: an entry that leads farther was
/// damaged rather than cut off.
const PLAUSIBLE: u64 = 16 << 20;

/// Makes the file as long as it was: as far as its counts say that something was there, or entries lead to what a file like
/// this can have had. Otherwise what is written behind its end next would turn up in the guest's disk.
fn give_length_back<S: Storage + ?Sized>(
    image: &Image<'_, S>,
    options: &Options,
    actions: &mut Vec<String>,
) -> Result<()> {
    let (bits, mut stored) = (image.layout.cluster_bits, Stored::new(image));
    let end = image.layout.clusters(image.length);
    let (mut last, mut lost) = (None, 0u64);
    let plausible = image.header.size.max(image.length).saturating_mul(2).saturating_add(PLAUSIBLE) >> bits;
    let part = Whole { start: end / CHUNK * CHUNK, without_refcounts: false };
    windows(image, options, &mut Report::new(0), part, |counts, _, _| {
        for (cluster, _) in counts.used(counts.window().start.max(end)..counts.window().end) {
            if cluster < plausible || stored.get(cluster)? > 0 {
                (last, lost) = (Some(cluster), lost + 1);
            }
        }
        Ok(())
    })?;
    if let Some(last) = last {
        let length = (last + 1) << bits;
        let grown = image.source.set_len(length).and_then(|()| image.source.sync());
        grown.map_err(|error| Error::io(format!("make the file {length} bytes long"), error))?;
        actions.push(format!(
            "made the file {length} bytes long, as it was before something cut it off at {}: the {lost} clusters in \
             use that are missing read as zeros",
            image.length
        ));
    }
    Ok(())
}

/// Takes back what the header says of bitmaps where that is not so.
fn mend_bitmap_header<S: Storage + ?Sized>(
    image: &mut Image<'_, S>,
    before: &Report,
    actions: &mut Vec<String>,
) -> Result<()> {
    let header = &mut image.header;
    let unreadable = before.has(Class::Bitmap) && header.bitmaps().is_some() && image.bitmaps.is_empty();
    let missing = header.autoclear & autoclear::BITMAPS != 0 && header.bitmaps().is_none();
    if unreadable || missing {
        header.autoclear &= !autoclear::BITMAPS;
        write_features(image)?;
        actions.push(
            "cleared the bit that says that the bitmaps are consistent: they cannot be read".to_owned(),
        );
    }
    Ok(())
}

/// Which counts are written.
#[derive(Clone, Copy)]
struct Direction {
    raise: bool,
    lower: bool,
}

/// Writes the true counts into the blocks that there are.
fn recount<S: Storage + ?Sized>(
    image: &Image<'_, S>,
    direction: Direction,
    options: &Options,
    actions: &mut Vec<String>,
) -> Result<()> {
    let (layout, mut stored) = (image.layout, Stored::new(image));
    let (width, bits) = (layout.refcount_width, layout.refcount_block_bits());
    let (mut raised, mut lowered, mut too_often) = (0u64, 0u64, None);
    windows(image, options, &mut Report::new(0), Whole::default(), |counts, _, _| {
        let window = counts.window();
        for index in window.start >> bits..image.refcount_table.len() as u64 {
            let clusters = (index << bits).max(window.start)..((index + 1) << bits).min(window.end);
            if clusters.is_empty() {
                break;
            }
            let Some(block) = stored.block(index)? else { continue };
            let (mut block, mut changed) = (block.to_vec(), false);
            for cluster in clusters {
                let entry = usize::try_from(cluster & ((1 << bits) - 1)).expect("an index within a block");
                let (now, right) = (width.get(&block, entry), counts.get(cluster));
                if right > width.max() {
                    too_often.get_or_insert((cluster, right));
                } else if now < right && direction.raise || now > right && direction.lower {
                    width.set(&mut block, entry, right);
                    changed = true;
                    *(if now < right { &mut raised } else { &mut lowered }) += 1;
                }
            }
            if changed {
                stored.put(index, &block)?;
            }
        }
        Ok(())
    })?;
    sync(image)?;
    if raised > 0 {
        actions.push(format!("raised the refcounts of {raised} clusters"));
    }
    if lowered > 0 {
        actions.push(format!("lowered the refcounts of {lowered} clusters, which can be used again"));
    }
    if let Some((cluster, count)) = too_often.filter(|_| direction.raise) {
        return Err(Error::Impossible(format!(
            "the cluster at {:#x} is used {count} times, which refcounts of {} bits cannot say; copy the image with \
             convert instead",
            cluster << layout.cluster_bits,
            width.bits()
        )));
    }
    Ok(())
}

/// Whether any part of a range is also something else.
fn is_overlapped<S: Source + ?Sized>(
    image: &Image<'_, S>,
    overlaps: &BTreeSet<u64>,
    offset: u64,
    length: u64,
) -> bool {
    let bits = image.layout.cluster_bits;
    overlaps.range(offset >> bits..offset.saturating_add(length).div_ceil(1 << bits)).next().is_some()
}

/// Writes entries of 8 bytes. Whatever led there, the header is not among them.
fn write_entries<S: Storage + ?Sized>(image: &Image<'_, S>, entries: &[Wrong]) -> Result<()> {
    for entry in entries.iter().filter(|entry| entry.at >= image.layout.cluster_size()) {
        let written = image.source.write_all_at(entry.at, &entry.right.to_be_bytes());
        written.map_err(|error| Error::io(format!("write the entry at {}", entry.at), error))?;
    }
    Ok(())
}

/// Makes the flags say what the counts do.
fn mend_flags<S: Storage + ?Sized>(
    image: &Image<'_, S>,
    overlaps: &BTreeSet<u64>,
    actions: &mut Vec<String>,
) -> Result<()> {
    let (mut mended, mut stored) = (0, Stored::new(image));
    flags::look(image, &mut stored, &mut Report::new(0), |wrong| {
        if wrong.iter().any(|entry| is_overlapped(image, overlaps, entry.at, 8)) {
            return Ok(());
        }
        mended += wrong.len();
        write_entries(image, wrong)
    })?;
    if mended > 0 {
        actions.push(format!("corrected the flag of {mended} entries that their cluster is used once"));
    }
    Ok(())
}

/// Mends entries of tables, where that loses nothing.
fn mend_entries<S: Storage + ?Sized>(
    image: &Image<'_, S>,
    overlaps: &BTreeSet<u64>,
    actions: &mut Vec<String>,
) -> Result<()> {
    let header = &image.header;
    let mut mended = 0;
    let mut l1_tables = vec![(header.l1_offset, header.l1_entries)];
    let snapshots = image.snapshots.iter().filter(|snapshot| image.can_follow(snapshot));
    l1_tables.extend(snapshots.map(|snapshot| (snapshot.l1_offset, snapshot.l1_entries)));
    let mut wrong = Vec::new();
    let mut seen = 0u64;
    for (offset, entries) in l1_tables {
        // As the check does: tables that share nothing cannot be larger than the file.
        seen = seen.saturating_add(u64::from(entries) * 8);
        if seen > image.length.saturating_add(header.l1_bytes()) {
            break;
        }
        let mut tables = BTreeSet::new();
        let overlapped = is_overlapped(image, overlaps, offset, u64::from(entries) * 8);
        image.entries(offset, entries.into(), |index, raw| {
            let entry = L1Entry(raw);
            if let Ok(Some(table)) = entry.decode(&image.layout)
                && table < image.length
            {
                tables.insert(table);
            }
            let right = if entry.offset() == 0 { 0 } else { raw & !entry.reserved() };
            if right != raw && !overlapped {
                wrong.push(Wrong { at: offset + index * 8, right });
            }
            Ok(())
        })?;
        for table in tables {
            if !is_overlapped(image, overlaps, table, image.layout.cluster_size()) {
                l2_entries(image, table, &mut wrong)?;
            }
            mended += wrong.len();
            write_entries(image, &wrong)?;
            wrong.clear();
        }
        mended += wrong.len();
        write_entries(image, &wrong)?;
        wrong.clear();
    }
    if mended > 0 {
        actions.push(format!("cleared bits that must not be set in {mended} entries of L1 and L2 tables"));
    }
    mend_bitmap_tables(image, overlaps, actions)
}

/// Collects the entries of an L2 table of which bits can be cleared.
fn l2_entries<S: Storage + ?Sized>(image: &Image<'_, S>, table: u64, wrong: &mut Vec<Wrong>) -> Result<()> {
    let layout = image.layout;
    let mut bytes = vec![0; layout.cluster_len()];
    image.read(table, &mut bytes)?;
    for (index, raw) in bytes.chunks_exact(layout.l2_entry_size()).enumerate() {
        let entry = L2Entry(be64(raw, 0));
        let at = table + (index * layout.l2_entry_size()) as u64;
        let right = match entry.decode(&layout) {
            Ok(Cluster::Compressed(_)) => entry.with_copied(false).0,
            Ok(_) => entry.0 & !entry.reserved(),
            // It reads as zeros wherever it leads to, so that place need not be kept.
            Err(Malformed::Misaligned(_))
                if entry.0 & 1 != 0 && layout.version >= 3 && !layout.extended_l2 =>
            {
                L2Entry::ZERO.0
            }
            Err(_) => continue,
        };
        if right != entry.0 {
            wrong.push(Wrong { at, right });
        }
        if layout.extended_l2 && entry.is_compressed() && be64(raw, 8) != 0 {
            wrong.push(Wrong { at: at + 8, right: 0 });
        }
    }
    Ok(())
}

/// Entries of bitmaps that lead nowhere say from now on that everything is dirty, which is never too little.
fn mend_bitmap_tables<S: Storage + ?Sized>(
    image: &Image<'_, S>,
    overlaps: &BTreeSet<u64>,
    actions: &mut Vec<String>,
) -> Result<()> {
    let cluster = image.layout.cluster_size();
    let mut seen = 0u64;
    for bitmap in &image.bitmaps {
        let (offset, bytes) = (bitmap.table_offset, u64::from(bitmap.table_entries) * 8);
        seen = seen.saturating_add(bytes);
        let sound = image.can_follow_bitmap(bitmap) && seen <= image.length;
        if !sound || is_overlapped(image, overlaps, offset, bytes) {
            continue;
        }
        let mut wrong = Vec::new();
        image.entries(offset, bytes / 8, |index, raw| {
            let entry = BitmapTableEntry(raw);
            let leads_nowhere = match entry.decode(&image.layout) {
                Ok(Some(bits)) => !image.holds(bits, cluster),
                Ok(None) => false,
                Err(_) => true,
            };
            let right = if leads_nowhere { BitmapTableEntry::ONES.0 } else { raw & !entry.reserved() };
            if right != raw {
                wrong.push(Wrong { at: offset + index * 8, right });
            }
            Ok(())
        })?;
        write_entries(image, &wrong)?;
        if !wrong.is_empty() {
            actions.push(format!(
                "mended {} entries of bitmap \"{}\": what they led to counts as dirty",
                wrong.len(),
                bitmap.text()
            ));
        }
    }
    Ok(())
}
