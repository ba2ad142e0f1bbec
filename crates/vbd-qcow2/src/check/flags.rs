//! The flags that say whether a cluster is used exactly once. They are right in tables that the active L1 table leads to;
//! elsewhere nobody believes them.

use std::collections::BTreeMap;

use super::Result;
use super::image::Image;
use super::report::{Class, Report};
use super::stored::Stored;
use crate::format::{Cluster, L1Entry, L2Entry, be64};
use crate::storage::Source;

/// An entry of a table that is not what it should be.
pub(super) struct Wrong {
    /// Where it is in the file, in bytes.
    pub(super) at: u64,
    /// What it should be.
    pub(super) right: u64,
}

/// Looks at all entries that lead from the active L1 table, and tells those whose flag does not say what the counts in
/// the image do. `wrong` gets the entries of a table together: an L2 table, or the L1 table.
pub(super) fn look<S: Source + ?Sized>(
    image: &Image<'_, S>,
    stored: &mut Stored<'_, '_, S>,
    report: &mut Report,
    mut wrong: impl FnMut(&[Wrong]) -> Result<()>,
) -> Result<()> {
    let (layout, header) = (image.layout, &image.header);
    // In the order of the file, each once.
    let mut tables = BTreeMap::new();
    let mut found = Vec::new();
    image.entries(header.l1_offset, header.l1_entries.into(), |index, raw| {
        let entry = L1Entry(raw);
        let Ok(Some(table)) = entry.decode(&layout) else { return Ok(()) };
        tables.entry(table).or_insert(index);
        let count = stored.get(table >> layout.cluster_bits)?;
        if entry.copied() != (count == 1) {
            report.add(Class::Copied, 1, || {
                (format!("entry {index} of the L1 table, {raw:#x}"), text(count, entry.copied()))
            });
            found.push(Wrong { at: header.l1_offset + index * 8, right: entry.with_copied(count == 1).0 });
        }
        Ok(())
    })?;
    if !found.is_empty() {
        wrong(&found)?;
    }
    let mut bytes = vec![0; layout.cluster_len()];
    for (table, l1) in tables {
        if table >= image.length {
            continue;
        }
        image.read(table, &mut bytes)?;
        found.clear();
        for (index, raw) in bytes.chunks_exact(layout.l2_entry_size()).enumerate() {
            let entry = L2Entry(be64(raw, 0));
            let Some(right) = right_flag(image, stored, entry)? else { continue };
            if entry.copied() == right.0 {
                continue;
            }
            report.add(Class::Copied, 1, || {
                let guest = (l1 << layout.l2_span_bits()) + ((index as u64) << layout.cluster_bits);
                let place = format!("entry {index} of the L2 table at {table:#x} (guest offset {guest:#x})");
                (format!("{place}, {:#x}", entry.0), text(right.1, entry.copied()))
            });
            let at = table + (index * layout.l2_entry_size()) as u64;
            found.push(Wrong { at, right: entry.with_copied(right.0).0 });
        }
        if !found.is_empty() {
            wrong(&found)?;
        }
    }
    Ok(())
}

/// What the flag of an entry should be, and the count that says so; `None` where it says nothing.
fn right_flag<S: Source + ?Sized>(
    image: &Image<'_, S>,
    stored: &mut Stored<'_, '_, S>,
    entry: L2Entry,
) -> Result<Option<(bool, u64)>> {
    let layout = &image.layout;
    Ok(match entry.decode(layout) {
        // Never shared.
        Ok(Cluster::Data { .. } | Cluster::Zero { host: Some(_) }) if layout.data_file => Some((true, 1)),
        Ok(Cluster::Data { host } | Cluster::Zero { host: Some(host) }) => {
            let count = stored.get(host >> layout.cluster_bits)?;
            Some((count == 1, count))
        }
        _ => None,
    })
}

fn text(count: u64, copied: bool) -> String {
    let flag = if copied { "says that it is 1" } else { "does not say that it is 1" };
    format!("the refcount is {count}, and the entry {flag}")
}
