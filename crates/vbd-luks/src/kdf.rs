//! From a passphrase to a key, with hashes and functions that a header names.

use std::fmt;

use hmac::Hmac;
use sha1::Sha1;
use sha2::digest::Digest;
use sha2::{Sha256, Sha512};
use zeroize::Zeroizing;

use crate::LuksError;

/// The most iterations of PBKDF2: minutes of work.
const MOST_ITERATIONS: u32 = 1 << 28;
/// The most memory for Argon2, in KiB: what cryptsetup allows.
const MOST_MEMORY: u32 = 4 << 20;
/// The most passes over that memory.
const MOST_PASSES: u32 = 1 << 16;

/// A hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1: LUKS1 as it was made until 2014.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Hash {
    /// By its name in a header.
    pub(crate) fn named(name: &str) -> Result<Self, LuksError> {
        match name {
            "sha1" => Ok(Hash::Sha1),
            "sha256" => Ok(Hash::Sha256),
            "sha512" => Ok(Hash::Sha512),
            _ => Err(LuksError::value("the hash", name, "sha1, sha256 and sha512 are known")),
        }
    }

    /// Bytes of a digest.
    pub(crate) fn len(self) -> usize {
        match self {
            Hash::Sha1 => 20,
            Hash::Sha256 => 32,
            Hash::Sha512 => 64,
        }
    }

    /// The digest of these pieces.
    pub(crate) fn digest(self, pieces: &[&[u8]]) -> Vec<u8> {
        fn of<D: Digest>(pieces: &[&[u8]]) -> Vec<u8> {
            let mut hash = D::new();
            pieces.iter().for_each(|piece| hash.update(piece));
            hash.finalize().to_vec()
        }
        match self {
            Hash::Sha1 => of::<Sha1>(pieces),
            Hash::Sha256 => of::<Sha256>(pieces),
            Hash::Sha512 => of::<Sha512>(pieces),
        }
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hash::Sha1 => "sha1",
            Hash::Sha256 => "sha256",
            Hash::Sha512 => "sha512",
        })
    }
}

/// PBKDF2 with HMAC (RFC 8018): `len` bytes.
pub(crate) fn pbkdf2(
    hash: Hash,
    secret: &[u8],
    salt: &[u8],
    iterations: u32,
    len: usize,
) -> Result<Zeroizing<Vec<u8>>, LuksError> {
    if iterations == 0 || iterations > MOST_ITERATIONS {
        return Err(LuksError::value("the number of iterations", iterations, "1 to 268435456 are possible"));
    }
    let mut key = Zeroizing::new(vec![0; len]);
    let done = match hash {
        Hash::Sha1 => ::pbkdf2::pbkdf2::<Hmac<Sha1>>(secret, salt, iterations, &mut key),
        Hash::Sha256 => ::pbkdf2::pbkdf2::<Hmac<Sha256>>(secret, salt, iterations, &mut key),
        Hash::Sha512 => ::pbkdf2::pbkdf2::<Hmac<Sha512>>(secret, salt, iterations, &mut key),
    };
    done.map_err(|_| LuksError::Damaged("a key cannot be derived from it"))?;
    Ok(key)
}

/// What Argon2 is to cost, as a header says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ArgonCost {
    pub(crate) passes: u32,
    /// KiB.
    pub(crate) memory: u32,
    pub(crate) lanes: u32,
}

/// Argon2 (RFC 9106), version 0x13: `len` bytes.
pub(crate) fn argon2(
    algorithm: argon2::Algorithm,
    secret: &[u8],
    salt: &[u8],
    cost: ArgonCost,
    len: usize,
) -> Result<Zeroizing<Vec<u8>>, LuksError> {
    if cost.memory > MOST_MEMORY {
        return Err(LuksError::value("the memory of argon2", cost.memory, "4194304 (KiB) are the most"));
    }
    if cost.passes > MOST_PASSES {
        return Err(LuksError::value("the passes of argon2", cost.passes, "65536 are the most"));
    }
    let cannot = |_| LuksError::Damaged("the costs of argon2 cannot be");
    let params = argon2::Params::new(cost.memory, cost.passes, cost.lanes, Some(len)).map_err(cannot)?;
    let mut key = Zeroizing::new(vec![0; len]);
    let argon = argon2::Argon2::new(algorithm, argon2::Version::V0x13, params);
    argon.hash_password_into(secret, salt, &mut key).map_err(cannot)?;
    Ok(key)
}
