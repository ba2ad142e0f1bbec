//! What tells one filesystem from another: its UUID and the seeds of its hashes and checksums.

use std::io::{self, Read as _};

use sha2::{Digest as _, Sha256};
use vbd_ext4::write::{Checksums, Settings};

use super::Making;
use crate::Result;
use crate::error::Context;

/// What everything is derived from: the options, where the same build is to give the same bytes, and otherwise chance.
pub(super) struct Identity {
    seed: [u8; 32],
    /// Given, or needed before the content is known.
    uuid: Option<[u8; 16]>,
}

impl Identity {
    pub(super) fn new(making: &Making<'_>) -> Result<Identity> {
        let spec = making.spec;
        let mut seed = [0; 32];
        if making.latest.is_none() {
            let chance =
                |seed: &mut [u8]| -> io::Result<()> { std::fs::File::open("/dev/urandom")?.read_exact(seed) };
            chance(&mut seed).at("read", "/dev/urandom".as_ref())?;
        }
        let given = spec.uuid.as_deref().and_then(parse);
        let mut digest = derive(&seed, "options");
        for part in [spec.label.as_deref().unwrap_or(""), spec.uuid.as_deref().unwrap_or("")] {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part.to_ascii_lowercase());
        }
        digest.update(making.now.seconds.to_le_bytes());
        let seed: [u8; 32] = digest.finalize().into();
        let uuid = given.or_else(|| spec.for_old_grub.then(|| uuid_of(derive(&seed, "uuid"))));
        Ok(Identity { seed, uuid })
    }

    /// Sets what must be known from the start.
    pub(super) fn apply(&self, settings: &mut Settings, for_old_grub: bool) {
        let part = |name| -> [u8; 32] { derive(&self.seed, name).finalize().into() };
        let hash = part("hash seed");
        settings.hash_seed.copy_from_slice(&hash[..16]);
        let checksum = part("checksum seed");
        settings.checksums = match self.uuid {
            Some(uuid) if for_old_grub => Checksums::OfUuid(uuid),
            _ => Checksums::Seed(u32::from_le_bytes([checksum[0], checksum[1], checksum[2], checksum[3]])),
        };
    }

    /// The UUID, for a filesystem with this in it.
    pub(super) fn uuid(&self, content: &[[u8; 32]]) -> [u8; 16] {
        self.uuid.unwrap_or_else(|| {
            let mut digest = derive(&self.seed, "uuid");
            content.iter().for_each(|part| digest.update(part));
            uuid_of(digest)
        })
    }
}

fn derive(seed: &[u8; 32], name: &str) -> Sha256 {
    let mut digest = Sha256::new();
    digest.update(seed);
    digest.update(name);
    digest
}

/// A UUID of version 8 (RFC 9562, section 5.8): bits of one's own making.
fn uuid_of(digest: Sha256) -> [u8; 16] {
    let all: [u8; 32] = digest.finalize().into();
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&all[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

/// A UUID from its text, which was checked.
fn parse(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    u128::from_str_radix(&digits, 16).ok().map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_and_made() {
        let text = "0123ABCD-4567-89ab-cdef-0123456789ab";
        assert_eq!(parse(text).unwrap()[..4], [0x01, 0x23, 0xab, 0xcd]);
        assert!(parse("g").is_none());
        let made = uuid_of(derive(&[7; 32], "x"));
        assert_eq!((made[6] >> 4, made[8] >> 6), (8, 2));
        assert_ne!(made, uuid_of(derive(&[7; 32], "y")));
    }
}
