//! The bytes of a sidecar. All numbers are little-endian; `docs/bitmaps.md` describes them.

use std::sync::Arc;

use vbd_core::bitmap::{Bitmap, BitmapError};
use vbd_core::track::{LONGEST_NAME, MOST_BITMAPS, Named};

use super::Identity;

const MAGIC: &[u8; 8] = b"VBDBITS\0";
const VERSION: u32 = 1;
/// Where the one byte is that changes in place.
pub(super) const IN_USE: u64 = 12;
const CHECKSUM: usize = 80;
const HEADER: usize = 96;
/// What one byte of a bitmap's table stands for, in bytes of the bitmap.
const CHUNK: usize = 4096;
/// The most bytes of all bitmaps together, in memory.
const MOST_BYTES: u64 = 1 << 30;

const ENABLED: u8 = 1;

/// Why bytes are no sidecar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// It begins otherwise.
    #[error("is no file of bitmaps")]
    Magic,
    /// A later version wrote it.
    #[error("is of version {0}, and only version {VERSION} is known: a later vbd made it")]
    Version(u32),
    /// It was cut off, or changed.
    #[error("is damaged ({0})")]
    Damaged(&'static str),
    /// It describes what cannot be.
    #[error("names a bitmap that cannot be: {0}")]
    Bitmap(#[from] BitmapError),
    /// It describes too much.
    #[error("has bitmaps of more than {} MiB together", MOST_BYTES >> 20)]
    TooLarge,
}

/// What a sidecar says.
#[derive(Clone, Debug)]
pub struct Contents {
    /// Somebody may be writing to the image, or was when the host stopped: marks may be missing.
    pub in_use: bool,
    /// Of which image, in which state.
    pub identity: Identity,
    /// The bitmaps.
    pub bitmaps: Vec<Named>,
}

impl Contents {
    /// The bytes of the file. Where it is in use nobody will believe the marks, and all are written as set.
    pub fn encode(&self) -> Vec<u8> {
        let Identity { id, generation, size, inode, modified: (seconds, nanoseconds) } = self.identity;
        let mut out = Vec::with_capacity(HEADER);
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend([u8::from(self.in_use), 0, 0, 0]);
        out.extend(id);
        out.extend(generation.to_le_bytes());
        out.extend(size.to_le_bytes());
        out.extend(inode.to_le_bytes());
        out.extend(seconds.to_le_bytes());
        out.extend(nanoseconds.to_le_bytes());
        out.extend(u32::try_from(self.bitmaps.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.resize(HEADER, 0);
        for named in &self.bitmaps {
            encode_bitmap(named, self.in_use, &mut out);
        }
        let len = out.len() as u64;
        out[72..80].copy_from_slice(&len.to_le_bytes());
        let sum = checksum(&out);
        out[CHECKSUM..CHECKSUM + 4].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Reads the bytes of a file.
    ///
    /// # Errors
    /// See [`FormatError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.get(..8) != Some(MAGIC) {
            return Err(FormatError::Magic);
        }
        let mut reader = Reader(bytes.get(8..).unwrap_or_default());
        let version = reader.u32()?;
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        let in_use = reader.take(4)?[0] != 0;
        let id = reader.array()?;
        let (generation, size, inode) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let modified = (i64::from_le_bytes(reader.array()?), reader.u32()?);
        let count = reader.u32()?;
        if reader.u64()? != bytes.len() as u64 {
            return Err(FormatError::Damaged("it is not as long as it was"));
        }
        if reader.u32()? != checksum(bytes) {
            return Err(FormatError::Damaged("its checksum is wrong"));
        }
        reader.take(HEADER - CHECKSUM - 4)?;
        if count as usize > MOST_BITMAPS {
            return Err(FormatError::Damaged("too many bitmaps"));
        }
        let identity = Identity { id, generation, size, inode, modified };
        let (mut bitmaps, mut total) = (Vec::<Named>::new(), 0);
        for _ in 0..count {
            let named = parse_bitmap(&mut reader, size, &mut total)?;
            if bitmaps.iter().any(|other| other.name == named.name) {
                return Err(FormatError::Damaged("two bitmaps of one name"));
            }
            bitmaps.push(named);
        }
        if !reader.0.is_empty() {
            return Err(FormatError::Damaged("it goes on after the end"));
        }
        Ok(Contents { in_use, identity, bitmaps })
    }
}

fn encode_bitmap(named: &Named, all: bool, out: &mut Vec<u8>) {
    let name = named.name.as_bytes();
    out.extend(u16::try_from(name.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.push(if named.enabled { ENABLED } else { 0 });
    out.push(u8::try_from(named.bitmap.granularity().trailing_zeros()).unwrap_or(u8::MAX));
    out.extend(name);
    let bitmap = &named.bitmap;
    let chunks = usize::try_from(bitmap.byte_len().div_ceil(CHUNK as u64)).unwrap_or(usize::MAX);
    let kinds = out.len();
    out.resize(kinds + chunks, if all { 1 } else { 0 });
    if all {
        return;
    }
    let mut chunk = vec![0; CHUNK];
    for index in 0..chunks {
        bitmap.read_bytes((index * CHUNK) as u64, &mut chunk);
        if chunk.iter().all(|byte| *byte == 0xff) {
            out[kinds + index] = 1;
        } else if chunk.iter().any(|byte| *byte != 0) {
            out[kinds + index] = 2;
            out.extend(&chunk);
        }
    }
}

fn parse_bitmap(reader: &mut Reader, size: u64, total: &mut u64) -> Result<Named, FormatError> {
    let len = usize::from(u16::from_le_bytes(reader.array()?));
    let [flags, shift] = reader.array()?;
    let name = std::str::from_utf8(reader.take(len)?).map_err(|_| FormatError::Damaged("a name"))?;
    if name.is_empty() || len > LONGEST_NAME || name.contains(char::is_control) {
        return Err(FormatError::Damaged("a name"));
    }
    if flags & !ENABLED != 0 {
        return Err(FormatError::Damaged("unknown flags"));
    }
    let granularity = 1u64.checked_shl(shift.into()).unwrap_or(0);
    // Before there is memory for it.
    *total = total.saturating_add(size / granularity.max(1) / 8);
    if *total > MOST_BYTES {
        return Err(FormatError::TooLarge);
    }
    let bitmap = Bitmap::new(size, granularity)?;
    let chunks = usize::try_from(bitmap.byte_len().div_ceil(CHUNK as u64)).unwrap_or(usize::MAX);
    let kinds = reader.take(chunks)?;
    for (index, kind) in (0u64..).zip(kinds) {
        let first = index * CHUNK as u64;
        match kind {
            0 => {}
            1 => bitmap.load_bytes(first, &[0xff; CHUNK]),
            2 => bitmap.load_bytes(first, reader.take(CHUNK)?),
            _ => return Err(FormatError::Damaged("a kind of chunk")),
        }
    }
    let bitmap = Arc::new(bitmap);
    Ok(Named { name: name.to_owned(), enabled: flags & ENABLED != 0, persistent: true, bitmap })
}

/// Of everything but itself and what changes in place.
fn checksum(bytes: &[u8]) -> u32 {
    let at = usize::try_from(IN_USE).unwrap_or(0);
    let sum = crc32c::crc32c(bytes.get(..at).unwrap_or_default());
    let sum = crc32c::crc32c_append(sum, bytes.get(at + 4..CHECKSUM).unwrap_or_default());
    crc32c::crc32c_append(sum, bytes.get(CHECKSUM + 4..).unwrap_or_default())
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(FormatError::Damaged("it ends too soon"))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }
}

/// Reads a file of bitmaps that anybody may have written, and what was understood again. For fuzzing.
///
/// # Panics
/// What was read and written anew is something else.
pub fn fuzz(bytes: &[u8]) {
    // The checksum would keep a fuzzer out.
    let mut bytes = bytes.to_vec();
    if bytes.len() >= HEADER {
        let len = (bytes.len() as u64).to_le_bytes();
        bytes[72..80].copy_from_slice(&len);
        let sum = checksum(&bytes).to_le_bytes();
        bytes[CHECKSUM..CHECKSUM + 4].copy_from_slice(&sum);
    }
    let Ok(contents) = Contents::parse(&bytes) else { return };
    let again = Contents::parse(&contents.encode()).expect("what was written can be read");
    assert_eq!(again.identity, contents.identity);
    assert_eq!(again.bitmaps.len(), contents.bitmaps.len());
    for (new, old) in again.bitmaps.iter().zip(&contents.bitmaps) {
        assert_eq!((&new.name, new.enabled), (&old.name, old.enabled));
        assert!(contents.in_use || new.bitmap.count() == old.bitmap.count());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn contents(size: u64, marks: &[(u64, u64)], granularity: u64) -> Contents {
        let bitmap = Bitmap::new(size, granularity).expect("fine");
        marks.iter().for_each(|(offset, len)| bitmap.mark(*offset, *len));
        let full = Bitmap::new(size, 512).expect("fine");
        full.mark_all();
        let named = |name: &str, enabled, bitmap| Named {
            name: name.to_owned(),
            enabled,
            persistent: true,
            bitmap: Arc::new(bitmap),
        };
        let identity = Identity { id: [7; 16], generation: 3, size, inode: 12, modified: (-5, 999_999_999) };
        let bitmaps = vec![named("ä 1", true, bitmap), named("full", false, full)];
        Contents { in_use: false, identity, bitmaps }
    }

    #[test]
    fn every_byte_that_is_wrong_or_missing_is_noticed() {
        let bytes = contents(100 << 20, &[(5 << 20, 70_000), (40 << 20, 20 << 20)], 512).encode();
        assert!(Contents::parse(&bytes).is_ok());
        for at in (0..bytes.len()).filter(|at| !(12..16).contains(at)).step_by(7).chain(0..12).chain(16..200)
        {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1;
            assert!(Contents::parse(&wrong).is_err(), "byte {at}");
            assert!(Contents::parse(&bytes[..at]).is_err(), "cut at {at}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(Contents::parse(&longer).is_err());
    }

    #[test]
    fn the_memory_is_bounded() {
        let mut bytes = contents(1 << 20, &[], 512).encode();
        // A size that its bitmaps could not have.
        bytes[40..48].copy_from_slice(&(1u64 << 45).to_le_bytes());
        let sum = checksum(&bytes);
        bytes[CHECKSUM..CHECKSUM + 4].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Contents::parse(&bytes).err(), Some(FormatError::TooLarge));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            size in 1u64..1 << 32,
            shift in 12u32..20,
            marks in prop::collection::vec((0u64..1 << 32, 0u64..1 << 28), 0..10),
        ) {
            let mut before = contents(size.min(1 << 24), &[], 512);
            let bitmap = Bitmap::new(before.identity.size, 1 << shift).expect("fine");
            marks.iter().for_each(|(offset, len)| bitmap.mark(*offset, *len));
            before.bitmaps[0].bitmap = Arc::new(bitmap);
            let after = Contents::parse(&before.encode()).expect("read");
            prop_assert_eq!(&after.identity, &before.identity);
            for (after, before) in after.bitmaps.iter().zip(&before.bitmaps) {
                prop_assert_eq!((&after.name, after.enabled), (&before.name, before.enabled));
                let runs = |named: &Named| named.bitmap.runs(0..u64::MAX).collect::<Vec<_>>();
                prop_assert_eq!(runs(after), runs(before));
            }
            before.in_use = true;
            let after = Contents::parse(&before.encode()).expect("read");
            prop_assert!(after.in_use);
            prop_assert!(after.bitmaps.iter().all(|named| named.bitmap.count() == named.bitmap.bits()));
        }

        #[test]
        fn no_bytes_break_it(bytes in prop::collection::vec(any::<u8>(), 0..300), change in 0usize..300, to: u8) {
            fuzz(&bytes);
            let mut almost = contents(1 << 20, &[(0, 512), (70_000, 512)], 512).encode();
            if let Some(byte) = almost.get_mut(change) {
                *byte = to;
            }
            fuzz(&almost);
        }
    }
}
