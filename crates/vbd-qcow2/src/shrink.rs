//! A smaller disk in the same image, while nobody uses it.
//!
//! What the disk keeps is written anew where tables lead to both parts: the L1 table, one L2 table at most, bitmaps. When that
//! is durable, the header leads there: the disk has its old size and all of its content before, and its new size after. Only
//! then are references given up, so a power cut leaves clusters that leak at worst.
//!
//! Snapshots keep the size that they have, and all that they hold.

use crate::bitmaps::space::{Space, grow_table};
use crate::bitmaps::{self, Error, Result};
use crate::check::{self, check};
use crate::format::{
    Cluster, Encryption, Header, L1Entry, L2Entry, Layout, autoclear, be64, incompatible, read_snapshots,
};
use crate::rewrite::replace_header;
use crate::storage::{Storage, read_exact_at};

/// Refuses an image that is not to be changed before something else has happened.
///
/// # Errors
/// It is malformed, was not closed, or something in it does not fit together.
pub(crate) fn open_sound<S: Storage + ?Sized>(storage: &S) -> Result<Header> {
    let header = Header::read(storage)?;
    header.refuse_unknown()?;
    let refuse = |reason: String| Err(Error::Refused(reason));
    if header.has(incompatible::CORRUPT | incompatible::DIRTY) {
        return refuse("the image was not closed, or is marked as corrupt; repair it first".to_owned());
    }
    if header.autoclear & autoclear::NOTES != 0 {
        let message = "a process that served the image was killed; open it for writing once, so that its last changes are made";
        return refuse(message.to_owned());
    }
    let report = check(storage, &check::Options { kept: 1, ..check::Options::default() });
    let report = report.map_err(|error| Error::Refused(error.to_string()))?;
    if report.errors > 0 || report.incomplete {
        let found = report.findings.first().map_or(String::new(), |finding| format!(": {finding}"));
        return refuse(format!("the image has to be repaired first{found}"));
    }
    Ok(header)
}

/// Makes a disk smaller: to `size` bytes. What is beyond is lost, but to snapshots. An external data file is the caller's to
/// cut off afterwards.
///
/// Whoever calls this holds the image's lease.
///
/// # Errors
///
/// The size is no multiple of 512 or larger than it is; the image is not in order, or has a snapshot that does not say how
/// large its disk was; or it cannot be written. Then the disk has its old size and content.
pub fn shrink<S: Storage + ?Sized>(storage: &S, size: u64) -> Result<()> {
    let header = open_sound(storage)?;
    let refuse = |reason: String| Err(Error::Refused(reason));
    if !size.is_multiple_of(512) || size == 0 {
        return refuse(format!("{size} bytes are no multiple of 512, or nothing at all"));
    }
    if size > header.size {
        return refuse(format!("{size} bytes are more than the {} it has", header.size));
    }
    if size == header.size {
        return Ok(());
    }
    let (snapshots, _) = read_snapshots(&header, storage)?;
    if let Some(snapshot) = snapshots.iter().find(|snapshot| snapshot.disk_size.is_none()) {
        return refuse(format!(
            "snapshot \"{}\" does not say how large its disk was, as those of old programs; delete it first",
            String::from_utf8_lossy(&snapshot.name)
        ));
    }
    match try_shrink(storage, &header, size) {
        Err(Error::NoTable) => {
            grow_table(storage)?;
            try_shrink(storage, &Header::read(storage)?, size)
        }
        other => other,
    }
}

fn try_shrink<S: Storage + ?Sized>(storage: &S, header: &Header, size: u64) -> Result<()> {
    let mut space = Space::new(storage, header)?;
    let mut taken = Vec::new();
    let sync = || storage.sync().map_err(Error::io("make the smaller disk durable"));
    let made = Shrink::new(storage, header, size)
        .and_then(|shrink| shrink.write(&mut space, &mut taken).map(|new| (shrink, new)));
    let (shrink, New { header: new, bitmaps }) = match made {
        Ok(made) => made,
        Err(error) => {
            // Nothing leads to what was taken.
            for (offset, length) in taken {
                space.give_back(offset, length)?;
            }
            sync()?;
            return Err(error);
        }
    };
    sync()?;
    replace_header(storage, header, &new).map_err(Error::io("write the header"))?;
    shrink.give_up(&mut space, &bitmaps)?;
    sync()?;
    let layout = header.layout();
    let end = space.end()? << layout.cluster_bits;
    let length = storage.length().map_err(Error::io("ask for the length of the file"))?;
    if end < length {
        match storage.set_len(end) {
            // A block device has the length that it has.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {}
            result => result.map_err(Error::io("cut off the file"))?,
        }
    }
    sync()
}

/// What a new header leads to.
struct New {
    header: Header,
    bitmaps: Vec<crate::format::BitmapEntry>,
}

/// A disk that is to become smaller.
struct Shrink<'a, S: Storage + ?Sized> {
    storage: &'a S,
    header: &'a Header,
    layout: Layout,
    size: u64,
    /// The active L1 table as it is.
    l1: Vec<L1Entry>,
    /// The table that maps both what is kept and what is not: its index, and its bytes as they are.
    split: Option<(usize, Vec<u8>)>,
}

impl<'a, S: Storage + ?Sized> Shrink<'a, S> {
    fn new(storage: &'a S, header: &'a Header, size: u64) -> Result<Self> {
        let layout = header.layout();
        let mut bytes = vec![0; len(header.l1_bytes())];
        read_exact_at(storage, header.l1_offset, &mut bytes).map_err(Error::io("read the L1 table"))?;
        let l1: Vec<_> = bytes.chunks_exact(8).map(|entry| L1Entry(be64(entry, 0))).collect();
        let mut shrink = Shrink { storage, header, layout, size, l1, split: None };
        let kept = layout.clusters(size);
        let index = len(kept >> layout.l2_bits());
        let inside = len(kept & ((1 << layout.l2_bits()) - 1));
        if let Some(entry) = shrink.l1.get(index).filter(|entry| inside > 0 && entry.offset() != 0) {
            let table = shrink.table(*entry)?;
            let first = inside * layout.l2_entry_size();
            shrink.split = table[first..].iter().any(|byte| *byte != 0).then_some((index, table));
        }
        Ok(shrink)
    }

    fn table(&self, entry: L1Entry) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.layout.cluster_len()];
        read_exact_at(self.storage, entry.offset(), &mut bytes).map_err(Error::io("read an L2 table"))?;
        Ok(bytes)
    }

    /// Bytes of the L2 table that maps the new end which map what is kept.
    fn kept_bytes(&self) -> usize {
        let kept = self.layout.clusters(self.size);
        len(kept & ((1 << self.layout.l2_bits()) - 1)) * self.layout.l2_entry_size()
    }

    /// Writes the tables that the smaller disk has, and gives the header that leads to them.
    fn write(&self, space: &mut Space<'_, S>, taken: &mut Vec<(u64, u64)>) -> Result<New> {
        let (storage, layout) = (self.storage, &self.layout);
        let mut take = |space: &mut Space<'_, S>, length: u64| {
            let offset = space.take(layout.clusters(length))?;
            taken.push((offset, length));
            Ok::<_, Error>(offset)
        };
        let entries = len(layout.l1_entries(self.size));
        let mut l1 = self.l1.clone();
        l1.truncate(entries);
        if let Some((index, bytes)) = &self.split {
            let mut bytes = bytes.clone();
            bytes[self.kept_bytes()..].fill(0);
            let offset = take(space, layout.cluster_size())?;
            storage.write_all_at(offset, &bytes).map_err(Error::io("write an L2 table"))?;
            l1[*index] = L1Entry::new(offset, true);
        }
        let mut bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
        let l1_offset = take(space, bytes.len() as u64)?;
        bytes.resize(bytes.len().next_multiple_of(layout.cluster_len()), 0);
        storage.write_all_at(l1_offset, &bytes).map_err(Error::io("write the L1 table"))?;
        let (mut header, bitmaps) = if self.has_bitmaps() {
            bitmaps::write_cut(storage, self.header, self.size, space, taken)?
        } else {
            (self.header.clone(), Vec::new())
        };
        header.size = self.size;
        (header.l1_offset, header.l1_entries) = (l1_offset, u32::try_from(l1.len()).unwrap_or(u32::MAX));
        Ok(New { header, bitmaps })
    }

    fn has_bitmaps(&self) -> bool {
        bitmaps::are_valid(self.header) && self.header.bitmaps().is_some()
    }

    /// Gives up what only the larger disk had: nothing leads there any more, but from snapshots.
    fn give_up(&self, space: &mut Space<'_, S>, bitmaps: &[crate::format::BitmapEntry]) -> Result<()> {
        let layout = &self.layout;
        self.clear_rest()?;
        let mut holes = Holes { storage: self.storage, layout: *layout, run: 0..0 };
        if let Some((index, bytes)) = &self.split {
            self.give_up_entries(space, &bytes[self.kept_bytes()..], &mut holes)?;
            holes.lower(space, self.l1[*index].offset() >> layout.cluster_bits)?;
        }
        let first = len(layout.l1_entries(self.size));
        for entry in self.l1.iter().skip(first).filter(|entry| entry.offset() != 0) {
            self.give_up_entries(space, &self.table(*entry)?, &mut holes)?;
            holes.lower(space, entry.offset() >> layout.cluster_bits)?;
        }
        space.give_back(self.header.l1_offset, self.header.l1_bytes())?;
        if self.has_bitmaps() {
            bitmaps::give_back_old(self.storage, self.header, bitmaps, space)?;
        }
        holes.end()
    }

    fn give_up_entries(
        &self,
        space: &mut Space<'_, S>,
        entries: &[u8],
        holes: &mut Holes<'_, S>,
    ) -> Result<()> {
        let bits = self.layout.cluster_bits;
        for entry in entries.chunks_exact(self.layout.l2_entry_size()) {
            let clusters = match L2Entry(be64(entry, 0)).decode(&self.layout) {
                // In a file of their own, which is cut off by whoever calls this.
                Ok(Cluster::Data { .. } | Cluster::Zero { .. }) if self.layout.data_file => continue,
                Ok(Cluster::Data { host } | Cluster::Zero { host: Some(host) }) => {
                    host >> bits..(host >> bits) + 1
                }
                Ok(Cluster::Compressed(it)) => it.offset >> bits..((it.end() - 1) >> bits) + 1,
                _ => continue,
            };
            clusters.into_iter().try_for_each(|cluster| holes.lower(space, cluster))?;
        }
        Ok(())
    }

    /// Zeroes what is behind the new end in the last cluster, so that it does not come back when the disk grows. Where that
    /// cluster is shared, compressed or encrypted, whoever makes the disk grow sees to it.
    fn clear_rest(&self) -> Result<()> {
        let (layout, rest) = (&self.layout, self.size & self.layout.offset_mask());
        if rest == 0 || layout.data_file || self.header.encryption != Encryption::None {
            return Ok(());
        }
        let cluster = self.size >> layout.cluster_bits;
        let Some(l1) = self.l1.get(len(cluster >> layout.l2_bits())).filter(|entry| entry.offset() != 0)
        else {
            return Ok(());
        };
        let at = len(cluster & ((1 << layout.l2_bits()) - 1)) * layout.l2_entry_size();
        let entry = L2Entry(be64(&self.table(*l1)?, at));
        if let Ok(Cluster::Data { host }) = entry.decode(layout)
            && entry.copied()
            && l1.copied()
        {
            let zeroes = vec![0; len(layout.cluster_size() - rest)];
            let written = self.storage.write_all_at(host + rest, &zeroes);
            written.map_err(Error::io("zero what is behind the new end"))?;
        }
        Ok(())
    }
}

/// Clusters that nobody has any more, one run of which is punched at once.
struct Holes<'a, S: Storage + ?Sized> {
    storage: &'a S,
    layout: Layout,
    run: std::ops::Range<u64>,
}

impl<S: Storage + ?Sized> Holes<'_, S> {
    /// Takes a reference away.
    fn lower(&mut self, space: &mut Space<'_, S>, cluster: u64) -> Result<()> {
        if !space.lower(cluster, 1)? {
            return Ok(());
        }
        if cluster == self.run.end {
            self.run.end += 1;
            return Ok(());
        }
        self.end()?;
        self.run = cluster..cluster + 1;
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        let bits = self.layout.cluster_bits;
        let run = std::mem::take(&mut self.run);
        if run.is_empty() {
            return Ok(());
        }
        self.storage
            .punch(run.start << bits, (run.end - run.start) << bits)
            .map_err(Error::io("give back room"))
    }
}

fn len(bytes: u64) -> usize {
    usize::try_from(bytes).expect("within the limits of tables")
}
