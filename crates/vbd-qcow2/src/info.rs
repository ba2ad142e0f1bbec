//! What can be said of an image without its data: its options, its snapshots and bitmaps, and the files that it names.

use serde::Serialize;
use vbd_image::ReadAt;

use crate::format::{
    self, Compression, Encryption, Error, Header, autoclear, incompatible, printable, read_bitmaps,
    read_snapshots,
};

/// An image, as it describes itself. Texts hold no control characters; sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Info {
    /// The version of the format: 2 or 3.
    pub version: u32,
    /// The size of the virtual disk.
    pub virtual_size: u64,
    /// The size of a cluster.
    pub cluster_size: u64,
    /// Bits of a reference count.
    pub refcount_bits: u32,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Whether clusters have subclusters.
    pub extended_l2: bool,
    /// How compressed clusters are compressed.
    pub compression: &'static str,
    /// How guest data is encrypted.
    pub encryption: Option<&'static str>,
    /// Whether refcounts may be wrong: it was not closed.
    pub dirty: bool,
    /// Whether something in it is known to be wrong.
    pub corrupt: bool,
    /// The backing file.
    pub backing: Option<Named>,
    /// The external data file.
    pub data_file: Option<DataFile>,
    /// Snapshots in the image.
    pub snapshots: Vec<Snapshot>,
    /// Bitmaps in the image.
    pub bitmaps: Vec<Bitmap>,
    /// Whether the bitmaps are consistent; without it none of them counts.
    pub bitmaps_consistent: bool,
    /// Incompatible features that are not known here: such an image cannot be opened.
    pub unknown_features: Option<String>,
    /// What keeps the snapshots or the bitmaps from being read.
    pub problems: Vec<String>,
}

/// A file that the image names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Named {
    /// Its name, as it is written there.
    pub name: String,
    /// Its format, as it is written there.
    pub format: Option<String>,
}

/// The external data file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DataFile {
    /// Its name, if the image says it.
    pub name: Option<String>,
    /// Whether it reads as a raw image.
    pub raw: bool,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// What it is told apart by.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was taken, in seconds since the epoch.
    pub seconds: u32,
    /// The size of the disk then.
    pub disk_size: u64,
    /// The size of the machine's state; 0 where there is none.
    pub vm_state_size: u64,
}

/// A bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// Whether writers keep it.
    pub enabled: bool,
    /// Whether it was not saved, so that it says nothing.
    pub in_use: bool,
}

/// Looks at an image.
///
/// # Errors
///
/// It cannot be read, or its header is malformed. Malformed tables are told in [`Info::problems`].
pub fn read<S: ReadAt + ?Sized>(source: &S) -> format::Result<Info> {
    let header = Header::read(source)?;
    let mut problems = Vec::new();
    let mut noted = |error: Error| problems.push(error.to_string());
    let snapshots = read_snapshots(&header, source).map_or_else(
        |error| {
            noted(error);
            Vec::new()
        },
        |(snapshots, _)| snapshots,
    );
    let bitmaps = read_bitmaps(&header, source).unwrap_or_else(|error| {
        noted(error);
        Vec::new()
    });
    Ok(Info {
        version: header.version,
        virtual_size: header.size,
        cluster_size: header.layout().cluster_size(),
        refcount_bits: header.refcount_width.bits(),
        lazy_refcounts: header.lazy_refcounts(),
        extended_l2: header.has(incompatible::EXTENDED_L2),
        compression: match header.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        },
        encryption: match header.encryption {
            Encryption::None => None,
            Encryption::Aes => Some("aes"),
            Encryption::Luks => Some("luks"),
        },
        dirty: header.has(incompatible::DIRTY),
        corrupt: header.has(incompatible::CORRUPT),
        backing: header
            .backing
            .as_ref()
            .map(|name| Named { name: printable(name), format: header.backing_format().map(printable) }),
        data_file: header
            .has(incompatible::DATA_FILE)
            .then(|| DataFile { name: header.data_file().map(printable), raw: header.raw_data() }),
        snapshots: snapshots
            .iter()
            .map(|snapshot| Snapshot {
                id: printable(&snapshot.id),
                name: printable(&snapshot.name),
                seconds: snapshot.seconds,
                disk_size: snapshot.disk_size.unwrap_or(header.size),
                vm_state_size: snapshot.vm_state_size,
            })
            .collect(),
        bitmaps: bitmaps
            .iter()
            .map(|bitmap| Bitmap {
                name: bitmap.text(),
                granularity: 1 << bitmap.granularity_bits,
                enabled: bitmap.flags.auto,
                in_use: bitmap.flags.in_use,
            })
            .collect(),
        bitmaps_consistent: header.bitmaps().is_none() || header.autoclear & autoclear::BITMAPS != 0,
        unknown_features: header.refuse_unknown().err().map(|error| error.to_string()),
        problems,
    })
}
