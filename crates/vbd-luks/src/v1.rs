//! LUKS1 ("LUKS1 On-Disk Format Specification", chapter 3): one block of numbers, big-endian, then key material.

use vbd_image::ReadAt;
use zeroize::Zeroizing;

use crate::header::{MAGIC, Material, Unlocked, check_cipher, checked_key_len, exactly, is_key, text};
use crate::kdf::{Hash, pbkdf2};
use crate::{LuksError, Secret};

pub(crate) const HEADER_LEN: usize = 592;
pub(crate) const SLOTS: usize = 8;
pub(crate) const SLOT_LEN: usize = 48;
pub(crate) const FIRST_SLOT: usize = 208;
/// Marks of slots.
pub(crate) const ENABLED: u32 = 0x00ac_71f3;
pub(crate) const DISABLED: u32 = 0x0000_dead;
pub(crate) const SECTOR: u64 = 512;

pub(crate) struct Header {
    pub(crate) hash: Hash,
    pub(crate) key_len: usize,
    payload: u64,
    digest: [u8; 20],
    digest_salt: [u8; 32],
    digest_iterations: u32,
    /// All eight.
    pub(crate) slots: Vec<Slot>,
}

pub(crate) struct Slot {
    pub(crate) number: usize,
    pub(crate) active: bool,
    iterations: u32,
    salt: [u8; 32],
    pub(crate) material: Material,
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

impl Header {
    pub(crate) fn read(source: &(impl ReadAt + ?Sized)) -> Result<Self, LuksError> {
        let bytes: [u8; HEADER_LEN] = exactly(source, 0)?.ok_or(LuksError::Damaged("it is cut off"))?;
        debug_assert!(bytes.starts_with(MAGIC));
        check_cipher(&format!("{}-{}", text(&bytes[8..40]), text(&bytes[40..72])))?;
        let hash = Hash::named(&text(&bytes[72..104]))?;
        let key_len = checked_key_len(u64::from(number(&bytes, 108)))?;
        let mut slots = Vec::new();
        for (index, slot) in bytes[FIRST_SLOT..].chunks_exact(SLOT_LEN).enumerate() {
            let active = match number(slot, 0) {
                ENABLED => true,
                DISABLED => false,
                _ => return Err(LuksError::Damaged("a key slot is neither in use nor free")),
            };
            let offset = u64::from(number(slot, 40)) * SECTOR;
            let material = Material { offset, key_len, stripes: number(slot, 44), hash };
            if active {
                material.check()?;
            }
            let salt = slot[8..40].try_into().expect("32 bytes");
            slots.push(Slot { number: index, active, iterations: number(slot, 4), salt, material });
        }
        Ok(Header {
            hash,
            key_len,
            payload: u64::from(number(&bytes, 104)) * SECTOR,
            digest: bytes[112..132].try_into().expect("20 bytes"),
            digest_salt: bytes[132..164].try_into().expect("32 bytes"),
            digest_iterations: number(&bytes, 164),
            slots,
        })
    }

    pub(crate) fn unlock(
        &self,
        source: &(impl ReadAt + ?Sized),
        secret: &Secret,
    ) -> Result<Unlocked, LuksError> {
        Unlocked::new(self.unlock_key(source, secret)?, 512, self.payload, None, 0)
    }

    /// The volume key.
    pub(crate) fn unlock_key(
        &self,
        source: &(impl ReadAt + ?Sized),
        secret: &Secret,
    ) -> Result<Zeroizing<Vec<u8>>, LuksError> {
        let mut failed = None;
        for slot in self.slots.iter().filter(|slot| slot.active) {
            match self.open_slot(slot, source, secret) {
                Ok(Some(key)) => return Ok(key),
                Ok(None) => {}
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or(LuksError::WrongKey))
    }

    /// The volume key, if the slot takes this passphrase.
    pub(crate) fn open_slot(
        &self,
        slot: &Slot,
        source: &(impl ReadAt + ?Sized),
        secret: &Secret,
    ) -> Result<Option<Zeroizing<Vec<u8>>>, LuksError> {
        let derived = pbkdf2(self.hash, secret.bytes(), &slot.salt, slot.iterations, self.key_len)?;
        let key = slot.material.open(source, &derived)?;
        let is_key = is_key(self.hash, &key, &self.digest_salt, self.digest_iterations, &self.digest)?;
        Ok(is_key.then_some(key))
    }

    pub(crate) fn payload_offset(&self) -> u64 {
        self.payload
    }

    pub(crate) fn describe(&self) -> String {
        format!("LUKS1, aes-xts-plain64, {} bits, {}", self.key_len * 8 / 2, self.hash)
    }
}
