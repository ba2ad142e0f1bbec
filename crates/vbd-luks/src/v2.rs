//! LUKS2 ("LUKS2 On-Disk Format Specification"): a block of numbers and JSON, twice, then key material. Only read.

use std::collections::BTreeMap;

use base64::Engine as _;
use serde::Deserialize;
use vbd_image::ReadAt;

use crate::header::{MAGIC, Material, Unlocked, check_cipher, checked_key_len, exactly, is_key, text};
use crate::kdf::{ArgonCost, Hash, argon2, pbkdf2};
use crate::{LuksError, Secret};

const BINARY_LEN: usize = 4096;
const SECOND_MAGIC: &[u8; 6] = b"SKUL\xba\xbe";
const CHECKSUM: std::ops::Range<usize> = 448..512;
/// The sizes that a header may have, and so the places of the second one (chapter 2.1).
const SIZES: [u64; 9] =
    [0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000];

#[derive(Deserialize)]
struct Json {
    keyslots: BTreeMap<String, Keyslot>,
    segments: BTreeMap<String, Segment>,
    digests: BTreeMap<String, Digest>,
    config: Config,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    requirements: Option<Requirements>,
}

#[derive(Deserialize)]
struct Requirements {
    #[serde(default)]
    mandatory: Vec<String>,
}

#[derive(Deserialize)]
struct Keyslot {
    #[serde(rename = "type")]
    kind: String,
    key_size: u64,
    #[serde(default)]
    af: Option<Split>,
    area: Area,
    #[serde(default)]
    kdf: Option<Kdf>,
}

#[derive(Deserialize)]
struct Split {
    stripes: u32,
    hash: String,
}

#[derive(Deserialize)]
struct Area {
    #[serde(default)]
    encryption: String,
    #[serde(default)]
    key_size: u64,
    offset: String,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Kdf {
    Pbkdf2 { hash: String, iterations: u32, salt: String },
    Argon2i { time: u32, memory: u32, cpus: u32, salt: String },
    Argon2id { time: u32, memory: u32, cpus: u32, salt: String },
}

#[derive(Deserialize)]
struct Segment {
    #[serde(rename = "type")]
    kind: String,
    offset: String,
    size: String,
    #[serde(default)]
    iv_tweak: String,
    #[serde(default)]
    encryption: String,
    #[serde(default)]
    sector_size: u32,
    #[serde(default)]
    integrity: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Digest {
    #[serde(rename = "type")]
    kind: String,
    keyslots: Vec<String>,
    segments: Vec<String>,
    hash: String,
    iterations: u32,
    salt: String,
    digest: String,
}

pub(crate) struct Header {
    json: Json,
    segment: String,
    offset: u64,
    len: Option<u64>,
    first_number: u64,
    sector_size: u32,
}

impl Header {
    pub(crate) fn read(source: &(impl ReadAt + ?Sized)) -> Result<Self, LuksError> {
        let first = Self::read_at(source, 0, MAGIC);
        match first {
            Ok((_, header)) => Ok(header),
            // Damaged: the second one stands for it.
            Err(error) => Self::read_second(source).map_err(|_| error),
        }
    }

    /// The second header, where the first is lost.
    pub(crate) fn read_second(source: &(impl ReadAt + ?Sized)) -> Result<Self, LuksError> {
        let mut best: Option<(u64, Header)> = None;
        for size in SIZES {
            if let Ok((number, header)) = Self::read_at(source, size, SECOND_MAGIC)
                && best.as_ref().is_none_or(|(best, _)| number > *best)
            {
                best = Some((number, header));
            }
        }
        best.map(|(_, header)| header).ok_or(LuksError::NotLuks)
    }

    /// A header at this place, and its sequence number.
    fn read_at(source: &(impl ReadAt + ?Sized), at: u64, magic: &[u8; 6]) -> Result<(u64, Self), LuksError> {
        let binary: [u8; BINARY_LEN] = exactly(source, at)?.ok_or(LuksError::NotLuks)?;
        let number = |at: usize| u64::from_be_bytes(binary[at..at + 8].try_into().expect("eight bytes"));
        if !binary.starts_with(magic) || binary[6..8] != [0, 2] {
            return Err(LuksError::NotLuks);
        }
        let (size, sequence) = (number(8), number(16));
        if !SIZES.contains(&size) || number(256) != at {
            return Err(LuksError::Damaged("its size or place cannot be"));
        }
        let mut bytes = vec![0; usize::try_from(size).expect("4 MiB at most")];
        if source.fill_at(at, &mut bytes)? < bytes.len() {
            return Err(LuksError::Damaged("it is cut off"));
        }
        let hash = Hash::named(&text(&binary[72..104]))?;
        bytes[CHECKSUM].fill(0);
        if binary[CHECKSUM][..hash.len()] != hash.digest(&[&bytes])[..] {
            return Err(LuksError::Damaged("its checksum is wrong"));
        }
        let area = &bytes[BINARY_LEN..];
        let end = area.iter().position(|byte| *byte == 0).unwrap_or(area.len());
        let json = serde_json::from_slice(&area[..end])
            .map_err(|_| LuksError::Damaged("its JSON cannot be understood"))?;
        Ok((sequence, Self::checked(json)?))
    }

    fn checked(json: Json) -> Result<Self, LuksError> {
        if let Some(requirements) = &json.config.requirements
            && let Some(first) = requirements.mandatory.first()
        {
            return Err(LuksError::value(
                "a requirement",
                first,
                "none is known here: finish it with cryptsetup",
            ));
        }
        let mut segments = json.segments.iter();
        let (Some((name, segment)), None) = (segments.next(), segments.next()) else {
            return Err(LuksError::Unsupported(
                "it has not one segment of data: finish its re-encryption".into(),
            ));
        };
        if segment.kind != "crypt" || segment.integrity.is_some() {
            return Err(LuksError::value("the segment", &segment.kind, "crypt without integrity is known"));
        }
        check_cipher(&segment.encryption)?;
        let (offset, tweak) = (decimal(&segment.offset)?, decimal(&segment.iv_tweak)?);
        let sector_size = segment.sector_size;
        if !sector_size.is_power_of_two() || !(512..=4096).contains(&sector_size) {
            return Err(LuksError::value("the sector size", sector_size, "512 to 4096 are possible"));
        }
        let len = match segment.size.as_str() {
            "dynamic" => None,
            text => Some(decimal(text)?),
        };
        if !offset.is_multiple_of(512) || len.is_some_and(|len| !len.is_multiple_of(u64::from(sector_size))) {
            return Err(LuksError::Damaged("its segment is no multiple of a sector"));
        }
        let segment = name.clone();
        Ok(Header { json, segment, offset, len, first_number: tweak, sector_size })
    }

    pub(crate) fn unlock(
        &self,
        source: &(impl ReadAt + ?Sized),
        secret: &Secret,
    ) -> Result<Unlocked, LuksError> {
        let mut failed = None;
        for digest in self.json.digests.values() {
            if digest.kind != "pbkdf2" || !digest.segments.contains(&self.segment) {
                continue;
            }
            let slots = digest.keyslots.iter().filter_map(|name| self.json.keyslots.get(name));
            for slot in slots.filter(|slot| slot.kind == "luks2") {
                let tried = slot.open(source, secret).and_then(|key| {
                    let (salt, wanted) = (bytes(&digest.salt)?, bytes(&digest.digest)?);
                    let hash = Hash::named(&digest.hash)?;
                    let is_short = wanted.is_empty() || wanted.len() > 512;
                    let fits = !is_short && is_key(hash, &key, &salt, digest.iterations, &wanted)?;
                    Ok(fits.then_some(key))
                });
                match tried {
                    Ok(Some(key)) => {
                        return Unlocked::new(
                            key,
                            self.sector_size,
                            self.offset,
                            self.len,
                            self.first_number,
                        );
                    }
                    Ok(None) => {}
                    Err(error) => failed = Some(error),
                }
            }
        }
        Err(failed.unwrap_or(LuksError::WrongKey))
    }

    pub(crate) fn payload_offset(&self) -> u64 {
        self.offset
    }

    pub(crate) fn payload_len(&self) -> Option<u64> {
        self.len
    }

    pub(crate) fn sector_size(&self) -> u32 {
        self.sector_size
    }

    pub(crate) fn describe(&self) -> String {
        let key = self.json.keyslots.values().next().map_or(0, |slot| slot.key_size);
        format!("LUKS2, aes-xts-plain64, {} bits, sectors of {} bytes", key.min(64) * 8 / 2, self.sector_size)
    }
}

impl Keyslot {
    fn open(
        &self,
        source: &(impl ReadAt + ?Sized),
        secret: &Secret,
    ) -> Result<zeroize::Zeroizing<Vec<u8>>, LuksError> {
        let (Some(split), Some(kdf)) = (&self.af, &self.kdf) else {
            return Err(LuksError::Damaged("a key slot has no key derivation"));
        };
        check_cipher(&self.area.encryption)?;
        let key_len = checked_key_len(self.key_size)?;
        let derived_len = checked_key_len(self.area.key_size)?;
        let secret = secret.bytes();
        let derived = match kdf {
            Kdf::Pbkdf2 { hash, iterations, salt } => {
                pbkdf2(Hash::named(hash)?, secret, &bytes(salt)?, *iterations, derived_len)?
            }
            Kdf::Argon2i { time, memory, cpus, salt } | Kdf::Argon2id { time, memory, cpus, salt } => {
                let algorithm = match kdf {
                    Kdf::Argon2i { .. } => ::argon2::Algorithm::Argon2i,
                    _ => ::argon2::Algorithm::Argon2id,
                };
                let cost = ArgonCost { passes: *time, memory: *memory, lanes: *cpus };
                argon2(algorithm, secret, &bytes(salt)?, cost, derived_len)?
            }
        };
        let offset = decimal(&self.area.offset)?;
        let hash = Hash::named(&split.hash)?;
        Material { offset, key_len, stripes: split.stripes, hash }.open(source, &derived)
    }
}

/// A number that is written as text, since JSON's own end at 2^53.
fn decimal(text: &str) -> Result<u64, LuksError> {
    let number = text.parse().ok().filter(|number| *number <= i64::MAX.cast_unsigned());
    number.ok_or_else(|| LuksError::value("a number", text, "a decimal below 2^63 is expected"))
}

fn bytes(text: &str) -> Result<Vec<u8>, LuksError> {
    let decoded = base64::engine::general_purpose::STANDARD.decode(text);
    decoded.map_err(|_| LuksError::Damaged("a field is no base64"))
}
