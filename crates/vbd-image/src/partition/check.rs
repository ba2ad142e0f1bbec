//! Whether a table can be written.

use super::{BOOTABLE, Format, Kind, Table, gpt, mbr};
use crate::size::Human;

/// Why a table cannot be written to a disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Misfit {
    /// Sectors have 512 or 4096 bytes, those of an MBR 512.
    #[error("sectors of {0} bytes: a GPT has 512 or 4096, an MBR 512")]
    Sector(u64),
    /// The disk has no room for the table.
    #[error("a disk of {} is too small for a partition table", Human(*.0))]
    Small(u64),
    /// A number that this kind of table does not have, or that is there twice.
    #[error("partition {0}: numbers are from 1 to {1}, each once")]
    Number(u32, u32),
    /// Start or end is not at a sector.
    #[error("partition {0} does not begin and end at a sector")]
    Unaligned(u32),
    /// A partition outside of what partitions may use.
    #[error("partition {number} ends at {end}, and partitions may lie from {first} to {last}")]
    Outside {
        /// The partition's number.
        number: u32,
        /// Its end, in bytes.
        end: u64,
        /// The first byte that may be used.
        first: u64,
        /// The byte after the last one that may be used.
        last: u64,
    },
    /// Two partitions share bytes.
    #[error("partitions {0} and {1} overlap")]
    Overlap(u32, u32),
    /// Type or attributes are not of this kind of table.
    #[error("partition {0} has a type or attributes of another kind of table")]
    Kind(u32),
    /// A name of more than 36 UTF-16 units, or in an MBR.
    #[error("partition {0}: names are for GPT, with at most 36 characters")]
    Name(u32),
    /// Logical partitions are read, not written.
    #[error("partition {0} is extended or logical: such tables are only read")]
    Logical(u32),
}

impl Table {
    /// Whether this table can be written to a disk of `size` bytes: numbers, ranges, names.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn check(&self, size: u64) -> Result<(), Misfit> {
        let is_gpt = matches!(self.format, Format::Gpt(_));
        let sectors: &[u64] = if is_gpt { &[512, 4096] } else { &[512] };
        if !sectors.contains(&self.sector) {
            return Err(Misfit::Sector(self.sector));
        }
        let most = if is_gpt { gpt::MAX_NUMBER } else { 4 };
        let highest = self.partitions.iter().map(|partition| partition.number).max().unwrap_or(0);
        if !is_gpt
            && let Some(logical) = self.partitions.iter().find(|p| p.number > 4 || p.kind.is_extended())
        {
            return Err(Misfit::Logical(logical.number));
        }
        let bounds = if is_gpt {
            // A number beyond the most is refused below; it must not size anything here.
            gpt::usable(size, self.sector, highest.min(most))
        } else {
            // 32 bits count 2 TiB.
            let end = size.min(u64::from(u32::MAX) * mbr::SECTOR) / mbr::SECTOR * mbr::SECTOR;
            (end > mbr::SECTOR).then_some((mbr::SECTOR, end))
        };
        let (first, last) = bounds.ok_or(Misfit::Small(size))?;
        let mut seen: Vec<(u64, u64, u32)> = Vec::new();
        for partition in &self.partitions {
            let number = partition.number;
            if !(1..=most).contains(&number) || seen.iter().any(|(.., other)| *other == number) {
                return Err(Misfit::Number(number, most));
            }
            let end = partition.end();
            if partition.start < first || end > last {
                return Err(Misfit::Outside { number, end, first, last });
            }
            if partition.size == 0
                || !partition.start.is_multiple_of(self.sector)
                || !partition.size.is_multiple_of(self.sector)
            {
                return Err(Misfit::Unaligned(number));
            }
            let of_kind = match partition.kind {
                Kind::Gpt(kind) => is_gpt && !kind.is_nil() && partition.uuid.is_some(),
                Kind::Mbr(kind) => {
                    !is_gpt && kind != 0 && partition.attributes & !BOOTABLE == 0 && partition.uuid.is_none()
                }
            };
            if !of_kind {
                return Err(Misfit::Kind(number));
            }
            let longest = if is_gpt { 36 } else { 0 };
            if partition.name.encode_utf16().count() > longest || partition.name.contains('\0') {
                return Err(Misfit::Name(number));
            }
            if let Some((.., other)) = seen.iter().find(|(from, to, _)| partition.start < *to && *from < end)
            {
                return Err(Misfit::Overlap(*other, number));
            }
            seen.push((partition.start, end, number));
        }
        Ok(())
    }
}
