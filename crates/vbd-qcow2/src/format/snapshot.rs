//! The snapshot table ("Snapshots").

use vbd_image::ReadAt;

use super::{Error, Header, Result, be16, be32, be64, limit, printable};

/// A snapshot inside the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table is, in bytes.
    pub l1_offset: u64,
    /// Entries of that table.
    pub l1_entries: u32,
    /// What it is told apart by: a number as a rule.
    pub id: Vec<u8>,
    /// Its name.
    pub name: Vec<u8>,
    /// Seconds since the epoch when it was taken.
    pub seconds: u32,
    /// Nanoseconds beyond that.
    pub nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub guest_nanoseconds: u64,
    /// Bytes of the machine's state; 0 where there is none.
    pub vm_state_size: u64,
    /// Bytes of the virtual disk. `None` in an entry of an old image that does not say it: it is the image's.
    pub disk_size: Option<u64>,
    /// The number of instructions that were recorded, where the entry says it.
    pub icount: Option<u64>,
    /// Extra data that is not known here, behind what is.
    pub extra: Vec<u8>,
}

/// Bytes of an entry in front of its extra data.
const FIXED: usize = 40;

impl Snapshot {
    /// Reads an entry and tells its length.
    fn parse(bytes: &[u8], header: &Header, place: &Place) -> Result<(Snapshot, usize)> {
        let short = |need: usize| Error::Truncated {
            what: "the snapshot table",
            offset: header.snapshots_offset,
            need: place.offset.saturating_add(need as u64),
            end: header.snapshots_offset.saturating_add(place.offset + bytes.len() as u64),
        };
        if bytes.len() < FIXED {
            return Err(short(FIXED));
        }
        let field = |field: &str, value: &dyn std::fmt::Display, allowed: String| {
            Error::field(format!("{field} of snapshot {}", place.index), value, allowed)
        };
        let (extra_size, id_size, name_size) = (be32(bytes, 36), be16(bytes, 12), be16(bytes, 14));
        if extra_size > limit::SNAPSHOT_EXTRA {
            let allowed = format!("it is at most {}", limit::SNAPSHOT_EXTRA);
            return Err(field("the size of the extra data", &extra_size, allowed));
        }
        let id = FIXED + extra_size as usize;
        let name = id + usize::from(id_size);
        let end = name + usize::from(name_size);
        if bytes.len() < end {
            return Err(short(end));
        }
        let extra = &bytes[FIXED..id];
        let number = |index: usize| (extra.len() >= index * 8 + 8).then(|| be64(extra, index * 8));
        let snapshot = Snapshot {
            l1_offset: be64(bytes, 0),
            l1_entries: be32(bytes, 8),
            id: bytes[id..name].to_vec(),
            name: bytes[name..end].to_vec(),
            seconds: be32(bytes, 16),
            nanoseconds: be32(bytes, 20),
            guest_nanoseconds: be64(bytes, 24),
            vm_state_size: number(0).unwrap_or(be32(bytes, 32).into()),
            disk_size: number(1),
            icount: number(2),
            extra: extra.get(24..).unwrap_or_default().to_vec(),
        };
        Ok((snapshot, end.next_multiple_of(8)))
    }

    /// Whether its L1 table can be where it says, and is long enough for its disk. Reading the table does not ask that, so
    /// that one bad snapshot does not hide the others: whoever uses one asks.
    ///
    /// # Errors
    ///
    /// A field has a value that it cannot have.
    pub fn validate(&self, header: &Header) -> Result<()> {
        let layout = header.layout();
        let field = |field: &str, value: String, allowed: String| {
            Error::field(format!("{field} of snapshot \"{}\"", printable(&self.id)), value, allowed)
        };
        if !layout.is_aligned(self.l1_offset) || self.l1_offset == 0 || self.l1_offset > limit::SIZE {
            let allowed = format!("it is a multiple of the cluster size, {}", layout.cluster_size());
            return Err(field("l1_table_offset", format!("{:#x}", self.l1_offset), allowed));
        }
        if u64::from(self.l1_entries) * 8 > limit::L1_BYTES {
            let allowed = format!("it is at most {}", limit::L1_BYTES / 8);
            return Err(field("l1_size", self.l1_entries.to_string(), allowed));
        }
        let size = self.disk_size.unwrap_or(header.size);
        if size > limit::SIZE {
            return Err(field("the disk size", size.to_string(), format!("it is at most {}", limit::SIZE)));
        }
        let needed = layout.l1_entries(size);
        if u64::from(self.l1_entries) < needed {
            let allowed = format!("a virtual disk of {size} bytes needs {needed}");
            return Err(field("l1_size", self.l1_entries.to_string(), allowed));
        }
        Ok(())
    }

    fn encode(&self, header: &Header, bytes: &mut Vec<u8>) {
        let start = bytes.len();
        bytes.extend(self.l1_offset.to_be_bytes());
        bytes.extend(self.l1_entries.to_be_bytes());
        // Both came out of 16 bits, or are cut where they are given.
        let short = |text: &[u8]| u16::try_from(text.len()).unwrap_or(u16::MAX);
        let (id, name) = (&self.id[..short(&self.id).into()], &self.name[..short(&self.name).into()]);
        bytes.extend(short(id).to_be_bytes());
        bytes.extend(short(name).to_be_bytes());
        bytes.extend(self.seconds.to_be_bytes());
        bytes.extend(self.nanoseconds.to_be_bytes());
        bytes.extend(self.guest_nanoseconds.to_be_bytes());
        // The short field is passed over where the long one is there, which it is.
        bytes.extend(u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        let extra = bytes.len();
        bytes.extend([0; 4]);
        bytes.extend(self.vm_state_size.to_be_bytes());
        bytes.extend(self.disk_size.unwrap_or(header.size).to_be_bytes());
        if self.icount.is_some() || !self.extra.is_empty() {
            bytes.extend(self.icount.unwrap_or(u64::MAX).to_be_bytes());
            bytes.extend(&self.extra);
        }
        let extra_size = u32::try_from(bytes.len() - start - FIXED).unwrap_or(u32::MAX);
        bytes[extra..extra + 4].copy_from_slice(&extra_size.to_be_bytes());
        bytes.extend(id);
        bytes.extend(name);
        bytes.resize(start + (bytes.len() - start).next_multiple_of(8), 0);
    }
}

/// Which entry is read, for errors.
struct Place {
    index: u32,
    /// Bytes from the start of the table.
    offset: u64,
}

/// The entries of a snapshot table, and the bytes that the table takes.
///
/// # Errors
///
/// The bytes end before the last entry does, or a field has a value that it cannot have.
pub fn parse_snapshots(header: &Header, table: &[u8]) -> Result<(Vec<Snapshot>, usize)> {
    let mut snapshots = Vec::new();
    let mut offset = 0;
    for index in 0..header.snapshots {
        let place = Place { index, offset: offset as u64 };
        let rest = table.get(offset..).unwrap_or_default();
        let (snapshot, length) = Snapshot::parse(rest, header, &place)?;
        snapshots.push(snapshot);
        offset += length;
        if offset as u64 > limit::SNAPSHOT_TABLE_BYTES {
            let allowed = format!("it is at most {} bytes", limit::SNAPSHOT_TABLE_BYTES);
            return Err(Error::field("the size of the snapshot table", offset, allowed));
        }
    }
    Ok((snapshots, offset))
}

/// Reads the snapshot table of an image, and tells the bytes that it takes.
///
/// # Errors
///
/// Those of reading and of [`parse_snapshots`].
pub fn read_snapshots<S: ReadAt + ?Sized>(header: &Header, source: &S) -> Result<(Vec<Snapshot>, usize)> {
    let offset = header.snapshots_offset;
    if header.snapshots == 0 {
        return Ok((Vec::new(), 0));
    }
    // The length is known when the last entry was read: more is read as long as it is missing.
    let mut table = vec![0; 4096];
    loop {
        let read = source.fill_at(offset, &mut table).map_err(|error| Error::Read {
            what: "the snapshot table",
            offset,
            error,
        })?;
        let ended = read < table.len();
        table.truncate(read);
        match parse_snapshots(header, &table) {
            Err(Error::Truncated { .. }) if !ended && (read as u64) < limit::SNAPSHOT_TABLE_BYTES => {
                table.resize(read * 4, 0);
            }
            result => return result,
        }
    }
}

/// A snapshot table of these entries. Each gets the extra data that version 3 demands.
pub fn encode_snapshots(header: &Header, snapshots: &[Snapshot]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for snapshot in snapshots {
        snapshot.encode(header, &mut bytes);
    }
    bytes
}
