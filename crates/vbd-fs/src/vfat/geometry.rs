//! How a FAT is laid out: boot sector, two tables, the root directory (FAT16), clusters.

use super::FIRST;

/// Bytes in an entry of a directory.
const ENTRY: u64 = 32;
/// Entries in the root directory of a FAT16.
const ROOT_ENTRIES: u64 = 512;
/// The sector of a FAT32 that holds its boot sector once more.
pub(super) const BACKUP: u64 = 6;
/// From so many bytes on FAT32 is taken.
const WIDE: u64 = 256 << 20;
/// Numbers of clusters: what has fewer than the first is FAT12, what has fewer than the second FAT16, by the
/// specification's own rule.
const SMALLEST_16: u64 = 4085;
const SMALLEST_32: u64 = 65_525;
const LARGEST_32: u64 = 0x0FFF_FFF5 - FIRST as u64;

/// The layout, in sectors unless said otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Bytes in a sector.
    pub(super) sector: u64,
    /// FAT32 rather than FAT16.
    pub(super) wide: bool,
    sectors: u64,
    per_cluster: u64,
    reserved: u64,
    per_table: u64,
    clusters: u64,
}

impl Geometry {
    /// The layout of a filesystem of `length` bytes; nothing where there is none.
    pub(super) fn of(length: u64, sector: u64) -> Option<Geometry> {
        let sectors = u64::from(u32::try_from(length / sector).ok()?);
        // Clusters of 4 KiB, unless these are too few or too many for the kind.
        let wide = [4096u64, 2048, 1024, 512, 8192, 16_384, 32_768].map(|cluster| (true, cluster));
        let narrow = [512u64, 1024, 2048, 4096, 8192, 16_384, 32_768].map(|cluster| (false, cluster));
        let fits = |(wide, cluster): (bool, u64)| {
            let per_cluster = (cluster >= sector).then_some(cluster / sector)?;
            let geometry = Geometry::with(sectors, sector, wide, per_cluster)?;
            let limits = if wide { SMALLEST_32..=LARGEST_32 } else { SMALLEST_16..=SMALLEST_32 - 1 };
            limits.contains(&geometry.clusters).then_some(geometry)
        };
        let wide = wide.into_iter().filter(|_| length >= WIDE);
        wide.chain(narrow).find_map(fits)
    }

    fn with(sectors: u64, sector: u64, wide: bool, per_cluster: u64) -> Option<Geometry> {
        let reserved = if wide { 32 } else { 1 };
        let root = if wide { 0 } else { (ROOT_ENTRIES * ENTRY).div_ceil(sector) };
        let rest = sectors.checked_sub(reserved + root)?;
        // Enough for all of the rest, so a little more than is needed.
        let width = if wide { 4 } else { 2 };
        let per_table = ((rest / per_cluster + u64::from(FIRST)) * width).div_ceil(sector);
        let clusters = rest.checked_sub(2 * per_table)? / per_cluster;
        Some(Geometry { sector, wide, sectors, per_cluster, reserved, per_table, clusters })
    }

    /// Bytes in a cluster.
    pub(super) fn cluster(&self) -> u64 {
        self.per_cluster * self.sector
    }

    /// The number after the last cluster's.
    pub(super) fn end(&self) -> u32 {
        u32::try_from(self.clusters).unwrap_or(0) + FIRST
    }

    /// Where a copy of the table begins, in bytes.
    pub(super) fn table(&self, copy: u64) -> u64 {
        (self.reserved + copy * self.per_table) * self.sector
    }

    /// Where the root directory of a FAT16 begins, in bytes.
    pub(super) fn root(&self) -> u64 {
        self.table(2)
    }

    /// Bytes of the root directory of a FAT16.
    pub(super) fn root_bytes(&self) -> u64 {
        ROOT_ENTRIES * ENTRY
    }

    /// Where the first cluster is, in bytes.
    pub(super) fn data(&self) -> u64 {
        let root = if self.wide { 0 } else { self.root_bytes().next_multiple_of(self.sector) };
        self.table(2) + root
    }

    /// The boot sector; `hidden` sectors of the disk come before it.
    pub(super) fn boot_sector(&self, hidden: u64, label: &[u8; 11], id: u32) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        let mut put =
            |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
        let two = |value: u64| u16::try_from(value).unwrap_or(0).to_le_bytes();
        let four = |value: u64| u32::try_from(value).unwrap_or(0).to_le_bytes();
        put(0, if self.wide { &[0xEB, 0x58, 0x90] } else { &[0xEB, 0x3C, 0x90] });
        put(3, b"VBD     ");
        put(11, &two(self.sector));
        put(13, &two(self.per_cluster)[..1]);
        put(14, &two(self.reserved));
        put(16, &[2]);
        put(17, &two(if self.wide { 0 } else { ROOT_ENTRIES }));
        // The number of sectors has two fields, of which the narrow one is for FAT16.
        let short = !self.wide && self.sectors <= 0xFFFF;
        put(19, &two(if short { self.sectors } else { 0 }));
        put(21, &[0xF8]);
        put(22, &two(if self.wide { 0 } else { self.per_table }));
        put(24, &two(63));
        put(26, &two(255));
        put(28, &four(hidden));
        put(32, &four(if short { 0 } else { self.sectors }));
        let extended = if self.wide {
            put(36, &four(self.per_table));
            put(44, &four(FIRST.into()));
            put(48, &two(1));
            put(50, &two(BACKUP));
            64
        } else {
            36
        };
        put(extended, &[0x80, 0, 0x29]);
        put(extended + 3, &id.to_le_bytes());
        put(extended + 7, label);
        put(extended + 18, if self.wide { b"FAT32   " } else { b"FAT16   " });
        put(510, &[0x55, 0xAA]);
        bytes
    }
}

/// The sector of a FAT32 that tells how many clusters are free, and the first of them.
pub(super) fn information(free: u32, next: u32) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[..4].copy_from_slice(b"RRaA");
    bytes[484..488].copy_from_slice(b"rrAa");
    bytes[488..492].copy_from_slice(&free.to_le_bytes());
    bytes[492..496].copy_from_slice(&next.to_le_bytes());
    bytes[510..].copy_from_slice(&[0x55, 0xAA]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_their_kind() {
        const MIB: u64 = 1 << 20;
        let kind = |size, sector| Geometry::of(size, sector).map(|g| (g.wide, g.cluster()));
        assert_eq!(kind(4 * MIB, 512), Some((false, 512)));
        assert_eq!(kind(64 * MIB, 512), Some((false, 1024)));
        assert_eq!(kind(255 * MIB, 512), Some((false, 4096)));
        assert_eq!(kind(256 * MIB, 512), Some((true, 2048)));
        assert_eq!(kind(1024 * MIB, 512), Some((true, 4096)));
        assert_eq!(kind(256 * MIB, 4096), Some((false, 4096)));
        assert_eq!(kind(512 * MIB, 4096), Some((true, 4096)));
        assert_eq!(kind(4 * MIB, 4096), None);
        assert_eq!(kind(MIB, 512), None);
        assert_eq!(kind(1 << 50, 512), None);
        assert_eq!(kind(0, 512), None);
    }
}
