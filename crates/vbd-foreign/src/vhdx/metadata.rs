//! What the metadata region says of the disk (2.6).

use vbd_image::ReadAt;

use super::guid;
use crate::FormatError;
use crate::bytes::{Fields, exactly};

const TABLE_LEN: usize = 64 << 10;
const MOST_ITEMS: u16 = 2047;
/// The largest disk: 64 TiB.
const MOST_BYTES: u64 = 64 << 40;

const FILE_PARAMETERS: [u8; 16] = guid(0xcaa1_6737, 0xfa36, 0x4d43, 0xb3b6_33f0_aa44_e76b);
const DISK_SIZE: [u8; 16] = guid(0x2fa5_4224, 0xcd1b, 0x4876, 0xb211_5dbe_d83b_f4b8);
const LOGICAL_SECTOR: [u8; 16] = guid(0x8141_bf1d, 0xa96f, 0x4709, 0xba47_f233_a8fa_ab5f);
const PHYSICAL_SECTOR: [u8; 16] = guid(0xcda3_48c7, 0x445d, 0x4471, 0x9cc9_e988_5251_c556);
const DISK_ID: [u8; 16] = guid(0xbeca_12ab, 0xb2e6, 0x4523, 0x93ef_c309_e000_c746);
const PARENT: [u8; 16] = guid(0xa8d3_5f2d, 0xb30b, 0x454d, 0xabf7_d3d8_4834_ab0c);

pub(super) struct Metadata {
    pub(super) size: u64,
    pub(super) block_size: u64,
    pub(super) sector_size: u64,
}

impl Metadata {
    /// Reads the items of a region, which lies within the file.
    pub(super) fn read(source: &(impl ReadAt + ?Sized), at: u64, len: u64) -> Result<Self, FormatError> {
        let bytes = exactly(source, at, TABLE_LEN, "the metadata")?;
        if !bytes.starts_with(b"metadata") {
            return Err(FormatError::value("the mark of the metadata", "missing", "metadata is expected"));
        }
        let count = Fields(&bytes).u16(10);
        if count > MOST_ITEMS {
            return Err(FormatError::value("the number of metadata items", count, "2047 are the most"));
        }
        let items: Vec<Fields<'_>> =
            bytes[32..].chunks_exact(32).take(usize::from(count)).map(Fields).collect();
        for item in &items {
            let known = [FILE_PARAMETERS, DISK_SIZE, LOGICAL_SECTOR, PHYSICAL_SECTOR, DISK_ID, PARENT];
            if item.u32(24) & 4 != 0 && !known.contains(&item.guid(0)) {
                return Err(FormatError::Unsupported(
                    "it has required metadata that is not known here".into(),
                ));
            }
        }
        let item = |name: [u8; 16], bytes: usize, what| {
            let found = items.iter().find(|item| item.guid(0) == name);
            let item = found.ok_or_else(|| FormatError::value(what, "missing", "there has to be one"))?;
            let (offset, item_len) = (u64::from(item.u32(16)), u64::from(item.u32(20)));
            if item_len < bytes as u64 || offset < TABLE_LEN as u64 || offset + item_len > len {
                return Err(FormatError::value(what, offset, "it has to be within the metadata"));
            }
            exactly(source, at + offset, bytes, "the metadata")
        };
        let parameters = item(FILE_PARAMETERS, 8, "the item of file parameters")?;
        let parameters = Fields(&parameters);
        let (block_size, flags) = (parameters.u32(0), parameters.u32(4));
        if flags & 2 != 0 {
            let message = "it is a differencing image, which is not read here: merge it into its parent with Hyper-V first";
            return Err(FormatError::Unsupported(message.into()));
        }
        if !block_size.is_power_of_two() || !(1 << 20..=256 << 20).contains(&block_size) {
            return Err(FormatError::value(
                "the block size",
                block_size,
                "a power of two from 1 MiB to 256 MiB is expected",
            ));
        }
        let sector_size = Fields(&item(LOGICAL_SECTOR, 4, "the item of the sector size")?).u32(0);
        if sector_size != 512 && sector_size != 4096 {
            return Err(FormatError::value("the sector size", sector_size, "512 and 4096 are possible"));
        }
        let size = Fields(&item(DISK_SIZE, 8, "the item of the disk's size")?).u64(0);
        if size == 0 || size > MOST_BYTES || !size.is_multiple_of(u64::from(sector_size)) {
            return Err(FormatError::value(
                "the disk's size",
                size,
                "whole sectors, up to 64 TiB, are possible",
            ));
        }
        Ok(Metadata { size, block_size: u64::from(block_size), sector_size: u64::from(sector_size) })
    }
}
