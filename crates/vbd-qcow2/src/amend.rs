//! Options of an image that is there, changed while nobody uses it.
//!
//! Each change is one switch of the header, with what it leads to made durable before; what the old one led to is given back
//! after that. So a power cut leaves an image with the change or without it, and clusters that leak at worst.

use std::collections::BTreeMap;

use crate::bitmaps::space::{Space, grow_table};
use crate::bitmaps::{Error, Result};
use crate::check::{self, Repair, rebuild_with_width, repair};
use crate::create::Version;
use crate::format::{
    Cluster, Extension, Header, L1Entry, L2Entry, RefcountWidth, Snapshot, Subclusters, autoclear, be64,
    compatible, encode_snapshots, feature_table, incompatible, limit, read_snapshots,
};
use crate::rewrite::replace_header;
use crate::shrink::open_sound;
use crate::storage::{Storage, read_exact_at};

/// What is to be changed; what is none stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Amend {
    /// The version of the format.
    pub version: Option<Version>,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: Option<bool>,
    /// The format of the backing file, as it is written into the image.
    pub backing_format: Option<String>,
    /// Whether the external data file always reads as a raw image.
    pub data_file_raw: Option<bool>,
    /// Bits of a reference count.
    pub refcount_bits: Option<u32>,
}

/// Bytes of a header of version 3, and of version 2.
const LENGTH_V3: u32 = 112;
const LENGTH_V2: u32 = 72;

/// Changes an image, and says what was done. Everything that cannot be is refused before anything is written.
///
/// Whoever calls this holds the image's lease.
///
/// # Errors
///
/// A change is not possible, which the message names; the image is not in order; or it cannot be written.
pub fn amend<S: Storage + ?Sized>(storage: &S, wanted: &Amend) -> Result<Vec<String>> {
    let header = open_sound(storage)?;
    let target = Target::new(&header, wanted)?;
    if header.version >= 3 && target.version < 3 {
        refuse_version_2(storage, &header)?;
    }
    let mut done = Vec::new();
    if header.version < 3 && target.version >= 3 {
        with_room(storage, |storage| raise(storage, &Header::read(storage)?))?;
        done.push("the image is of version 3 now".to_owned());
    }
    if target.width != header.refcount_width {
        let failed = |error: check::Error| Error::Refused(error.to_string());
        rebuild_with_width(storage, target.width, &check::Options::default()).map_err(failed)?;
        // The counts before.
        repair(storage, Repair::Leaks, &check::Options::default()).map_err(failed)?;
        done.push(format!("reference counts have {} bits now", target.width.bits()));
    }
    let now = Header::read(storage)?;
    let new = target.apply(&now, &mut done);
    if new != now {
        replace_header(storage, &now, &new).map_err(Error::io("write the header"))?;
    }
    if new.version >= 3 && target.version < 3 {
        lower(storage, &new)?;
        done.push("the image is of version 2 now".to_owned());
    }
    Ok(done)
}

/// What an image is to be like.
struct Target {
    version: u32,
    width: RefcountWidth,
    lazy_refcounts: bool,
    backing_format: Option<String>,
    data_file_raw: bool,
}

impl Target {
    fn new(header: &Header, wanted: &Amend) -> Result<Self> {
        let refuse = |reason: &str| Err(Error::Refused(reason.to_owned()));
        let version = match wanted.version {
            Some(Version::V2) => 2,
            Some(Version::V3) => 3,
            None => header.version,
        };
        // What version 2 does not have ends with it, where nothing is lost.
        let lazy_refcounts = wanted.lazy_refcounts.unwrap_or(version >= 3 && header.lazy_refcounts());
        let width = match wanted.refcount_bits {
            Some(bits) => RefcountWidth::from_bits(bits).map_err(|_| {
                Error::Refused(format!("refcounts of {bits} bits: it is 1, 2, 4, 8, 16, 32 or 64"))
            })?,
            None if version < 3 => RefcountWidth::V2,
            None => header.refcount_width,
        };
        if version < 3 && lazy_refcounts {
            return refuse(
                "version 2 of the format has no lazy refcounts; leave that out, or make it version 3",
            );
        }
        if version < 3 && width != RefcountWidth::V2 {
            return refuse(
                "version 2 of the format has refcounts of 16 bits alone; leave that out, or make it version 3",
            );
        }
        if wanted.backing_format.is_some() && header.backing.is_none() {
            return refuse("the image has no backing file whose format could be said");
        }
        if wanted.data_file_raw == Some(true) && !header.raw_data() {
            return refuse(
                "a data file reads as a raw image only if that was so from the beginning: convert the image, with --data-file-raw",
            );
        }
        Ok(Target {
            version,
            width,
            lazy_refcounts,
            backing_format: wanted.backing_format.clone(),
            data_file_raw: wanted.data_file_raw.unwrap_or(header.raw_data()),
        })
    }

    /// The header with what one bit or name says.
    fn apply(&self, now: &Header, done: &mut Vec<String>) -> Header {
        let mut new = now.clone();
        if self.lazy_refcounts != now.lazy_refcounts() {
            new.compatible ^= compatible::LAZY_REFCOUNTS;
            done.push(format!("lazy refcounts are {} now", if self.lazy_refcounts { "on" } else { "off" }));
        }
        if self.data_file_raw != now.raw_data() {
            new.autoclear &= !autoclear::RAW_DATA;
            done.push("the data file need not read as a raw image any more".to_owned());
        }
        if let (Some(format), Some(_)) = (&self.backing_format, &now.backing)
            && now.backing_format() != Some(format.as_bytes())
        {
            new.set_extension(Extension::BackingFormat(format.as_bytes().to_vec()));
            done.push(format!("the backing file's format is {format} now"));
        }
        new
    }
}

/// Does what needs clusters, with a longer refcount table where there is none left.
fn with_room<S: Storage + ?Sized>(storage: &S, work: impl Fn(&S) -> Result<()>) -> Result<()> {
    match work(storage) {
        Err(Error::NoTable) => {
            grow_table(storage)?;
            work(storage)
        }
        other => other,
    }
}

/// From version 2 to 3. Snapshots have to say there how large their disk was.
fn raise<S: Storage + ?Sized>(storage: &S, header: &Header) -> Result<()> {
    let mut new = header.clone();
    (new.version, new.length) = (3, LENGTH_V3);
    new.unknown = vec![0; LENGTH_V3 as usize - 105];
    new.extensions.retain(|extension| !matches!(extension, Extension::FeatureNames(_)));
    new.encode()?;
    let bare = new.extensions.len();
    new.extensions.push(feature_table());
    if new.encode().is_err() {
        new.extensions.truncate(bare);
    }
    let (snapshots, old_len) = read_snapshots(header, storage)?;
    let mut space = Space::new(storage, header)?;
    let sync = || storage.sync().map_err(Error::io("make the image durable"));
    if !snapshots.is_empty() {
        let said = |snapshot: &Snapshot| Snapshot {
            disk_size: Some(snapshot.disk_size.unwrap_or(header.size)),
            ..snapshot.clone()
        };
        let table = encode_snapshots(&new, &snapshots.iter().map(said).collect::<Vec<_>>());
        if table.len() as u64 > limit::SNAPSHOT_TABLE_BYTES {
            return Err(Error::Refused("the snapshot table is as long as its format allows".to_owned()));
        }
        let layout = header.layout();
        let place = space.take(layout.clusters(table.len() as u64))?;
        let mut table = table;
        table.resize(table.len().next_multiple_of(layout.cluster_len()), 0);
        storage.write_all_at(place, &table).map_err(Error::io("write the snapshot table"))?;
        sync()?;
        new.snapshots_offset = place;
    }
    replace_header(storage, header, &new).map_err(Error::io("write the header"))?;
    if !snapshots.is_empty() {
        space.give_back(header.snapshots_offset, old_len as u64)?;
        sync()?;
    }
    Ok(())
}

/// Says what version 2 cannot say, before anything is changed.
fn refuse_version_2<S: Storage + ?Sized>(storage: &S, header: &Header) -> Result<()> {
    let refuse = |reason: &str| Err(Error::Refused(format!("version 2 of the format has no {reason}")));
    if header.has(incompatible::DATA_FILE) {
        return refuse("external data file: convert the image");
    }
    if header.has(incompatible::EXTENDED_L2) {
        return refuse("subclusters (extended L2 entries): convert the image");
    }
    if header.has(incompatible::COMPRESSION) {
        return refuse("compression other than zlib: convert the image");
    }
    if header.bitmaps().is_some() {
        return refuse("bitmaps: remove them first, with `vbd bitmap remove`");
    }
    if header.backing.is_some() && zeroes(storage, header, |_, _| Ok(()))? > 0 {
        return refuse(
            "way to say that a cluster reads as zeroes over a backing file, and this image has such: flatten it first",
        );
    }
    Ok(())
}

/// From version 3 to 2: clusters that read as zeroes by a flag become clusters that are not there, which read so, too.
fn lower<S: Storage + ?Sized>(storage: &S, header: &Header) -> Result<()> {
    let layout = header.layout();
    let sync = || storage.sync().map_err(Error::io("make the image durable"));
    let mut given_up: BTreeMap<u64, u64> = BTreeMap::new();
    zeroes(storage, header, |place, (host, times)| {
        storage.write_all_at(place, &[0; 8]).map_err(Error::io("write an L2 table"))?;
        if let Some(host) = host {
            *given_up.entry(host >> layout.cluster_bits).or_default() += times;
        }
        Ok(())
    })?;
    sync()?;
    let mut space = Space::new(storage, header)?;
    for (cluster, times) in given_up {
        space.lower(cluster, times)?;
    }
    sync()?;
    let mut new = header.clone();
    (new.version, new.length) = (2, LENGTH_V2);
    (new.incompatible, new.compatible, new.autoclear) = (0, 0, 0);
    new.unknown.clear();
    new.extensions.retain(|extension| !matches!(extension, Extension::FeatureNames(_)));
    replace_header(storage, header, &new).map_err(Error::io("write the header"))
}

/// Looks for entries that say zeroes, in the active tables and those of snapshots, and tells how many there are. `each` gets
/// the place of one in the file, the cluster that is set aside for it, and how many L1 entries lead to its table.
fn zeroes<S: Storage + ?Sized>(
    storage: &S,
    header: &Header,
    mut each: impl FnMut(u64, (Option<u64>, u64)) -> Result<()>,
) -> Result<u64> {
    let layout = header.layout();
    let mut tables: BTreeMap<u64, u64> = BTreeMap::new();
    let (snapshots, _) = read_snapshots(header, storage)?;
    let mut l1_tables = vec![(header.l1_offset, header.l1_bytes())];
    l1_tables
        .extend(snapshots.iter().map(|snapshot| (snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8)));
    for (offset, bytes) in l1_tables {
        let mut table = vec![0; usize::try_from(bytes).expect("within the limit")];
        read_exact_at(storage, offset, &mut table).map_err(Error::io("read an L1 table"))?;
        for entry in table.chunks_exact(8).map(|entry| L1Entry(be64(entry, 0)).offset()) {
            if entry != 0 {
                *tables.entry(entry).or_default() += 1;
            }
        }
    }
    let mut count = 0;
    let mut bytes = vec![0; layout.cluster_len()];
    for (table, times) in tables {
        read_exact_at(storage, table, &mut bytes).map_err(Error::io("read an L2 table"))?;
        for (index, entry) in bytes.chunks_exact(layout.l2_entry_size()).enumerate() {
            let is_zero = match L2Entry(be64(entry, 0)).decode(&layout) {
                Ok(Cluster::Zero { host }) => Some(host),
                Ok(Cluster::Unallocated) if layout.extended_l2 => {
                    (Subclusters(be64(entry, 8)).zero() != 0).then_some(None)
                }
                _ => None,
            };
            if let Some(host) = is_zero {
                count += 1;
                each(table + (index * layout.l2_entry_size()) as u64, (host, times))?;
            }
        }
    }
    Ok(count)
}
