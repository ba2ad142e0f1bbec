//! The anti-forensic splitter (LUKS1, chapter 2.4): a key spread over many stripes, all of which are needed.

use zeroize::Zeroizing;

use crate::kdf::Hash;

/// Mixes a block: each part of a digest's length becomes the digest of its number and itself.
fn diffuse(hash: Hash, block: &mut [u8]) {
    for (number, part) in (0u32..).zip(block.chunks_mut(hash.len())) {
        let digest = hash.digest(&[&number.to_be_bytes(), part]);
        part.copy_from_slice(&digest[..part.len()]);
    }
}

fn add(to: &mut [u8], other: &[u8]) {
    to.iter_mut().zip(other).for_each(|(to, other)| *to ^= other);
}

/// The key of `len` bytes that was split into `material`, which has whole stripes.
pub(crate) fn merge(hash: Hash, material: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; len]);
    let mut stripes = material.chunks_exact(len).peekable();
    while let Some(stripe) = stripes.next() {
        add(&mut key, stripe);
        if stripes.peek().is_some() {
            diffuse(hash, &mut key);
        }
    }
    key
}

/// Splits a key into `stripes`; `random` has room for all of them, and is filled with chance.
pub(crate) fn split(hash: Hash, key: &[u8], random: &mut [u8]) {
    let mut mixed = Zeroizing::new(vec![0; key.len()]);
    let last = random.len() - key.len();
    for stripe in random[..last].chunks_exact(key.len()) {
        add(&mut mixed, stripe);
        diffuse(hash, &mut mixed);
    }
    add(&mut mixed, key);
    random[last..].copy_from_slice(&mixed);
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "numbers of tests are small")]
mod tests {
    use super::*;

    #[test]
    fn a_key_comes_back_from_all_of_its_stripes() {
        for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
            for len in [16, 32, 64] {
                let key: Vec<u8> = (0..len).map(|at| at as u8 ^ 0x5a).collect();
                let mut material: Vec<u8> = (0..len * 50).map(|at| (at * 37 % 251) as u8).collect();
                split(hash, &key, &mut material);
                assert_eq!(*merge(hash, &material, len), key);
                material[len * 20] ^= 1;
                assert_ne!(*merge(hash, &material, len), key, "one bit is enough to lose it");
            }
        }
    }
}
