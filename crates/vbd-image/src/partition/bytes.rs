//! Little-endian fields in a buffer, and the checksum of a GPT.

/// The `N` bytes at `offset`.
///
/// # Panics
///
/// When the buffer is shorter: for buffers of a size that is known.
pub(super) fn array<const N: usize>(buffer: &[u8], offset: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&buffer[offset..offset + N]);
    bytes
}

pub(super) fn u32_at(buffer: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(array(buffer, offset))
}

pub(super) fn u64_at(buffer: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(array(buffer, offset))
}

pub(super) fn put(buffer: &mut [u8], offset: usize, bytes: &[u8]) {
    buffer[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// CRC-32 of ISO 3309, reflected. At most a MiB is ever checked, and mostly 16 KiB: a bit at a time is enough.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_check_value_of_the_crc() {
        assert_eq!(super::crc32(b"123456789"), 0xCBF4_3926);
    }
}
