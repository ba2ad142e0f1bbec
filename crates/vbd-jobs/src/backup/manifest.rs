//! What a backup consists of: one file for each, `docs/backup.md` describes it. Little-endian numbers.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 8] = b"VBDBACK\0";
const VERSION: u32 = 1;
/// Bytes before the description.
const HEADER: usize = 32;
/// The length of a checksum.
const SUM: usize = 32;
/// The longest description in bytes.
const LONGEST_TEXT: u32 = 64 << 10;
/// The most chunks of a disk.
const MOST_CHUNKS: u64 = 1 << 26;
/// The smallest and the largest chunk in bytes.
pub(super) const CHUNKS: std::ops::RangeInclusive<u32> = 64 << 10..=16 << 20;

/// The name of a chunk: the BLAKE3 hash of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// Stands for a chunk of zeroes, which is not stored.
    pub const ZEROES: Hash = Hash([0; 32]);
    /// Stands for a part of a disk that an image of a chain leaves to the one before.
    pub const ELSEWHERE: Hash = Hash([0xff; 32]);

    /// That of these bytes.
    pub fn of(bytes: &[u8]) -> Hash {
        Hash(*blake3::hash(bytes).as_bytes())
    }

    /// In hexadecimal digits.
    pub fn hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    /// Read from such.
    pub fn from_hex(text: &str) -> Option<Hash> {
        blake3::Hash::from_hex(text).ok().map(|hash| Hash(*hash.as_bytes()))
    }
}

/// What people and programs want to know of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The disk it is of.
    pub disk: String,
    /// Its own name, one among those of the disk.
    pub name: String,
    /// The instant, in milliseconds since 1970.
    pub milliseconds: u64,
    /// The backup that it was made after; none where everything was read.
    pub parent: Option<String>,
    /// The bitmap that began at the instant, for the next one.
    pub bitmap: Option<String>,
    /// Bytes that were read of the disk.
    pub read: u64,
    /// Bytes that were new to the store, compressed.
    pub stored: u64,
    /// The image that holds it, where it is not in chunks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<StoredImage>,
}

/// An image of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredImage {
    /// Its name, beside the manifest.
    pub file: String,
    /// Its format.
    pub format: String,
}

impl About {
    /// The instant.
    pub fn time(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.milliseconds)
    }
}

/// A whole backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The disk's size in bytes.
    pub size: u64,
    /// Bytes of each chunk but the last.
    pub chunk: u32,
    /// What is told of it.
    pub about: About,
    /// Its chunks, in order.
    pub chunks: Vec<Hash>,
}

/// Why bytes are no manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// They begin otherwise.
    #[error("is no backup's manifest")]
    Magic,
    /// A later version wrote it.
    #[error("is of version {0}, and only version {VERSION} is known: a later vbd made it")]
    Version(u32),
    /// It is not what was written.
    #[error("is damaged ({0})")]
    Damaged(&'static str),
    /// It says what cannot be.
    #[error("says what cannot be ({0})")]
    Bad(&'static str),
}

/// How many chunks a disk of this size has.
pub(super) fn count(size: u64, chunk: u32) -> Result<usize, ManifestError> {
    if !chunk.is_power_of_two() || !CHUNKS.contains(&chunk) {
        return Err(ManifestError::Bad("the size of its chunks"));
    }
    let count = size.div_ceil(chunk.into());
    let count = if count > MOST_CHUNKS { None } else { usize::try_from(count).ok() };
    count.ok_or(ManifestError::Bad("more chunks than there may be: larger ones are needed"))
}

impl Manifest {
    /// The bytes of one chunk.
    pub fn len(&self, index: usize) -> usize {
        let chunk = u64::from(self.chunk);
        let left = self.size.saturating_sub(index as u64 * chunk);
        usize::try_from(left.min(chunk)).unwrap_or(0)
    }

    /// The bytes of the file.
    ///
    /// # Errors
    /// Compression fails, or the description is too long.
    pub fn encode(&self) -> std::io::Result<Vec<u8>> {
        let about = serde_json::to_vec(&self.about)?;
        let len = u32::try_from(about.len()).ok().filter(|len| *len <= LONGEST_TEXT);
        let len = len.ok_or_else(|| std::io::Error::other("the backup's description is too long"))?;
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend(self.chunk.to_le_bytes());
        out.extend(self.size.to_le_bytes());
        out.extend(len.to_le_bytes());
        out.extend([0; 4]);
        out.extend(about);
        // Hashes do not compress, but zeroes do, and disks are empty for the most part.
        let hashes: Vec<u8> = self.chunks.iter().flat_map(|hash| hash.0).collect();
        out.extend(zstd::bulk::compress(&hashes, 1)?);
        let sum = Hash::of(&out);
        out.extend(sum.0);
        Ok(out)
    }

    /// What the bytes of a file say of the backup, without its chunks.
    ///
    /// # Errors
    /// See [`ManifestError`].
    pub fn about(bytes: &[u8]) -> Result<(u64, About), ManifestError> {
        parts(bytes).map(|(size, _, about, _)| (size, about))
    }

    /// Reads the bytes of a file.
    ///
    /// # Errors
    /// See [`ManifestError`].
    pub fn parse(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let (size, chunk, about, packed) = parts(bytes)?;
        let expected = count(size, chunk)?;
        // As much memory as the size wants, which the length of a file must not decide: a frame says its own size.
        let told = zstd::zstd_safe::get_frame_content_size(packed).ok().flatten();
        if told != Some(expected as u64 * 32) {
            return Err(ManifestError::Damaged("the number of its chunks"));
        }
        let hashes = zstd::bulk::decompress(packed, expected * 32);
        let hashes = hashes.map_err(|_| ManifestError::Damaged("the list of its chunks"))?;
        if hashes.len() != expected * 32 {
            return Err(ManifestError::Damaged("the number of its chunks"));
        }
        let (hashes, _) = hashes.as_chunks::<32>();
        Ok(Manifest { size, chunk, about, chunks: hashes.iter().copied().map(Hash).collect() })
    }
}

type Parts<'a> = (u64, u32, About, &'a [u8]);

fn parts(bytes: &[u8]) -> Result<Parts<'_>, ManifestError> {
    let cut = ManifestError::Damaged("it ends too soon");
    if bytes.get(..8) != Some(MAGIC) {
        return Err(ManifestError::Magic);
    }
    let (body, sum) = bytes.len().checked_sub(SUM).map(|at| bytes.split_at(at)).ok_or(cut.clone())?;
    if body.len() < HEADER {
        return Err(cut);
    }
    let u32_at = |at: usize| u32::from_le_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]);
    if u32_at(8) != VERSION {
        return Err(ManifestError::Version(u32_at(8)));
    }
    if Hash::of(body).0 != sum {
        return Err(ManifestError::Damaged("its checksum is wrong"));
    }
    let (chunk, len) = (u32_at(12), u32_at(24));
    let size = u64::from(u32_at(16)) | u64::from(u32_at(20)) << 32;
    if len > LONGEST_TEXT {
        return Err(ManifestError::Bad("a long description"));
    }
    let (about, packed) = body[HEADER - 4..].split_at_checked(4 + len as usize).ok_or(cut)?;
    let about = serde_json::from_slice(&about[4..]);
    let about = about.map_err(|_| ManifestError::Damaged("its description"))?;
    Ok((size, chunk, about, packed))
}

/// Reads a manifest that anybody may have written. For fuzzing.
///
/// # Panics
/// What was read and written anew is something else.
pub fn fuzz(bytes: &[u8]) {
    let _ = Manifest::parse(bytes);
    // The checksum would keep a fuzzer out.
    let mut bytes = bytes.to_vec();
    bytes.extend(Hash::of(&bytes).0);
    let Ok(manifest) = Manifest::parse(&bytes) else { return };
    let again = Manifest::parse(&manifest.encode().expect("written")).expect("read again");
    assert_eq!(again, manifest);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let about = About {
            disk: "disk".into(),
            name: "one".into(),
            milliseconds: 1_700_000_000_123,
            parent: None,
            bitmap: Some("b".into()),
            read: 5,
            stored: 6,
            image: None,
        };
        let chunks = (0..20u8).map(|n| if n % 3 == 0 { Hash::ZEROES } else { Hash::of(&[n]) });
        Manifest { size: (20 << 16) - 512, chunk: 1 << 16, about, chunks: chunks.collect() }
    }

    #[test]
    fn what_is_written_is_read_and_every_wrong_byte_noticed() {
        let manifest = manifest();
        let bytes = manifest.encode().unwrap();
        assert_eq!(Manifest::parse(&bytes).unwrap(), manifest);
        assert_eq!((manifest.len(0), manifest.len(19)), (65536, 65024));
        for at in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 4;
            assert!(Manifest::parse(&wrong).is_err(), "byte {at}");
            assert!(Manifest::parse(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_size_that_its_chunks_do_not_have_allocates_nothing() {
        let mut manifest = manifest();
        for (size, chunk) in [(1 << 40, 1 << 16), (u64::MAX, 1 << 16), (1, 1 << 16), (20 << 16, 3)] {
            (manifest.size, manifest.chunk) = (size, chunk);
            assert!(Manifest::parse(&manifest.encode().unwrap()).is_err(), "{size} {chunk}");
        }
    }

    #[test]
    fn no_bytes_break_it() {
        let bytes = manifest().encode().unwrap();
        let body = &bytes[..bytes.len() - 32];
        for at in 0..body.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut wrong = body.to_vec();
                wrong[at] = value;
                fuzz(&wrong);
            }
            fuzz(&body[..at]);
        }
    }
}
