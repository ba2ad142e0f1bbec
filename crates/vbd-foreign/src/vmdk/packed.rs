//! Compressed grains ("Grain Marker"): a marker with the sector and the length, then a zlib stream.

use flate2::{Decompress, FlushDecompress, Status};

use crate::bytes::Fields;

/// Bytes of the marker in front of a compressed grain.
pub(crate) const MARKER_LEN: usize = 12;

/// Bytes of the compressed grain behind this marker, if it can be one: compression makes nothing much larger.
pub(crate) fn packed_len(marker: &[u8], grain: u64) -> Option<usize> {
    let len = Fields(marker.get(..MARKER_LEN)?).u32(8);
    (len > 0 && u64::from(len) <= grain + grain / 8 + 1024).then_some(len as usize)
}

/// The content of a grain of at most `grain` bytes, from its marker on. None where it is damaged.
pub fn unpack(bytes: &[u8], grain: usize) -> Option<Vec<u8>> {
    let len = packed_len(bytes, grain as u64)?;
    let packed = bytes.get(MARKER_LEN..MARKER_LEN + len)?;
    let mut content = vec![0; grain];
    let mut stream = Decompress::new(true);
    let status = stream.decompress(packed, &mut content, FlushDecompress::Finish).ok()?;
    if status != Status::StreamEnd {
        return None;
    }
    content.truncate(usize::try_from(stream.total_out()).ok()?);
    Some(content)
}
