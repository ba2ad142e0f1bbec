//! An image that is looked at: its header and the tables that fit in memory, as far as they can be read.

use std::io;

use super::report::{Class, Report};
use super::{Error, Result};
use crate::format::{
    BitmapEntry, Header, Layout, RefcountTableEntry, Snapshot, autoclear, be64, incompatible, limit,
    read_bitmaps, read_snapshots,
};
use crate::storage::{Source, read_padded_at};

/// An image that is looked at.
pub(super) struct Image<'a, S: Source + ?Sized> {
    pub(super) source: &'a S,
    pub(super) header: Header,
    pub(super) layout: Layout,
    /// The length of the file, in bytes.
    pub(super) length: u64,
    pub(super) snapshots: Vec<Snapshot>,
    /// Bytes of the snapshot table.
    pub(super) snapshot_bytes: u64,
    pub(super) bitmaps: Vec<BitmapEntry>,
    /// Entries of the refcount table.
    pub(super) refcount_table: Vec<RefcountTableEntry>,
}

/// How much of a table is read at once, in bytes.
const BATCH: usize = 1 << 20;

impl<'a, S: Source + ?Sized> Image<'a, S> {
    /// Opens an image. What cannot be read of its tables is added to the report.
    pub(super) fn open(source: &'a S, report: &mut Report) -> Result<Self> {
        let header = Header::read(source)?;
        header.refuse_unknown()?;
        let length = source.length().map_err(|error| Error::io("ask for the length of the file", error))?;
        let layout = header.layout();
        let mut image = Image {
            source,
            layout,
            length,
            snapshots: Vec::new(),
            snapshot_bytes: 0,
            bitmaps: Vec::new(),
            refcount_table: Vec::new(),
            header,
        };
        let header = &image.header;
        if header.has(incompatible::DIRTY) {
            report.note("the image was not closed: its refcounts may be out of date");
        }
        if header.has(incompatible::CORRUPT) {
            report.note("the image is marked as corrupt: it is not written to before it is repaired");
        }
        match read_snapshots(header, source) {
            Ok((snapshots, bytes)) => {
                (image.snapshots, image.snapshot_bytes) = (snapshots, bytes as u64);
            }
            Err(error) => {
                report.incomplete = true;
                report.add(Class::Snapshot, 1, || ("the snapshot table".to_owned(), error.to_string()));
            }
        }
        match (header.bitmaps(), header.autoclear & autoclear::BITMAPS != 0) {
            (None, true) => report.add(Class::Header, 1, || {
                let reason = "the bit for bitmaps is set, and there is no header extension for them";
                ("the header".to_owned(), reason.to_owned())
            }),
            (Some(_), false) => report.note(
                "a program that does not know bitmaps has written to the image: its bitmaps are void, and the \
                 room that they take is lost",
            ),
            (Some(_), true) => match read_bitmaps(header, source) {
                Ok(bitmaps) => image.bitmaps = bitmaps,
                Err(error) => {
                    report.incomplete = true;
                    report.add(Class::Bitmap, 1, || ("the bitmap directory".to_owned(), error.to_string()));
                }
            },
            (None, false) => {}
        }
        let mut table = Vec::new();
        let (offset, bytes) = (image.header.refcount_table_offset, image.header.refcount_table_bytes());
        image.entries(offset, bytes / 8, |_, entry| {
            table.push(RefcountTableEntry(entry));
            Ok(())
        })?;
        table.resize(usize::try_from(bytes / 8).expect("within the limit"), RefcountTableEntry(0));
        image.refcount_table = table;
        Ok(image)
    }

    /// Reads a table of numbers of 8 bytes, as far as the file has it.
    pub(super) fn entries(
        &self,
        offset: u64,
        count: u64,
        mut entry: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let mut bytes = vec![0; usize::try_from(count * 8).unwrap_or(BATCH).min(BATCH)];
        let mut index = 0;
        while index < count {
            let at = offset.saturating_add(index * 8);
            if at >= self.length {
                break;
            }
            let length = usize::try_from((count - index) * 8).unwrap_or(BATCH).min(BATCH);
            self.read(at, &mut bytes[..length])?;
            for word in bytes[..length].chunks_exact(8) {
                entry(index, be64(word, 0))?;
                index += 1;
            }
        }
        Ok(())
    }

    /// Reads a range; what is behind the end of the file reads as zeros.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        read_padded_at(self.source, offset, buffer)
            .map_err(|error| Error::io(format!("read {} bytes at {offset}", buffer.len()), error))
    }

    /// Whether a range is in the file, or ends less than a cluster behind its end, as a file that was not filled up does.
    pub(super) fn holds(&self, offset: u64, length: u64) -> bool {
        let end = offset.saturating_add(length);
        end <= self.length || end - self.length < self.layout.cluster_size()
    }

    /// Whether the L1 table of a snapshot can be where the snapshot says.
    pub(super) fn can_follow(&self, snapshot: &Snapshot) -> bool {
        let offset = snapshot.l1_offset;
        self.layout.is_aligned(offset) && offset != 0 && u64::from(snapshot.l1_entries) * 8 <= limit::L1_BYTES
    }

    /// Whether the table of a bitmap can be where its entry says.
    pub(super) fn can_follow_bitmap(&self, bitmap: &BitmapEntry) -> bool {
        let (offset, entries) = (bitmap.table_offset, u64::from(bitmap.table_entries));
        let fits = entries > 0 && entries << self.layout.cluster_bits <= limit::BITMAP_BYTES;
        self.layout.is_aligned(offset) && offset != 0 && fits
    }

    /// Clusters that the refcount table can count.
    pub(super) fn countable(&self) -> u64 {
        (self.refcount_table.len() as u64) << self.layout.refcount_block_bits()
    }

    /// The offsets of the usable refcount blocks by their index: those that are where a cluster is, in the file, and not
    /// used twice.
    pub(super) fn blocks(&self) -> Vec<Option<u64>> {
        let mut seen = std::collections::HashSet::new();
        let usable = |entry: &RefcountTableEntry| {
            let offset = entry.decode(&self.layout).ok().flatten();
            offset.filter(|offset| self.holds(*offset, self.layout.cluster_size()) && seen.insert(*offset))
        };
        self.refcount_table.iter().map(usable).collect()
    }
}

impl Error {
    pub(super) fn io(doing: impl Into<String>, error: io::Error) -> Self {
        Error::Io { doing: doing.into(), error }
    }
}
