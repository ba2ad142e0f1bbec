//! The cipher: AES-XTS, the tweak being the sector's number as 64 bits, little-endian ("plain64").

use aes::cipher::KeyInit;
use aes::{Aes128, Aes256};
use xts_mode::{Xts128, get_tweak_default};

use crate::LuksError;

/// The unit in which sectors are numbered, in bytes.
const SECTOR: u64 = 512;

enum Xts {
    Aes128(Box<Xts128<Aes128>>),
    Aes256(Box<Xts128<Aes256>>),
}

/// Encrypts and decrypts sectors in place.
///
/// Numbers count units of 512 bytes, whatever the sector size is, as dm-crypt counts them. In a qcow2 image with LUKS
/// they count from the start of the file (host offset / 512).
pub struct SectorCipher {
    xts: Xts,
    sector_size: usize,
}

impl SectorCipher {
    /// The cipher with this key: 32 bytes for AES-128, 64 for AES-256. Sectors have 512, 1024, 2048 or 4096 bytes.
    ///
    /// # Errors
    /// Another length, or another sector size.
    pub fn new(key: &[u8], sector_size: u32) -> Result<Self, LuksError> {
        if !sector_size.is_power_of_two() || !(512..=4096).contains(&sector_size) {
            return Err(LuksError::value("the sector size", sector_size, "512 to 4096 are possible"));
        }
        let wrong =
            || LuksError::value("the key's length", key.len(), "32 or 64 bytes are known for AES-XTS");
        let (first, second) = key.split_at(key.len() / 2);
        let xts = match key.len() {
            32 => Xts::Aes128(Box::new(Xts128::new(
                Aes128::new_from_slice(first).map_err(|_| wrong())?,
                Aes128::new_from_slice(second).map_err(|_| wrong())?,
            ))),
            64 => Xts::Aes256(Box::new(Xts128::new(
                Aes256::new_from_slice(first).map_err(|_| wrong())?,
                Aes256::new_from_slice(second).map_err(|_| wrong())?,
            ))),
            _ => return Err(wrong()),
        };
        Ok(SectorCipher { xts, sector_size: sector_size as usize })
    }

    /// Bytes of a sector: data is encrypted in multiples of it.
    pub fn sector_size(&self) -> u64 {
        self.sector_size as u64
    }

    /// Encrypts whole sectors, the first of which has this number (in units of 512 bytes).
    ///
    /// # Panics
    /// The data is no multiple of the sector size.
    pub fn encrypt(&self, number: u64, data: &mut [u8]) {
        self.each(number, data, |xts, data, tweak| match xts {
            Xts::Aes128(xts) => xts.encrypt_sector(data, tweak),
            Xts::Aes256(xts) => xts.encrypt_sector(data, tweak),
        });
    }

    /// Decrypts whole sectors.
    ///
    /// # Panics
    /// As [`encrypt`](Self::encrypt).
    pub fn decrypt(&self, number: u64, data: &mut [u8]) {
        self.each(number, data, |xts, data, tweak| match xts {
            Xts::Aes128(xts) => xts.decrypt_sector(data, tweak),
            Xts::Aes256(xts) => xts.decrypt_sector(data, tweak),
        });
    }

    fn each(&self, number: u64, data: &mut [u8], work: impl Fn(&Xts, &mut [u8], [u8; 16])) {
        assert!(data.len().is_multiple_of(self.sector_size), "whole sectors");
        let step = self.sector_size() / SECTOR;
        for (index, sector) in (0u64..).zip(data.chunks_exact_mut(self.sector_size)) {
            let number = number.wrapping_add(index * step);
            work(&self.xts, sector, get_tweak_default(u128::from(number)));
        }
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "numbers of tests are small")]
mod tests {
    use super::*;

    /// IEEE 1619-2007, annex B: vector 4 (AES-128, data unit 0) and vector 10 (AES-256, data unit 0xff).
    #[test]
    fn vectors_of_the_standard() {
        let counting: Vec<u8> = (0..512u32).map(|at| (at % 256) as u8).collect();
        let pi = |text: &str| -> Vec<u8> {
            (0..text.len() / 2).map(|at| u8::from_str_radix(&text[at * 2..][..2], 16).unwrap()).collect()
        };
        let key = pi("2718281828459045235360287471352631415926535897932384626433832795");
        let mut data = counting.clone();
        let cipher = SectorCipher::new(&key, 512).unwrap();
        cipher.encrypt(0, &mut data);
        assert_eq!(data[..16], pi("27a7479befa1d476489f308cd4cfa6e2"));
        cipher.decrypt(0, &mut data);
        assert_eq!(data, counting);
        let key = pi(concat!(
            "2718281828459045235360287471352662497757247093699959574966967627",
            "3141592653589793238462643383279502884197169399375105820974944592"
        ));
        let cipher = SectorCipher::new(&key, 512).unwrap();
        cipher.encrypt(0xff, &mut data);
        assert_eq!(data[..16], pi("1c3b3a102f770386e4836c99e370cf9b"));
        cipher.decrypt(0xff, &mut data);
        assert_eq!(data, counting);
    }

    #[test]
    fn large_sectors_are_numbered_in_units_of_512() {
        let cipher = SectorCipher::new(&[7; 64], 4096).unwrap();
        let (mut both, mut second) = (vec![3; 8192], vec![3; 4096]);
        cipher.encrypt(16, &mut both);
        cipher.encrypt(24, &mut second);
        assert_eq!(both[4096..], second);
        assert!(SectorCipher::new(&[7; 48], 512).is_err() && SectorCipher::new(&[7; 64], 8192).is_err());
    }
}
