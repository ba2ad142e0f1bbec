//! Little-endian numbers out of bytes.

use vbd_image::ReadAt;

use crate::FormatError;

/// Bytes of a structure, whose fields lie within it.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    fn number<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..at + N).and_then(|bytes| bytes.try_into().ok()).expect("a field of the structure")
    }

    pub(crate) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.number(at))
    }

    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.number(at))
    }

    pub(crate) fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.number(at))
    }

    pub(crate) fn guid(&self, at: usize) -> [u8; 16] {
        self.number(at)
    }
}

/// Reads `len` bytes of `what`. The caller has bounded the length.
pub(crate) fn exactly(
    source: &(impl ReadAt + ?Sized),
    offset: u64,
    len: usize,
    what: &'static str,
) -> Result<Vec<u8>, FormatError> {
    let mut bytes = vec![0; len];
    match source.fill_at(offset, &mut bytes)? {
        filled if filled == len => Ok(bytes),
        _ => Err(FormatError::Truncated(what)),
    }
}

/// A table of 32-bit numbers.
pub(crate) fn table(bytes: &[u8]) -> Box<[u32]> {
    bytes.chunks_exact(4).map(|entry| u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]])).collect()
}
