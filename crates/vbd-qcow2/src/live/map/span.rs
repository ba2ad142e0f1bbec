//! What a range of the disk is mapped to.

use super::table::{Entry, Table};
use crate::format::{Cluster, Compressed, Layout, Malformed};

/// What a range is mapped to, all of it in the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::live) enum Span {
    /// It is there, one byte after the other.
    Data {
        /// Where the first byte is.
        host: u64,
        /// Nobody else refers to it: it may be written in place.
        owned: bool,
    },
    /// It reads as zeroes.
    Zero {
        /// Space is set aside for it.
        reserved: bool,
    },
    /// The image does not have it.
    Below,
    /// A part of a compressed cluster.
    Compressed {
        /// Where that is.
        cluster: Compressed,
        /// Bytes of it before the range begins.
        skip: u64,
    },
    /// The entry is one that no correct image has.
    Bad(Malformed),
}

impl Span {
    /// The same from so many bytes later on.
    fn after(self, len: u64) -> Span {
        match self {
            Span::Data { host, owned } => Span::Data { host: host + len, owned },
            Span::Compressed { cluster, skip } => Span::Compressed { cluster, skip: skip + len },
            other => other,
        }
    }
}

/// The index of an offset's entry in its table.
#[inline]
pub(in crate::live) fn index_of(layout: &Layout, offset: u64) -> usize {
    let index = offset >> layout.cluster_bits & (layout.l2_entries() as u64 - 1);
    usize::try_from(index).expect("less than the entries of a table")
}

/// What an entry says of the byte so far into its cluster, and how many bytes it says so of.
fn within(layout: &Layout, entry: Entry, inside: u64) -> (Span, u64) {
    let rest = layout.cluster_size() - inside;
    let cluster = match entry.cluster.decode(layout) {
        Ok(cluster) => cluster,
        Err(error) => return (Span::Bad(error), rest),
    };
    let owned = entry.cluster.copied();
    if layout.extended_l2 {
        if let Err(error) = entry.parts.validate(cluster) {
            return (Span::Bad(error), rest);
        }
        if !matches!(cluster, Cluster::Compressed(_)) {
            return parts(layout, entry, cluster, inside);
        }
    }
    let span = match cluster {
        Cluster::Unallocated => Span::Below,
        Cluster::Zero { host } => Span::Zero { reserved: host.is_some() },
        Cluster::Data { host } => Span::Data { host: host + inside, owned },
        Cluster::Compressed(cluster) => Span::Compressed { cluster, skip: inside },
    };
    (span, rest)
}

/// The same by the bitmap of subclusters.
fn parts(layout: &Layout, entry: Entry, cluster: Cluster, inside: u64) -> (Span, u64) {
    let size = layout.subcluster_size();
    let first = inside / size;
    let (allocated, zero) = (entry.parts.allocated() >> first, entry.parts.zero() >> first);
    let there = if let Cluster::Data { host } = cluster { Some(host) } else { None };
    let left = 32 - u32::try_from(first).unwrap_or(31);
    let (span, count) = if allocated & 1 != 0 {
        let host = there.unwrap_or_default() + inside;
        (Span::Data { host, owned: entry.cluster.copied() }, allocated.trailing_ones())
    } else if zero & 1 != 0 {
        (Span::Zero { reserved: there.is_some() }, zero.trailing_ones())
    } else {
        (Span::Below, (allocated | zero).trailing_zeros())
    };
    (span, u64::from(count.min(left)) * size - inside % size)
}

/// What a range of at most `most` bytes from an offset on is mapped to by its table, and for how many bytes.
#[inline]
pub(in crate::live) fn span(layout: &Layout, table: &Table, offset: u64, most: u64) -> (Span, u64) {
    let mut index = index_of(layout, offset);
    let (span, mut len) = within(layout, table.get(layout, index), offset & layout.offset_mask());
    // One that ended within its cluster is followed by something else.
    while len < most && (offset + len) & layout.offset_mask() == 0 && !matches!(span, Span::Compressed { .. })
    {
        index += 1;
        if index == layout.l2_entries() {
            break;
        }
        let (next, more) = within(layout, table.get(layout, index), 0);
        if next != span.after(len) {
            break;
        }
        len += more;
    }
    (span, len.min(most))
}
