//! What the fuzz target calls.

use super::{
    BitmapFlags, Error, Header, encode_bitmaps, encode_snapshots, parse_bitmaps, parse_snapshots,
    read_bitmap_table, read_bitmaps, read_snapshots,
};

/// Reads the header, the snapshot table and the bitmaps of an image whose bytes these are, writes them anew, and reads
/// that: it must end without a panic, and what is written reads as it was.
///
/// # Panics
///
/// When it does not.
pub fn structures(bytes: &[u8]) {
    let Ok(header) = Header::read(bytes) else { return };
    let _ = header.refuse_unknown();
    match header.encode() {
        Ok(written) => assert_eq!(Header::parse(&written).expect("it was written"), header),
        // The name of the backing file can lie in a gap that the extensions leave.
        Err(Error::NoRoom { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    if let Ok((snapshots, _)) = read_snapshots(&header, bytes) {
        let written = encode_snapshots(&header, &snapshots);
        let (again, length) = parse_snapshots(&header, &written).expect("it was written");
        assert_eq!((length, again.len()), (written.len(), snapshots.len()));
        for (again, before) in again.iter().zip(&snapshots) {
            assert_eq!((&again.id, &again.name), (&before.id, &before.name));
            assert_eq!(again.vm_state_size, before.vm_state_size);
            // Those of old images get a size that they did not have.
            assert_eq!(again.disk_size, Some(before.disk_size.unwrap_or(header.size)));
            let _ = again.validate(&header);
        }
    }
    if let Ok(bitmaps) = read_bitmaps(&header, bytes)
        && let Some(mut extension) = header.bitmaps()
    {
        let written = encode_bitmaps(&bitmaps);
        extension.directory_size = written.len() as u64;
        assert_eq!(parse_bitmaps(&extension, &written).expect("it was written"), bitmaps);
        for bitmap in &bitmaps {
            assert_eq!(bitmap.flags, BitmapFlags { reserved: 0, ..bitmap.flags });
            let _ = read_bitmap_table(&header.layout(), bitmap, bytes);
        }
        // Larger ones only take longer.
        if bitmaps.iter().all(|bitmap| bitmap.bits(header.size) < 1 << 20) {
            let _ = crate::bitmaps::list(bytes);
        }
    }
}
