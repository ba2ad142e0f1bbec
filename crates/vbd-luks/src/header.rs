//! A LUKS header of either version.

use subtle::ConstantTimeEq;
use vbd_image::ReadAt;
use zeroize::Zeroizing;

use crate::kdf::Hash;
use crate::{LuksError, Secret, SectorCipher, kdf, v1, v2};

pub(crate) const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
/// The most key material of one slot, in bytes: 512 bytes of key in 16384 stripes.
const MOST_MATERIAL: u64 = 8 << 20;

/// What stands in front of the encrypted data.
pub struct Header(Version);

enum Version {
    One(v1::Header),
    Two(v2::Header),
}

/// What a passphrase has unlocked.
pub struct Unlocked {
    /// Decrypts and encrypts the data, whose sectors are numbered from [`first_number`](Self::first_number) on.
    pub cipher: SectorCipher,
    /// Where the data begins, in bytes from the header's start.
    pub payload_offset: u64,
    /// The length of the data in bytes; none where it goes on to the end of the disk.
    pub payload_len: Option<u64>,
    /// The number of the data's first sector.
    pub first_number: u64,
    /// The key that everything is encrypted with.
    key: Zeroizing<Vec<u8>>,
}

impl Unlocked {
    pub(crate) fn new(
        key: Zeroizing<Vec<u8>>,
        sector_size: u32,
        payload_offset: u64,
        payload_len: Option<u64>,
        first_number: u64,
    ) -> Result<Self, LuksError> {
        let cipher = SectorCipher::new(&key, sector_size)?;
        Ok(Unlocked { cipher, payload_offset, payload_len, first_number, key })
    }

    /// The volume key, for a second header.
    pub fn key(&self) -> Secret {
        Secret::new(self.key.to_vec())
    }
}

impl Header {
    /// Reads a header from the start of `source`.
    ///
    /// # Errors
    /// It is none, or damaged, or uses what is not known here.
    pub fn read(source: &(impl ReadAt + ?Sized)) -> Result<Self, LuksError> {
        let start: [u8; 8] = exactly(source, 0)?.ok_or(LuksError::NotLuks)?;
        if !start.starts_with(MAGIC) {
            // The second header of LUKS2 is found by its own mark, where the first is lost.
            return v2::Header::read_second(source).map(|header| Header(Version::Two(header)));
        }
        Ok(Header(match u16::from_be_bytes([start[6], start[7]]) {
            1 => Version::One(v1::Header::read(source)?),
            2 => Version::Two(v2::Header::read(source)?),
            other => return Err(LuksError::value("the version", other, "1 and 2 are known")),
        }))
    }

    /// The header, where it is of version 1.
    pub(crate) fn one(&self) -> Result<&v1::Header, LuksError> {
        match &self.0 {
            Version::One(header) => Ok(header),
            Version::Two(_) => {
                let message =
                    "keys of LUKS2 are changed with cryptsetup: luksAddKey, luksRemoveKey, luksKillSlot";
                Err(LuksError::Unsupported(message.to_owned()))
            }
        }
    }

    /// Its version: 1 or 2.
    pub fn version(&self) -> u32 {
        match &self.0 {
            Version::One(_) => 1,
            Version::Two(_) => 2,
        }
    }

    /// Tries a passphrase on each key slot. Takes as long as the header says: a second or so for each.
    ///
    /// # Errors
    /// No slot takes it, or one is damaged and no other takes it.
    pub fn unlock(&self, source: &(impl ReadAt + ?Sized), secret: &Secret) -> Result<Unlocked, LuksError> {
        match &self.0 {
            Version::One(header) => header.unlock(source, secret),
            Version::Two(header) => header.unlock(source, secret),
        }
    }

    /// Where the data begins, in bytes from the header's start.
    pub fn payload_offset(&self) -> u64 {
        match &self.0 {
            Version::One(header) => header.payload_offset(),
            Version::Two(header) => header.payload_offset(),
        }
    }

    /// The length of the data in bytes; none where it goes on to the end of the disk.
    pub fn payload_len(&self) -> Option<u64> {
        match &self.0 {
            Version::One(_) => None,
            Version::Two(header) => header.payload_len(),
        }
    }

    /// Bytes of data on a disk of `below` bytes that the header stands in front of: whole sectors.
    pub fn data_len(&self, below: u64) -> u64 {
        let (rest, sector) = (below.saturating_sub(self.payload_offset()), u64::from(self.sector_size()));
        self.payload_len().map_or(rest, |len| len.min(rest)) / sector * sector
    }

    /// Bytes of a sector.
    pub fn sector_size(&self) -> u32 {
        match &self.0 {
            Version::One(_) => 512,
            Version::Two(header) => header.sector_size(),
        }
    }

    /// What it is, for people: "LUKS1, aes-xts-plain64, 256 bits".
    pub fn describe(&self) -> String {
        match &self.0 {
            Version::One(header) => header.describe(),
            Version::Two(header) => header.describe(),
        }
    }
}

/// A key that is split over the material of a slot.
pub(crate) struct Material {
    pub(crate) offset: u64,
    pub(crate) key_len: usize,
    pub(crate) stripes: u32,
    pub(crate) hash: Hash,
}

impl Material {
    /// Its bytes, in whole sectors.
    pub(crate) fn len(&self) -> u64 {
        (self.key_len as u64 * u64::from(self.stripes)).next_multiple_of(512)
    }

    /// Where it begins and ends.
    pub(crate) fn range(&self) -> (u64, u64) {
        (self.offset, self.offset.saturating_add(self.len()))
    }

    pub(crate) fn check(&self) -> Result<(), LuksError> {
        if self.stripes == 0 || self.len() > MOST_MATERIAL || !self.offset.is_multiple_of(512) {
            return Err(LuksError::Damaged("a key slot's material cannot be"));
        }
        Ok(())
    }

    /// Decrypts it with a key derived from a passphrase, and puts the split key together.
    pub(crate) fn open(
        &self,
        source: &(impl ReadAt + ?Sized),
        derived: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, LuksError> {
        self.check()?;
        let len = usize::try_from(self.len()).expect("bounded");
        let mut material = Zeroizing::new(vec![0; len]);
        if source.fill_at(self.offset, &mut material)? < len {
            return Err(LuksError::Damaged("a key slot's material is cut off"));
        }
        SectorCipher::new(derived, 512)?.decrypt(0, &mut material);
        let used = self.key_len * self.stripes as usize;
        Ok(crate::split::merge(self.hash, &material[..used], self.key_len))
    }
}

/// Whether a key has this digest.
pub(crate) fn is_key(
    hash: Hash,
    key: &[u8],
    salt: &[u8],
    iterations: u32,
    digest: &[u8],
) -> Result<bool, LuksError> {
    let found = kdf::pbkdf2(hash, key, salt, iterations, digest.len())?;
    Ok(found.ct_eq(digest).into())
}

/// A key's length, in bytes, that the cipher can have.
pub(crate) fn checked_key_len(len: u64) -> Result<usize, LuksError> {
    match len {
        32 | 64 => Ok(if len == 32 { 32 } else { 64 }),
        _ => Err(LuksError::value("the key's length", len, "32 or 64 bytes are known for AES-XTS")),
    }
}

/// Refuses ciphers that are not known here.
pub(crate) fn check_cipher(name: &str) -> Result<(), LuksError> {
    match name {
        "aes-xts-plain64" => Ok(()),
        other => Err(LuksError::value("the cipher", other, "aes-xts-plain64 is known")),
    }
}

pub(crate) fn exactly<const N: usize>(
    source: &(impl ReadAt + ?Sized),
    offset: u64,
) -> Result<Option<[u8; N]>, LuksError> {
    let mut bytes = [0; N];
    Ok((source.fill_at(offset, &mut bytes)? == N).then_some(bytes))
}

/// The text in a field, up to its first zero.
pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
