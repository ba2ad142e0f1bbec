//! New headers, of version 1: what QEMU reads too, and what a qcow2 image embeds.

use std::io::Read;
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use crate::header::MAGIC;
use crate::kdf::{Hash, pbkdf2};
use crate::v1::{DISABLED, ENABLED, FIRST_SLOT, SECTOR, SLOT_LEN, SLOTS};
use crate::{LuksError, Secret, SectorCipher, split};

pub(crate) const STRIPES: u32 = 4000;
/// Key material begins at multiples of this.
const MATERIAL_ALIGNMENT: u64 = 4096;
/// And the data at multiples of this, so that it stays aligned for any storage.
const PAYLOAD_ALIGNMENT: u64 = 1 << 20;
/// The least iterations (LUKS1, chapter 4.1), for the digest too.
const LEAST_ITERATIONS: u32 = 1000;
/// What unlocking a slot is to take here.
const UNLOCK_TIME: Duration = Duration::from_secs(1);

/// The strength of the cipher.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyBits {
    /// AES-128: a key of 32 bytes.
    Bits128,
    /// AES-256: a key of 64 bytes.
    #[default]
    Bits256,
}

impl KeyBits {
    /// Bytes of the key: XTS has two.
    fn key_len(self) -> usize {
        match self {
            KeyBits::Bits128 => 32,
            KeyBits::Bits256 => 64,
        }
    }
}

/// How to make a header.
#[derive(Clone, Copy, Debug)]
pub struct FormatOptions {
    /// The strength of the cipher.
    pub key_bits: KeyBits,
    /// The hash for everything.
    pub hash: Hash,
    /// Iterations of PBKDF2; by default as many as take a second here.
    pub iterations: Option<u32>,
}

impl Default for FormatOptions {
    fn default() -> Self {
        FormatOptions { key_bits: KeyBits::Bits256, hash: Hash::Sha256, iterations: None }
    }
}

/// Bytes of a header that [`format()`] makes: where the data begins.
pub fn header_len(options: &FormatOptions) -> u64 {
    let room = material_len(options).next_multiple_of(MATERIAL_ALIGNMENT);
    (MATERIAL_ALIGNMENT + SLOTS as u64 * room).next_multiple_of(PAYLOAD_ALIGNMENT)
}

fn material_len(options: &FormatOptions) -> u64 {
    (options.key_bits.key_len() as u64 * u64::from(STRIPES)).next_multiple_of(SECTOR)
}

/// A header with a new key, which this passphrase unlocks: all bytes in front of the data. For a disk they come first;
/// for a qcow2 image they are what the header extension for encryption points at.
///
/// # Errors
/// There is no chance to be had, or the iterations are out of bounds.
pub fn format(secret: &Secret, options: &FormatOptions) -> Result<Vec<u8>, LuksError> {
    let key_len = options.key_bits.key_len();
    let hash = options.hash;
    let mut key = Zeroizing::new(vec![0; key_len]);
    let (mut salts, mut uuid) = ([[0; 32]; 2], [0; 16]);
    random(&mut key)?;
    salts.iter_mut().try_for_each(|salt| random(salt))?;
    random(&mut uuid)?;
    let iterations = match options.iterations {
        Some(iterations) => iterations.max(LEAST_ITERATIONS),
        None => measured(hash, key_len)?,
    };
    let digest_iterations = (iterations / 8).max(LEAST_ITERATIONS);

    let material_len = material_len(options);
    let room = material_len.next_multiple_of(MATERIAL_ALIGNMENT);
    let payload = header_len(options);
    let mut bytes = vec![0; usize::try_from(payload).expect("small")];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, MAGIC);
    put(6, &1u16.to_be_bytes());
    put(8, b"aes");
    put(40, b"xts-plain64");
    put(72, hash.to_string().as_bytes());
    put(104, &in_sectors(payload).to_be_bytes());
    put(108, &u32::try_from(key_len).expect("small").to_be_bytes());
    put(112, &pbkdf2(hash, &key, &salts[0], digest_iterations, 20)?);
    put(132, &salts[0]);
    put(164, &digest_iterations.to_be_bytes());
    put(168, uuid_text(uuid).as_bytes());
    for number in 0..SLOTS {
        let slot = FIRST_SLOT + number * SLOT_LEN;
        let is_first = number == 0;
        put(slot, &if is_first { ENABLED } else { DISABLED }.to_be_bytes());
        if is_first {
            put(slot + 4, &iterations.to_be_bytes());
            put(slot + 8, &salts[1]);
        }
        put(slot + 40, &in_sectors(MATERIAL_ALIGNMENT + number as u64 * room).to_be_bytes());
        put(slot + 44, &STRIPES.to_be_bytes());
    }
    let derived = pbkdf2(hash, secret.bytes(), &salts[1], iterations, key_len)?;
    let mut material = Zeroizing::new(vec![0; usize::try_from(material_len).expect("small")]);
    random(&mut material)?;
    let used = key_len * STRIPES as usize;
    split::split(hash, &key, &mut material[..used]);
    SectorCipher::new(&derived, 512)?.encrypt(0, &mut material);
    put(usize::try_from(MATERIAL_ALIGNMENT).expect("small"), &material);
    Ok(bytes)
}

fn in_sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR).expect("small")
}

pub(crate) fn random(bytes: &mut [u8]) -> Result<(), LuksError> {
    let from = "/dev/urandom";
    let failed = |error| LuksError::Key { from: from.into(), error };
    std::fs::File::open(from).map_err(failed)?.read_exact(bytes).map_err(failed)
}

/// How many iterations take the time that unlocking is to take.
pub(crate) fn measured(hash: Hash, key_len: usize) -> Result<u32, LuksError> {
    let mut tried = 10_000;
    loop {
        let start = Instant::now();
        pbkdf2(hash, b"as long as", &[7; 32], tried, key_len)?;
        let took = start.elapsed();
        if took >= Duration::from_millis(50) || tried >= 1 << 24 {
            let wanted = f64::from(tried) * UNLOCK_TIME.as_secs_f64() / took.as_secs_f64();
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounded")]
            return Ok(wanted.clamp(f64::from(LEAST_ITERATIONS), f64::from(1 << 26)) as u32);
        }
        tried *= 4;
    }
}

fn uuid_text(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}
