//! VMDK in one sparse file ("hosted sparse extent"): `monolithicSparse`, and `streamOptimized`, whose grains are compressed.
//! The specification is VMware's "Virtual Disk Format 5.0"; sections are named by their titles.

mod descriptor;
mod packed;

use std::collections::HashMap;
use std::sync::Arc;

use vbd_image::ReadAt;

use crate::bytes::{Fields, exactly, table};
use crate::layout::{Layout, Place};
use crate::{Format, FormatError};

pub use packed::unpack;
pub(crate) use packed::{MARKER_LEN, packed_len};

const SECTOR: u64 = 512;
const MAGIC: &[u8; 4] = b"KDMV";
/// Entries of a grain table: always so many.
const TABLE_ENTRIES: u64 = 512;
/// Where the directory is told by the footer.
const AT_END: u64 = u64::MAX;
/// The most grain tables (64 million grains).
const MOST_TABLES: u64 = 1 << 17;
/// Grains of 4 KiB to 1 MiB; 64 KiB is what nearly all have.
const GRAIN_SECTORS: std::ops::RangeInclusive<u64> = 8..=2048;

const HAS_ZERO_GRAINS: u32 = 1 << 2;
const IS_COMPRESSED: u32 = 1 << 16;
const HAS_MARKERS: u32 = 1 << 17;
/// Flags that say nothing about where grains are: how line ends are detected, and a second directory.
const HARMLESS: u32 = 3;

/// The fields of the header that count ("Hosted Sparse Extent Header").
struct Header {
    flags: u32,
    capacity: u64,
    grain_sectors: u64,
    descriptor: (u64, u64),
    directory: u64,
}

/// The grain tables: some are not there.
type Tables = Box<[Option<Arc<[u32]>>]>;

/// The grains of a VMDK.
pub struct Vmdk {
    size: u64,
    grain: u64,
    packed: bool,
    zero_grains: bool,
    tables: Tables,
}

impl Vmdk {
    /// Reads an image of `len` bytes.
    ///
    /// # Errors
    /// See [`read`](crate::read).
    pub fn read(source: &(impl ReadAt + ?Sized), len: u64) -> Result<Self, FormatError> {
        let mut start = [0; 512];
        let filled = source.fill_at(0, &mut start)?;
        if start.starts_with(b"# Disk DescriptorFile") {
            let text =
                exactly(source, 0, usize::try_from(len.min(1 << 16)).unwrap_or(1 << 16), "the descriptor")?;
            let kind = descriptor::Descriptor::parse(&text).kind;
            return Err(FormatError::Unsupported(format!(
                "it is the descriptor of a disk in several files ({}), which is not read here: `qemu-img convert -O raw` \
                 makes one file of it",
                kind.escape_debug()
            )));
        }
        if filled < start.len() || !start.starts_with(MAGIC) {
            return Err(FormatError::Not(Format::Vmdk));
        }
        let mut header = header(&start)?;
        let descriptor = match header.descriptor {
            (_, 0) => None,
            (at, sectors) => {
                let len = usize::try_from(sectors.min(128) * SECTOR).expect("small");
                Some(descriptor::Descriptor::parse(&exactly(source, in_bytes(at)?, len, "the descriptor")?))
            }
        };
        if let Some(descriptor) = &descriptor {
            descriptor.check()?;
        }
        if header.directory == AT_END {
            // The footer is a second header, in front of the sector that ends the stream.
            let at = len.checked_sub(2 * SECTOR).ok_or(FormatError::Truncated("the footer"))?;
            let end = exactly(source, at, 512, "the footer")?;
            if !end.starts_with(MAGIC) {
                return Err(FormatError::Truncated("the footer"));
            }
            header = self::header(end.as_slice().try_into().expect("a sector"))?;
        }
        let tables = tables(source, &header, len)?;
        Ok(Vmdk {
            size: header.capacity * SECTOR,
            grain: header.grain_sectors * SECTOR,
            packed: header.flags & IS_COMPRESSED != 0,
            zero_grains: header.flags & HAS_ZERO_GRAINS != 0,
            tables,
        })
    }
}

fn header(bytes: &[u8; 512]) -> Result<Header, FormatError> {
    let fields = Fields(bytes);
    let version = fields.u32(4);
    if !(1..=3).contains(&version) {
        return Err(FormatError::value("the version", version, "1 to 3 are known"));
    }
    let flags = fields.u32(8);
    let unknown = flags & !(HARMLESS | HAS_ZERO_GRAINS | IS_COMPRESSED | HAS_MARKERS);
    if unknown & 0xffff_0000 != 0 {
        // The upper half is what a reader has to know.
        return Err(FormatError::value(
            "the flags",
            format!("{flags:#x}"),
            "some of them are not known here",
        ));
    }
    let algorithm = fields.u16(77);
    if flags & IS_COMPRESSED != 0 && (algorithm != 1 || flags & HAS_MARKERS == 0) {
        return Err(FormatError::value("the compression", algorithm, "1 (deflate) with markers is known"));
    }
    let (capacity, grain_sectors) = (fields.u64(12), fields.u64(20));
    if !GRAIN_SECTORS.contains(&grain_sectors) || !grain_sectors.is_power_of_two() {
        return Err(FormatError::value(
            "the grain size",
            grain_sectors,
            "a power of two from 8 to 2048 sectors is expected",
        ));
    }
    if u64::from(fields.u32(44)) != TABLE_ENTRIES {
        return Err(FormatError::value("the entries of a grain table", fields.u32(44), "512 are expected"));
    }
    if capacity == 0 || capacity.div_ceil(grain_sectors * TABLE_ENTRIES) > MOST_TABLES {
        return Err(FormatError::value("the capacity", capacity, "1 sector to 67108864 grains are read"));
    }
    let descriptor = (fields.u64(28), fields.u64(36));
    Ok(Header { flags, capacity, grain_sectors, descriptor, directory: fields.u64(56) })
}

/// Reads the directory and the tables that it names.
fn tables(source: &(impl ReadAt + ?Sized), header: &Header, len: u64) -> Result<Tables, FormatError> {
    let count = header.capacity.div_ceil(header.grain_sectors * TABLE_ENTRIES);
    let at = in_bytes(header.directory)?;
    if at == 0 || at.saturating_add(count * 4) > len {
        return Err(FormatError::Truncated("the grain directory"));
    }
    let directory = exactly(source, at, usize::try_from(count * 4).expect("bounded"), "the grain directory")?;
    // Entries of a damaged or malicious directory may all name one table, which is then kept once.
    let mut known: HashMap<u32, Arc<[u32]>> = HashMap::new();
    let mut tables = Vec::new();
    for sector in table(&directory) {
        if sector == 0 {
            tables.push(None);
            continue;
        }
        let entries = match known.get(&sector) {
            Some(entries) => entries.clone(),
            None => {
                let bytes = exactly(source, u64::from(sector) * SECTOR, 2048, "a grain table")?;
                let entries: Arc<[u32]> = table(&bytes).into();
                known.insert(sector, entries.clone());
                entries
            }
        };
        tables.push(Some(entries));
    }
    Ok(tables.into())
}

fn in_bytes(sector: u64) -> Result<u64, FormatError> {
    let bytes = sector.checked_mul(SECTOR).filter(|bytes| *bytes <= i64::MAX.cast_unsigned());
    bytes.ok_or_else(|| FormatError::value("an offset", sector, "it has to be within the file (in sectors)"))
}

impl Layout for Vmdk {
    fn size(&self) -> u64 {
        self.size
    }

    fn block_size(&self) -> u64 {
        self.grain
    }

    fn place(&self, block: u64) -> Place {
        let (number, entry) = (block / TABLE_ENTRIES, block % TABLE_ENTRIES);
        let entries = usize::try_from(number).ok().and_then(|number| self.tables.get(number)?.as_ref());
        let entry = entries.and_then(|entries| entries.get(usize::try_from(entry).ok()?)).copied();
        match entry {
            None | Some(0) => Place::Hole,
            Some(1) if self.zero_grains => Place::Zero,
            Some(sector) if self.packed => Place::Packed(u64::from(sector) * SECTOR),
            Some(sector) => Place::File(u64::from(sector) * SECTOR),
        }
    }

    fn kind(&self) -> &'static str {
        if self.packed { "VMDK, streamOptimized" } else { "VMDK, monolithicSparse" }
    }
}
