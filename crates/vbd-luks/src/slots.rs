//! Key slots of a header that is in use: passphrases are added and taken away. Of LUKS1; a header of version 2 has two
//! copies of everything, and is left to cryptsetup.
//!
//! Nothing is written here: what is to be written comes back as steps, each of which is to be durable before the next. A slot
//! is in use by one number of four bytes within a sector. It is set when all that it stands for is there, and cleared before
//! any of that goes, so that the slots that are in use open the disk after a power cut at any moment.

use vbd_image::ReadAt;
use zeroize::Zeroizing;

use crate::format::{STRIPES, measured, random};
use crate::kdf::pbkdf2;
use crate::v1::{self, DISABLED, ENABLED, FIRST_SLOT, HEADER_LEN, SLOT_LEN};
use crate::{Header, LuksError, Secret, SectorCipher, split};

/// The least iterations (LUKS1, chapter 4.1).
const LEAST_ITERATIONS: u32 = 1000;

/// Bytes to be written, and made durable before the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where, in bytes from the header's start.
    pub offset: u64,
    /// What.
    pub bytes: Vec<u8>,
}

/// A change of key slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotChange {
    /// The slots that change, from 0 on.
    pub slots: Vec<usize>,
    /// What is to be written, in this order.
    pub steps: Vec<Step>,
}

/// Which slot goes.
#[derive(Clone, Copy, Debug)]
pub enum Which<'a> {
    /// All that this key opens.
    Opened(&'a Secret),
    /// The one of this number, from 0 on.
    Number(usize),
}

impl Header {
    /// The key slots that are in use, by number from 0 on.
    pub fn slots_in_use(&self) -> Vec<usize> {
        match self.one() {
            Ok(header) => header.active().map(|slot| slot.number).collect(),
            Err(_) => Vec::new(),
        }
    }

    /// The key slots in use that this key opens. Tries each of them, a second or so long.
    ///
    /// # Errors
    /// A slot is damaged, or the header is of version 2.
    pub fn opened(&self, source: &(impl ReadAt + ?Sized), secret: &Secret) -> Result<Vec<usize>, LuksError> {
        let header = self.one()?;
        let mut opened = Vec::new();
        for slot in header.active() {
            if header.open_slot(slot, source, secret)?.is_some() {
                opened.push(slot.number);
            }
        }
        Ok(opened)
    }

    /// Has a further key open the disk, which `secret` opens already. The header with its key material has `room` bytes.
    /// `iterations` of PBKDF2; by default as many as take a second here.
    ///
    /// # Errors
    /// The key is wrong, no slot is free, a slot's place is not where it can be, or the header is of version 2.
    pub fn add_key(
        &self,
        source: &(impl ReadAt + ?Sized),
        room: u64,
        secret: &Secret,
        new: &Secret,
        iterations: Option<u32>,
    ) -> Result<SlotChange, LuksError> {
        let header = self.one()?;
        let key = header.unlock_key(source, secret)?;
        let Some(slot) = header.slots.iter().find(|slot| !slot.active) else {
            let message = "all eight key slots are in use: remove a key first";
            return Err(LuksError::Unsupported(message.to_owned()));
        };
        let material = &slot.material;
        if material.stripes != STRIPES {
            return Err(LuksError::Damaged("a free key slot has another number of stripes than 4000"));
        }
        header.check_place(slot, room)?;
        let iterations = match iterations {
            Some(iterations) => iterations.max(LEAST_ITERATIONS),
            None => measured(header.hash, header.key_len)?,
        };
        let mut salt = [0; 32];
        random(&mut salt)?;
        let derived = pbkdf2(header.hash, new.bytes(), &salt, iterations, header.key_len)?;
        let mut bytes = noise(material.len())?;
        split::split(header.hash, &key, &mut bytes[..header.key_len * STRIPES as usize]);
        SectorCipher::new(&derived, 512)?.encrypt(0, &mut bytes);
        let at = place(slot.number);
        let steps = vec![
            Step { offset: material.offset, bytes: bytes.to_vec() },
            Step { offset: at + 4, bytes: [&iterations.to_be_bytes()[..], &salt].concat() },
            Step { offset: at, bytes: ENABLED.to_be_bytes().to_vec() },
        ];
        Ok(SlotChange { slots: vec![slot.number], steps })
    }

    /// Takes slots away. One is always left. The header with its key material has `room` bytes.
    ///
    /// # Errors
    /// There is no such slot, none would be left, a slot's place is not where it can be, or the header is of version 2.
    pub fn remove_key(
        &self,
        source: &(impl ReadAt + ?Sized),
        room: u64,
        which: Which<'_>,
    ) -> Result<SlotChange, LuksError> {
        let header = self.one()?;
        let mut gone = Vec::new();
        for slot in header.active() {
            let wanted = match which {
                Which::Number(number) => slot.number == number,
                Which::Opened(secret) => header.open_slot(slot, source, secret)?.is_some(),
            };
            gone.extend(wanted.then_some(slot));
        }
        if gone.is_empty() {
            return Err(match which {
                Which::Opened(_) => LuksError::WrongKey,
                Which::Number(number) => LuksError::Unsupported(format!("key slot {number} is not in use")),
            });
        }
        if gone.len() == header.active().count() {
            let message = "that is the last key, without which nobody opens it again: add another first";
            return Err(LuksError::Unsupported(message.to_owned()));
        }
        gone.iter().try_for_each(|slot| header.check_place(slot, room))?;
        let mut steps = Vec::new();
        for slot in &gone {
            steps.push(Step { offset: place(slot.number), bytes: DISABLED.to_be_bytes().to_vec() });
        }
        for slot in &gone {
            let bytes = noise(slot.material.len())?.to_vec();
            steps.push(Step { offset: slot.material.offset, bytes });
            steps.push(Step { offset: place(slot.number) + 4, bytes: vec![0; 36] });
        }
        Ok(SlotChange { slots: gone.iter().map(|slot| slot.number).collect(), steps })
    }
}

/// Where a slot's fields are.
fn place(number: usize) -> u64 {
    (FIRST_SLOT + number * SLOT_LEN) as u64
}

fn noise(len: u64) -> Result<Zeroizing<Vec<u8>>, LuksError> {
    let mut bytes = Zeroizing::new(vec![0; usize::try_from(len).expect("bounded")]);
    random(&mut bytes)?;
    Ok(bytes)
}

impl v1::Header {
    fn active(&self) -> impl Iterator<Item = &v1::Slot> {
        self.slots.iter().filter(|slot| slot.active)
    }

    /// Refuses a slot whose material lies anywhere but in its own part of the header: it is about to be written.
    fn check_place(&self, slot: &v1::Slot, room: u64) -> Result<(), LuksError> {
        slot.material.check()?;
        let (from, to) = slot.material.range();
        if from < HEADER_LEN as u64 || to > room {
            return Err(LuksError::Damaged("a key slot's material is not where key material can be"));
        }
        let others = self.slots.iter().filter(|other| other.number != slot.number);
        if others.map(|other| other.material.range()).any(|(start, end)| start < to && from < end) {
            return Err(LuksError::Damaged("two key slots have their material in the same place"));
        }
        Ok(())
    }
}
