//! VDI, the format of VirtualBox: a header and a table of blocks. There is no specification but its makers' sources;
//! the fields here are those that all programs agree about.

use vbd_image::ReadAt;

use crate::bytes::{Fields, exactly, table};
use crate::layout::{Layout, Place};
use crate::{Format, FormatError};

const HEADER_LEN: usize = 512;
const SIGNATURE: u32 = 0xbeda_107f;
/// A block without a place, and one that is zero.
const FREE: u32 = u32::MAX;
const ZERO: u32 = u32::MAX - 1;
/// The most entries of a table (256 MiB of them).
const MOST_BLOCKS: u32 = 1 << 26;

/// The blocks of a VDI.
pub struct Vdi {
    size: u64,
    block_size: u64,
    data: u64,
    fixed: bool,
    blocks: Box<[u32]>,
}

impl Vdi {
    /// Reads an image of `len` bytes.
    ///
    /// # Errors
    /// See [`read`](crate::read).
    pub fn read(source: &(impl ReadAt + ?Sized), len: u64) -> Result<Self, FormatError> {
        let mut bytes = [0; HEADER_LEN];
        let filled = source.fill_at(0, &mut bytes)?;
        let header = Fields(&bytes);
        if filled < HEADER_LEN || header.u32(64) != SIGNATURE {
            return Err(FormatError::Not(Format::Vdi));
        }
        let version = header.u32(68);
        if version >> 16 != 1 {
            return Err(FormatError::value("the version", format!("{version:#010x}"), "1.x is known"));
        }
        let kind = header.u32(76);
        let is_linked = kind == 4 || kind == 3 || header.guid(440) != [0; 16];
        if is_linked {
            let message = "it is a differencing or undo image, which is not read here: merge it into its base with \
                           VirtualBox (`VBoxManage clonemedium`) first";
            return Err(FormatError::Unsupported(message.into()));
        }
        if kind != 1 && kind != 2 {
            return Err(FormatError::value("the image type", kind, "1 (dynamic) and 2 (fixed) are known"));
        }
        let (block_size, extra) = (header.u32(376), header.u32(380));
        if !block_size.is_power_of_two() || !(4096..=256 << 20).contains(&block_size) {
            return Err(FormatError::value(
                "the block size",
                block_size,
                "a power of two from 4096 to 268435456 is expected",
            ));
        }
        if extra != 0 {
            return Err(FormatError::value("the extra room of blocks", extra, "only 0 is known"));
        }
        let (count, disk) = (header.u32(384), header.u64(368));
        if count > MOST_BLOCKS {
            return Err(FormatError::value("the number of blocks", count, "67108864 are the most"));
        }
        let room = u64::from(count) * u64::from(block_size);
        if disk == 0 || disk > room {
            return Err(FormatError::value(
                "the disk's size",
                disk,
                "1 byte to what the table's blocks hold",
            ));
        }
        let (table_at, data) = (u64::from(header.u32(340)), u64::from(header.u32(344)));
        if table_at + u64::from(count) * 4 > len {
            return Err(FormatError::Truncated("the table of blocks"));
        }
        let bytes = exactly(source, table_at, count as usize * 4, "the table of blocks")?;
        Ok(Vdi {
            // Blocks hold whole sectors, so the last one may be counted whole.
            size: disk.next_multiple_of(512),
            block_size: u64::from(block_size),
            data,
            fixed: kind == 2,
            blocks: table(&bytes),
        })
    }
}

impl Layout for Vdi {
    fn size(&self) -> u64 {
        self.size
    }

    fn block_size(&self) -> u64 {
        self.block_size
    }

    fn place(&self, block: u64) -> Place {
        match usize::try_from(block).ok().and_then(|block| self.blocks.get(block)) {
            None | Some(&FREE) => Place::Hole,
            Some(&ZERO) => Place::Zero,
            Some(number) => Place::File(self.data + u64::from(*number) * self.block_size),
        }
    }

    fn kind(&self) -> &'static str {
        if self.fixed { "VDI, fixed" } else { "VDI, dynamic" }
    }
}
