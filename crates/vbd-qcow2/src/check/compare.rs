//! The counts that the image holds beside those that are true.

use std::ops::Range;

use super::counts::{CHUNK, Counts};
use super::report::{Class, Report};
use super::stored::Stored;
use super::{Image, Result};
use crate::storage::Source;

/// Clusters one behind the other of which the same is wrong.
struct Run {
    clusters: Range<u64>,
    stored: u64,
    used: u64,
}

/// Adds to the report where counts are wrong.
pub(super) struct Differences<'r> {
    report: &'r mut Report,
    bits: u32,
    run: Option<Run>,
}

impl<'r> Differences<'r> {
    pub(super) fn new(report: &'r mut Report, cluster_bits: u32) -> Self {
        Differences { report, bits: cluster_bits, run: None }
    }

    fn add(&mut self, cluster: u64, stored: u64, used: u64) {
        match &mut self.run {
            Some(run) if run.clusters.end == cluster && (run.stored, run.used) == (stored, used) => {
                run.clusters.end += 1;
            }
            _ => {
                self.end();
                self.run = Some(Run { clusters: cluster..cluster + 1, stored, used });
            }
        }
    }

    fn end(&mut self) {
        let Some(Run { clusters, stored, used }) = self.run.take() else { return };
        let class = if stored > used { Class::Leak } else { Class::Refcount };
        let (start, count, bits) = (clusters.start << self.bits, clusters.end - clusters.start, self.bits);
        self.report.add(class, count, || {
            let place = match count {
                1 => format!("the cluster at {start:#x}"),
                _ => format!("the {count} clusters from {start:#x} to {:#x}", clusters.end << bits),
            };
            (place, format!("the refcount is {stored}, and there are {used} references"))
        });
    }
}

impl Drop for Differences<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

/// Compares the counts of the window with those that the image holds, and tells whether something is used that there is no
/// usable refcount block for.
pub(super) fn compare<S: Source + ?Sized>(
    image: &Image<'_, S>,
    counts: &Counts,
    stored: &mut Stored<'_, '_, S>,
    differences: &mut Differences<'_>,
) -> Result<bool> {
    let mut missing = false;
    let (window, bits) = (counts.window(), image.layout.refcount_block_bits());
    let width = image.layout.refcount_width;
    let mut at = window.start;
    for index in window.start >> bits..image.refcount_table.len() as u64 {
        let clusters = (index << bits).max(window.start)..((index + 1) << bits).min(window.end);
        if clusters.is_empty() {
            break;
        }
        at = clusters.end;
        let Some(block) = stored.block(index)? else {
            for (cluster, used) in counts.used(clusters) {
                missing = true;
                differences.add(cluster, 0, used);
            }
            continue;
        };
        // Pieces of a chunk, so that those that nothing is in are passed over together.
        let mut piece = clusters.start;
        while piece < clusters.end {
            let end = (piece / CHUNK + 1).saturating_mul(CHUNK).min(clusters.end);
            let first = usize::try_from(piece - (index << bits)).expect("an index within a block");
            let bytes =
                byte_range(width.order(), first, usize::try_from(end - piece).expect("within a chunk"));
            if counts.has_chunk(piece / CHUNK) || block[bytes].iter().any(|byte| *byte != 0) {
                for cluster in piece..end {
                    let entry = usize::try_from(cluster - (index << bits)).expect("an index within a block");
                    let (stored, used) = (width.get(block, entry), counts.get(cluster));
                    if stored != used {
                        differences.add(cluster, stored, used);
                    }
                }
            }
            piece = end;
        }
    }
    // Behind all that the table can count.
    for (cluster, used) in counts.used(at..window.end) {
        missing = true;
        differences.add(cluster, 0, used);
    }
    Ok(missing)
}

/// The bytes that hold some counts of a block.
fn byte_range(order: u32, first: usize, count: usize) -> Range<usize> {
    let bit = |index: usize| index << order;
    bit(first) / 8..bit(first + count).div_ceil(8)
}
