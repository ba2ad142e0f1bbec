//! Checksums ("Checksums"): CRC-32C without the final inversion, begun with a seed of the filesystem (metadata_csum), and
//! the CRC-16 of group descriptors before that (uninit_bg).

use super::{Block, Ino};

/// Goes on with a checksum over more bytes.
pub fn crc32c(sum: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!sum, bytes)
}

/// CRC-16 (polynomial 0x8005, reflected), as group descriptors have it without metadata_csum.
pub fn crc16(mut sum: u16, bytes: &[u8]) -> u16 {
    for byte in bytes {
        sum ^= u16::from(*byte);
        for _ in 0..8 {
            sum = sum >> 1 ^ if sum & 1 != 0 { 0xA001 } else { 0 };
        }
    }
    sum
}

/// What the checksums of a filesystem begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Seed(pub u32);

impl Seed {
    /// The seed of a filesystem without metadata_csum_seed: of its UUID.
    pub fn of_uuid(uuid: &[u8; 16]) -> Seed {
        Seed(crc32c(!0, uuid))
    }

    /// The beginning for what belongs to an inode: its own checksum, its directory blocks, its extent blocks.
    pub fn of_inode(self, ino: Ino, generation: u32) -> u32 {
        crc32c(crc32c(self.0, &ino.to_le_bytes()), &generation.to_le_bytes())
    }

    /// The beginning for a block that names its own place: xattr blocks.
    pub fn of_block(self, block: Block) -> u32 {
        crc32c(self.0, &block.to_le_bytes())
    }

    /// The checksum of a bitmap; the group descriptor keeps both halves, or the lower one if it has 32 bytes.
    pub fn of_bitmap(self, bytes: &[u8]) -> u32 {
        crc32c(self.0, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_values() {
        // The catalogues of CRCs give these for "123456789"; CRC-32C with its final inversion taken off.
        assert_eq!(crc32c(!0, b"123456789"), !0xE306_9283);
        assert_eq!(crc16(0, b"123456789"), 0xBB3D);
        assert_eq!(crc32c(crc32c(!0, b"1234"), b"56789"), crc32c(!0, b"123456789"));
    }
}
