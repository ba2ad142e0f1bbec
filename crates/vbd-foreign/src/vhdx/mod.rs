//! VHDX, Hyper-V's second format. The specification is Microsoft's \[MS-VHDX\], version 20240423; sections are named by
//! their numbers.
//!
//! A file that was not closed cleanly has entries in its log that have to be replayed: in memory, since files are only read
//! here ([`log`]).

mod log;
mod metadata;

use vbd_image::ReadAt;

use crate::bytes::{Fields, exactly};
use crate::layout::{Layout, Place};
use crate::{Format, FormatError};
use metadata::Metadata;

const MARK: &[u8; 8] = b"vhdxfile";
const MIB: u64 = 1 << 20;
/// Where the headers and the region tables are (2.2).
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
const REGION_TABLE_LEN: usize = 64 << 10;
/// The most entries of a region table.
const MOST_REGIONS: u32 = 2047;
/// The most entries of a BAT that are read (512 MiB of them: 64 TiB in blocks of 1 MiB).
const MOST_ENTRIES: u64 = 1 << 26;

const BAT: [u8; 16] = guid(0x2dc2_7766, 0xf623, 0x4200, 0x9d64_115e_9bfd_4a08);
const METADATA: [u8; 16] = guid(0x8b7c_a206, 0x4790, 0x4b9a, 0xb8fe_575f_050f_886e);

/// The bytes of a GUID as the file has it.
const fn guid(a: u32, b: u16, c: u16, d: u64) -> [u8; 16] {
    let (a, b, c, d) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes(), d.to_be_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

/// The blocks of a VHDX.
pub struct Vhdx {
    size: u64,
    block_size: u64,
    /// Payload blocks that share one block of sector bitmaps, whose entry follows theirs (2.5).
    chunk: u64,
    entries: Box<[u64]>,
}

impl Vhdx {
    /// Reads an image of `len` bytes.
    ///
    /// # Errors
    /// See [`read`](crate::read).
    pub fn read(source: &(impl ReadAt + ?Sized), len: u64) -> Result<Self, FormatError> {
        let mut mark = [0; 8];
        if source.fill_at(0, &mut mark)? < 8 || mark != *MARK {
            return Err(FormatError::Not(Format::Vhdx));
        }
        let changes = check_header(source, len)?;
        let vhdx = Self::tables(&log::Replayed { source, changes: &changes }, len)?;
        vhdx.check_content(&changes)?;
        Ok(vhdx)
    }

    /// Reads the tables of a file whose log was replayed.
    fn tables(source: &impl ReadAt, len: u64) -> Result<Self, FormatError> {
        let regions = region_table(source)?;
        let region = |name: [u8; 16], what| {
            let found = regions.iter().find(|region| region.name == name);
            let region = found.ok_or_else(|| FormatError::value(what, "missing", "there has to be one"))?;
            let end = region.offset.checked_add(region.len);
            if region.offset < MIB || !region.offset.is_multiple_of(MIB) || end.is_none_or(|end| end > len) {
                return Err(FormatError::value(what, region.offset, "a multiple of 1 MiB within the file"));
            }
            Ok((region.offset, region.len))
        };
        let (bat_at, bat_len) = region(BAT, "the place of the table of blocks (BAT)")?;
        let (metadata_at, metadata_len) = region(METADATA, "the place of the metadata")?;
        let metadata = Metadata::read(source, metadata_at, metadata_len)?;
        let chunk = (1 << 23) * metadata.sector_size / metadata.block_size;
        let blocks = metadata.size.div_ceil(metadata.block_size);
        let count = blocks + (blocks - 1) / chunk;
        if count > MOST_ENTRIES || count * 8 > bat_len {
            return Err(FormatError::value(
                "the number of blocks",
                blocks,
                "the table (BAT) has to hold them",
            ));
        }
        let bytes =
            exactly(source, bat_at, usize::try_from(count * 8).expect("bounded"), "the table of blocks")?;
        let entries = bytes.chunks_exact(8).map(|entry| Fields(entry).u64(0)).collect();
        Ok(Vhdx { size: metadata.size, block_size: metadata.block_size, chunk, entries })
    }

    /// The log is for tables: the disk's content is read past it.
    fn check_content(&self, changes: &log::Changes) -> Result<(), FormatError> {
        if changes.is_empty() {
            return Ok(());
        }
        let blocks = self.size.div_ceil(self.block_size);
        let changed = |block| match self.place(block) {
            Place::File(at) => changes.touches(at..at.saturating_add(self.block_size)),
            _ => false,
        };
        if (0..blocks).any(changed) {
            let message = "its log changes the disk's content, and not only tables: open it once with Hyper-V, which \
                           replays that";
            return Err(FormatError::Unsupported(message.into()));
        }
        Ok(())
    }
}

/// Finds the header that is in force, the good one with the higher number (2.2.2); gives what its log changes.
fn check_header(source: &(impl ReadAt + ?Sized), len: u64) -> Result<log::Changes, FormatError> {
    let mut newest: Option<(u64, Vec<u8>)> = None;
    for at in HEADERS {
        let bytes = exactly(source, at, 4096, "the headers")?;
        let is_good = bytes.starts_with(b"head") && has_checksum(&bytes);
        let number = Fields(&bytes).u64(8);
        if is_good && newest.as_ref().is_none_or(|(newest, _)| number > *newest) {
            newest = Some((number, bytes));
        }
    }
    let (_, bytes) = newest.ok_or(FormatError::Checksum("both headers"))?;
    let header = Fields(&bytes);
    if header.u16(66) != 1 {
        return Err(FormatError::value("the version", header.u16(66), "1 is known"));
    }
    if header.guid(48) == [0; 16] {
        return Ok(log::Changes::default());
    }
    log::read(source, &header, len)
}

/// What the fuzzer calls with the bytes of a log.
pub(crate) fn fuzz_log(bytes: &[u8]) {
    log::fuzz(bytes);
}

/// Whether bytes have their CRC-32C in their second four, counted with zeroes there.
fn has_checksum(bytes: &[u8]) -> bool {
    let crc = crc32c::crc32c(&bytes[..4]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[8..]) == Fields(bytes).u32(4)
}

struct Region {
    name: [u8; 16],
    offset: u64,
    len: u64,
}

/// Reads the regions, of the first table that is good (2.2.3).
fn region_table(source: &(impl ReadAt + ?Sized)) -> Result<Vec<Region>, FormatError> {
    for at in REGION_TABLES {
        let bytes = exactly(source, at, REGION_TABLE_LEN, "the region tables")?;
        if !bytes.starts_with(b"regi") || !has_checksum(&bytes) {
            continue;
        }
        let count = Fields(&bytes).u32(8);
        if count > MOST_REGIONS {
            return Err(FormatError::value("the number of regions", count, "2047 are the most"));
        }
        let mut regions = Vec::new();
        for entry in bytes[16..].chunks_exact(32).take(count as usize).map(Fields) {
            let (name, is_required) = (entry.guid(0), entry.u32(28) & 1 != 0);
            if is_required && name != BAT && name != METADATA {
                return Err(FormatError::Unsupported(
                    "it has a required region that is not known here".into(),
                ));
            }
            regions.push(Region { name, offset: entry.u64(16), len: u64::from(entry.u32(24)) });
        }
        return Ok(regions);
    }
    Err(FormatError::Checksum("both region tables"))
}

/// A whole file out of a few bytes, for the fuzzer: those of a region table (256), of the metadata's table (512) and items
/// (128, behind it), and of a BAT (the rest, at 3 MiB), with good headers and checksums. A real one has 4 MiB at least.
pub(crate) fn assemble(parts: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 4 << 20];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let (regions, rest) = parts.split_at(parts.len().min(256));
    let (table, rest) = rest.split_at(rest.len().min(512));
    let (items, bat) = rest.split_at(rest.len().min(128));
    put(0, MARK);
    put(64 << 10, b"head");
    put((64 << 10) + 66, &1u16.to_le_bytes());
    put(192 << 10, regions);
    put(2 << 20, table);
    put((2 << 20) + (64 << 10), items);
    put(3 << 20, &bat[..bat.len().min(1 << 20)]);
    for (at, len) in [(64 << 10, 4096), (192 << 10, REGION_TABLE_LEN)] {
        let crc = {
            let bytes = &mut file[at..at + len];
            bytes[4..8].fill(0);
            crc32c::crc32c(bytes)
        };
        file[at + 4..at + 8].copy_from_slice(&crc.to_le_bytes());
    }
    file
}

impl Layout for Vhdx {
    fn size(&self) -> u64 {
        self.size
    }

    fn block_size(&self) -> u64 {
        self.block_size
    }

    fn place(&self, block: u64) -> Place {
        let index = usize::try_from(block + block / self.chunk).ok();
        let entry = index.and_then(|index| self.entries.get(index)).copied().unwrap_or_default();
        // PAYLOAD_BLOCK_FULLY_PRESENT, PAYLOAD_BLOCK_PARTIALLY_PRESENT; then what reads as zeroes (2.5.1.1).
        match entry & 7 {
            6 | 7 => Place::File(entry >> 20 << 20),
            2 => Place::Zero,
            _ => Place::Hole,
        }
    }

    fn kind(&self) -> &'static str {
        "VHDX"
    }
}
