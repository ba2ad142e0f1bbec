//! Persistent bitmaps: their directory and their tables ("Bitmaps").

use vbd_image::ReadAt;

use super::extension::printable;
use super::{BitmapsExtension, Error, Header, Layout, Malformed, Result, be16, be32, be64, limit};
use crate::storage::read_exact_at;

/// Flags of a bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct BitmapFlags {
    /// It was not saved, so its bits may be wrong.
    pub in_use: bool,
    /// It is enabled: each writer of the image must keep it.
    pub auto: bool,
    /// It may be used by those who do not know its extra data.
    pub extra_compatible: bool,
    /// Bits that are reserved.
    pub reserved: u32,
}

impl BitmapFlags {
    fn from_bits(bits: u32) -> Self {
        BitmapFlags {
            in_use: bits & 1 != 0,
            auto: bits & 2 != 0,
            extra_compatible: bits & 4 != 0,
            reserved: bits & !7,
        }
    }

    fn bits(self) -> u32 {
        self.reserved
            | u32::from(self.in_use)
            | u32::from(self.auto) << 1
            | u32::from(self.extra_compatible) << 2
    }
}

/// The type of a dirty tracking bitmap.
const DIRTY_TRACKING: u8 = 1;
/// Bytes of an entry in front of its extra data.
const FIXED: usize = 24;

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Where its table is, in bytes.
    pub table_offset: u64,
    /// Entries of that table.
    pub table_entries: u32,
    /// Its flags.
    pub flags: BitmapFlags,
    /// Bytes of the disk that a bit stands for, as a power of two.
    pub granularity_bits: u8,
    /// Its name: 1 to 1023 bytes.
    pub name: Vec<u8>,
    /// Extra data, of which nothing is known here.
    pub extra: Vec<u8>,
}

impl BitmapEntry {
    /// Reads an entry and tells its length.
    fn parse(bytes: &[u8], index: u32) -> Result<(BitmapEntry, usize)> {
        let field = |field: &str, value: String, allowed: String| {
            Error::field(format!("{field} of bitmap {index}"), value, allowed)
        };
        let length = |need: usize| {
            let allowed = format!("{} bytes of the bitmap directory are left", bytes.len());
            field("the length of the entry", need.to_string(), allowed)
        };
        if bytes.len() < FIXED {
            return Err(length(FIXED));
        }
        let (extra_size, name_size) = (be32(bytes, 20), be16(bytes, 18));
        if bytes[16] != DIRTY_TRACKING {
            return Err(field("type", bytes[16].to_string(), "it is 1, a dirty tracking bitmap".to_owned()));
        }
        if !limit::BITMAP_GRANULARITY.contains(&bytes[17]) {
            return Err(field("granularity_bits", bytes[17].to_string(), "it is 9 to 31".to_owned()));
        }
        if name_size == 0 || name_size > limit::BITMAP_NAME {
            let allowed = format!("it is 1 to {}", limit::BITMAP_NAME);
            return Err(field("name_size", name_size.to_string(), allowed));
        }
        let name = usize::try_from(extra_size).ok().and_then(|extra| extra.checked_add(FIXED));
        let end = name.and_then(|name| name.checked_add(name_size.into()));
        let (Some(name), Some(end)) = (name, end.filter(|end| *end <= bytes.len())) else {
            return Err(length(end.unwrap_or(usize::MAX)));
        };
        let entry = BitmapEntry {
            table_offset: be64(bytes, 0),
            table_entries: be32(bytes, 8),
            flags: BitmapFlags::from_bits(be32(bytes, 12)),
            granularity_bits: bytes[17],
            name: bytes[name..end].to_vec(),
            extra: bytes[FIXED..name].to_vec(),
        };
        if entry.flags.reserved != 0 {
            let allowed = "bits 3 to 31 are 0".to_owned();
            return Err(field("flags", format!("{:#x}", be32(bytes, 12)), allowed));
        }
        // The last entry need not be padded.
        Ok((entry, end.next_multiple_of(8).min(bytes.len())))
    }

    /// Bytes of the entry in the directory.
    pub fn length(&self) -> usize {
        (FIXED + self.extra.len() + self.name.len()).next_multiple_of(8)
    }

    /// Bits of the bitmap of a disk of `size` bytes.
    pub const fn bits(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.granularity_bits)
    }

    /// Entries of the table of the bitmap of a disk of `size` bytes.
    pub const fn clusters(&self, layout: &Layout, size: u64) -> u64 {
        layout.clusters(self.bits(size).div_ceil(8))
    }

    /// Whether its bits may be believed: it was saved, and its extra data does not forbid it.
    pub fn is_usable(&self) -> bool {
        !self.flags.in_use && (self.extra.is_empty() || self.flags.extra_compatible)
    }

    /// Its name for people.
    pub fn text(&self) -> String {
        printable(&self.name)
    }

    fn encode(&self, bytes: &mut Vec<u8>) {
        let start = bytes.len();
        bytes.extend(self.table_offset.to_be_bytes());
        bytes.extend(self.table_entries.to_be_bytes());
        bytes.extend(self.flags.bits().to_be_bytes());
        bytes.extend([DIRTY_TRACKING, self.granularity_bits]);
        // Both are bounded where they are read and where they are given.
        bytes.extend(u16::try_from(self.name.len()).unwrap_or(u16::MAX).to_be_bytes());
        bytes.extend(u32::try_from(self.extra.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend(&self.extra);
        bytes.extend(&self.name);
        bytes.resize(start + (bytes.len() - start).next_multiple_of(8), 0);
    }
}

/// The entries of a bitmap directory.
///
/// # Errors
///
/// The directory is malformed: a field has a value that it cannot have, a name appears twice, or its length is not that
/// of its entries.
pub fn parse_bitmaps(extension: &BitmapsExtension, directory: &[u8]) -> Result<Vec<BitmapEntry>> {
    let mut entries: Vec<BitmapEntry> = Vec::new();
    let mut names = std::collections::HashSet::new();
    let mut rest = directory;
    for index in 0..extension.count {
        let (entry, length) = BitmapEntry::parse(rest, index)?;
        if !names.insert(entry.name.clone()) {
            let value = format!("\"{}\", as another's", entry.text());
            return Err(Error::field(format!("the name of bitmap {index}"), value, "each name is used once"));
        }
        entries.push(entry);
        rest = &rest[length..];
    }
    if !rest.is_empty() {
        let allowed = format!("its {} entries take {}", extension.count, directory.len() - rest.len());
        return Err(Error::field("the size of the bitmap directory", directory.len(), allowed));
    }
    Ok(entries)
}

/// Reads the bitmap directory of an image; there is none where the header has no such extension.
///
/// # Errors
///
/// Those of reading and of [`parse_bitmaps`].
pub fn read_bitmaps<S: ReadAt + ?Sized>(header: &Header, source: &S) -> Result<Vec<BitmapEntry>> {
    let Some(extension) = header.bitmaps() else { return Ok(Vec::new()) };
    let offset = extension.directory_offset;
    // Bounded by the extension's parser.
    let mut directory = vec![0; usize::try_from(extension.directory_size).unwrap_or(0)];
    read_exact_at(source, offset, &mut directory).map_err(|error| Error::Read {
        what: "the bitmap directory",
        offset,
        error,
    })?;
    parse_bitmaps(&extension, &directory)
}

/// A bitmap directory of these entries.
pub fn encode_bitmaps(entries: &[BitmapEntry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        entry.encode(&mut bytes);
    }
    bytes
}

/// An entry of a bitmap's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapTableEntry(pub u64);

impl BitmapTableEntry {
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    /// All bits are clear.
    pub const ZEROS: BitmapTableEntry = BitmapTableEntry(0);
    /// All bits are set.
    pub const ONES: BitmapTableEntry = BitmapTableEntry(1);

    /// Where the bits are, in bytes; 0 where they are all the same.
    pub const fn offset(self) -> u64 {
        self.0 & Self::OFFSET
    }

    /// Whether all bits are set, where there are none in the file.
    pub const fn ones(self) -> bool {
        self.0 & 1 != 0
    }

    /// Bits that are set and reserved.
    pub const fn reserved(self) -> u64 {
        self.0 & if self.offset() == 0 { !Self::OFFSET & !1 } else { !Self::OFFSET }
    }

    /// The offset of the bits, if they are in the file.
    ///
    /// # Errors
    ///
    /// It is not aligned to a cluster.
    pub fn decode(self, layout: &Layout) -> Result<Option<u64>, Malformed> {
        match self.offset() {
            0 => Ok(None),
            offset if layout.is_aligned(offset) => Ok(Some(offset)),
            offset => Err(Malformed::Misaligned(offset)),
        }
    }
}

/// Reads the table of a bitmap.
///
/// # Errors
///
/// It is malformed in size or place, or cannot be read.
pub fn read_bitmap_table<S: ReadAt + ?Sized>(
    layout: &Layout,
    entry: &BitmapEntry,
    source: &S,
) -> Result<Vec<BitmapTableEntry>> {
    let (offset, entries) = (entry.table_offset, entry.table_entries);
    let name = || format!("of bitmap \"{}\"", entry.text());
    if !layout.is_aligned(offset) || offset == 0 || offset > limit::SIZE {
        let allowed = format!("it is a multiple of the cluster size, {}", layout.cluster_size());
        return Err(Error::field(format!("the table's offset {}", name()), format!("{offset:#x}"), allowed));
    }
    let most = limit::BITMAP_BYTES >> layout.cluster_bits;
    if entries == 0 || u64::from(entries) > most {
        return Err(Error::field(
            format!("the table's size {}", name()),
            entries,
            format!("it is 1 to {most} entries"),
        ));
    }
    let mut bytes = vec![0; entries as usize * 8];
    read_exact_at(source, offset, &mut bytes).map_err(|error| Error::Read {
        what: "the table of a bitmap",
        offset,
        error,
    })?;
    Ok(bytes.chunks_exact(8).map(|entry| BitmapTableEntry(be64(entry, 0))).collect())
}
