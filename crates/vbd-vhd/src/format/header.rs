//! The header of dynamic and differencing disks ("Dynamic Disk Header Format").

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FormatError, LOCATORS, Locator, MOST_ENTRIES, SECTOR, checksum};

/// Bytes of a dynamic disk header.
pub const HEADER_LEN: usize = 1024;

const COOKIE: [u8; 8] = *b"cxsparse";
const CHECKSUM: std::ops::Range<usize> = 36..40;
const VERSION: u32 = 0x0001_0000;
/// Blocks are powers of two within these bounds: 4 KiB to 256 MiB. Two MiB is what nearly all have.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 4096..=256 << 20;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    cookie: [u8; 8],
    data_offset: U64,
    table_offset: U64,
    version: U32,
    max_table_entries: U32,
    block_size: U32,
    checksum: U32,
    parent_unique_id: [u8; 16],
    parent_time_stamp: U32,
    reserved: U32,
    parent_name: [U16; 256],
    locators: [RawLocator; LOCATORS],
    reserved2: [u8; 256],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawLocator {
    platform: [u8; 4],
    space: U32,
    length: U32,
    reserved: U32,
    offset: U64,
}

const _: () = assert!(size_of::<Raw>() == HEADER_LEN);

/// A header that was found good, or is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DynamicHeader {
    /// Where the table of blocks (BAT) is, in bytes.
    pub table_offset: u64,
    /// Its entries.
    pub entries: u32,
    /// Bytes of a block, without its bitmap: a power of two.
    pub block_size: u32,
    /// The unique id of the parent; zeroes where there is none.
    pub parent_unique_id: [u8; 16],
    /// When the parent was changed last: seconds after 2000-01-01 UTC.
    pub parent_time_stamp: u32,
    /// The parent's name.
    pub parent_name: String,
    /// Where names of the parent are kept, one for each platform.
    pub locators: [Locator; LOCATORS],
}

impl DynamicHeader {
    /// A header from its bytes.
    ///
    /// # Errors
    /// They are no header, it is damaged, or one of its values is out of bounds.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, FormatError> {
        let raw: Raw = zerocopy::transmute!(*bytes);
        if raw.cookie != COOKIE {
            let found = String::from_utf8_lossy(&raw.cookie).escape_debug().to_string();
            return Err(FormatError::value(
                "the dynamic disk header's cookie",
                found,
                "it has to be cxsparse",
            ));
        }
        let (found, wanted) = (raw.checksum.get(), checksum(bytes, CHECKSUM));
        if found != wanted {
            return Err(FormatError::HeaderChecksum { found, wanted });
        }
        if raw.version.get() >> 16 != VERSION >> 16 {
            let found = format!("{:#010x}", raw.version.get());
            return Err(FormatError::value("the header version", found, "only 1.x (0x0001xxxx) is known"));
        }
        let block_size = raw.block_size.get();
        if !BLOCK_SIZES.contains(&block_size) || !block_size.is_power_of_two() {
            return Err(FormatError::value(
                "the block size",
                block_size,
                "a power of two from 4096 to 268435456 is expected",
            ));
        }
        let entries = raw.max_table_entries.get();
        if entries > MOST_ENTRIES {
            return Err(FormatError::value("the number of table entries", entries, "16777216 are the most"));
        }
        let table_offset = raw.table_offset.get();
        if !table_offset.is_multiple_of(SECTOR) || table_offset > i64::MAX.cast_unsigned() / 2 {
            return Err(FormatError::value(
                "the table offset",
                table_offset,
                "a multiple of 512 within the file is expected",
            ));
        }
        let name: Vec<u16> =
            raw.parent_name.iter().map(|unit| unit.get()).take_while(|unit| *unit != 0).collect();
        let locators = raw.locators.map(|raw| Locator {
            platform: raw.platform,
            space: raw.space.get(),
            length: raw.length.get(),
            offset: raw.offset.get(),
        });
        Ok(DynamicHeader {
            table_offset,
            entries,
            block_size,
            parent_unique_id: raw.parent_unique_id,
            parent_time_stamp: raw.parent_time_stamp.get(),
            parent_name: String::from_utf16_lossy(&name),
            locators,
        })
    }

    /// Its bytes, with the checksum. A name of more than 256 UTF-16 units is cut.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut parent_name = [U16::ZERO; 256];
        for (to, from) in parent_name.iter_mut().zip(self.parent_name.encode_utf16()) {
            *to = from.into();
        }
        let mut raw = Raw {
            cookie: COOKIE,
            data_offset: u64::MAX.into(),
            table_offset: self.table_offset.into(),
            version: VERSION.into(),
            max_table_entries: self.entries.into(),
            block_size: self.block_size.into(),
            checksum: 0.into(),
            parent_unique_id: self.parent_unique_id,
            parent_time_stamp: self.parent_time_stamp.into(),
            reserved: 0.into(),
            parent_name,
            locators: self.locators.clone().map(|locator| RawLocator {
                platform: locator.platform,
                space: locator.space.into(),
                length: locator.length.into(),
                reserved: 0.into(),
                offset: locator.offset.into(),
            }),
            reserved2: [0; 256],
        };
        raw.checksum = checksum(raw.as_bytes(), CHECKSUM).into();
        zerocopy::transmute!(raw)
    }

    /// Bytes of the bitmap in front of each block: a bit for each sector, padded to whole sectors.
    pub fn bitmap_len(&self) -> u64 {
        (u64::from(self.block_size) / SECTOR / 8).next_multiple_of(SECTOR)
    }

    /// Bytes of the table, padded to whole sectors.
    pub fn table_len(&self) -> u64 {
        (u64::from(self.entries) * 4).next_multiple_of(SECTOR)
    }

    /// How many blocks a disk of this size has.
    pub fn blocks(&self, size: u64) -> u64 {
        size.div_ceil(u64::from(self.block_size))
    }
}
