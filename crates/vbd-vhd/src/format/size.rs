//! How large a VHD is: by its size, or by its geometry.
//!
//! The two differ as a rule, since cylinders, heads and sectors cannot express every size. Virtual PC goes by the
//! geometry, and so did QEMU until it began to mark its images as `qem2`; everybody else goes by the size. QEMU takes
//! makers that it does not know for Virtual PC; here they are taken by their size, as the specification has it.

use super::{Footer, SECTOR};

/// The most that a VHD can hold: 2040 GiB, as Windows and QEMU have it. The specification's own limit (32-bit sector
/// numbers in the table) is not much above.
pub const MOST_BYTES: u64 = 0xff00_0000 * SECTOR;

/// The largest geometry: 65535 cylinders, 16 heads, 255 sectors. A disk that has it is at least so large.
const MOST_CHS: u64 = 65535 * 16 * 255;

/// Which of the two sizes counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SizeRule {
    /// As the program that made the image counts.
    #[default]
    Maker,
    /// The size.
    CurrentSize,
    /// The geometry.
    Geometry,
}

/// The geometry of a disk of so many sectors ("CHS Calculation").
pub fn chs(sectors: u64) -> (u16, u8, u8) {
    let total = sectors.min(MOST_CHS);
    let (mut per_track, mut heads, mut tracks);
    if total >= 65535 * 16 * 63 {
        (per_track, heads) = (255, 16);
        tracks = total / per_track;
    } else {
        per_track = 17;
        tracks = total / per_track;
        heads = tracks.div_ceil(1024).max(4);
        if tracks >= heads * 1024 || heads > 16 {
            (per_track, heads) = (31, 16);
            tracks = total / per_track;
        }
        if tracks >= heads * 1024 {
            (per_track, heads) = (63, 16);
            tracks = total / per_track;
        }
    }
    let small = |value: u64| u8::try_from(value).expect("at most 255");
    (u16::try_from(tracks / heads).expect("at most 65535"), small(heads), small(per_track))
}

/// Bytes of a disk with this geometry.
pub fn chs_bytes((cylinders, heads, sectors): (u16, u8, u8)) -> u64 {
    u64::from(cylinders) * u64::from(heads) * u64::from(sectors) * SECTOR
}

impl Footer {
    /// The size of the disk in bytes, by this rule: whole sectors.
    pub fn size(&self, rule: SizeRule) -> u64 {
        let by_geometry = match rule {
            SizeRule::Maker => matches!(&self.creator, b"vpc " | b"qemu"),
            SizeRule::CurrentSize => false,
            SizeRule::Geometry => true,
        };
        let geometry = chs_bytes(self.geometry);
        // The largest geometry says only that the disk is no smaller.
        let size = if by_geometry && geometry != MOST_CHS * SECTOR { geometry } else { self.current_size };
        size / SECTOR * SECTOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometries_follow_the_specification() {
        for (sectors, wanted) in [
            (20480, (301, 4, 17)),
            (65535 * 16 * 63, (16191, 16, 255)),
            (4_194_304, (4161, 16, 63)),
            (1_048_576, (1040, 16, 63)),
            (131_072, (963, 8, 17)),
            (u64::MAX, (65535, 16, 255)),
            (0, (0, 4, 17)),
        ] {
            assert_eq!(chs(sectors), wanted, "{sectors} sectors");
        }
    }
}
