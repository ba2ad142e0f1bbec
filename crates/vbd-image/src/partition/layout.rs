//! Where partitions go on a new disk.

use super::{Format, Guid, Kind, Misfit, Partition, Table, gpt, mbr};

/// Partitions begin at multiples of this many bytes: whole blocks of every storage there is.
pub const ALIGNMENT: u64 = 1 << 20;

/// A partition that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Its size in bytes, rounded up to whole [`ALIGNMENT`]s; what is left where not given, for one partition.
    pub size: Option<u64>,
    /// What it is for.
    pub kind: Kind,
    /// Its GUID, in a GPT.
    pub uuid: Option<Guid>,
    /// Its name, in a GPT.
    pub name: String,
    /// Attribute bits.
    pub attributes: u64,
}

/// What a new disk's table is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Kind and name.
    pub format: Format,
    /// Bytes in a sector.
    pub sector: u64,
}

impl Layout {
    /// Places partitions one after the other on a disk of `size` bytes, numbered in the order of the wishes.
    ///
    /// # Errors
    ///
    /// [`Misfit::Outside`] or [`Misfit::Small`] where the room does not suffice; whatever else [`Table::check`] finds.
    pub fn place(&self, size: u64, wishes: &[Wish]) -> Result<Table, Misfit> {
        let mut table = Table::new(self.format, self.sector);
        let last = match self.format {
            Format::Gpt(_) => gpt::usable(size, self.sector, 0).ok_or(Misfit::Small(size))?.1,
            Format::Mbr(_) => size.min(u64::from(u32::MAX) * mbr::SECTOR),
        };
        // What follows the partition that takes the rest has fixed sizes.
        let fixed = |wish: &Wish| wish.size.map_or(0, rounded);
        let mut start = ALIGNMENT;
        for (index, wish) in wishes.iter().enumerate() {
            let after = wishes[index + 1..].iter().map(fixed).fold(0, u64::saturating_add);
            let room = last.saturating_sub(start).saturating_sub(after) / ALIGNMENT * ALIGNMENT;
            let size = wish.size.map_or(room, rounded);
            let number = u32::try_from(index).unwrap_or(u32::MAX).saturating_add(1);
            if size == 0 || start.checked_add(size).is_none_or(|end| end > last) {
                let end = start.saturating_add(size);
                return Err(Misfit::Outside { number, end, first: ALIGNMENT, last });
            }
            table.partitions.push(Partition {
                number,
                start,
                size,
                kind: wish.kind,
                uuid: wish.uuid,
                name: wish.name.clone(),
                attributes: wish.attributes,
            });
            start += size;
        }
        table.check(size)?;
        Ok(table)
    }

    /// The bytes that a disk needs besides its partitions' own, each of whole [`ALIGNMENT`]s.
    pub fn overhead(&self) -> u64 {
        match self.format {
            Format::Gpt(_) => 2 * ALIGNMENT,
            Format::Mbr(_) => ALIGNMENT,
        }
    }
}

fn rounded(size: u64) -> u64 {
    size.checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX)
}
