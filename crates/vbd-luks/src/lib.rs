//! LUKS: disks encrypted with a key that passphrases unlock.
//!
//! - [`Header`]: what is in front of the encrypted data, of version 1 and 2, and [`Header::unlock`].
//! - [`SectorCipher`]: encrypts and decrypts sectors; for a LUKS disk, and for the clusters of a qcow2 image.
//! - [`format()`]: a new header, of version 1, and [`Header::add_key`], [`Header::remove_key`]: its key slots.
//! - [`Encrypted`]: a channel through which data is encrypted, for a disk or the clusters of a qcow2 image.
//! - [`Luks`]: a disk behind which another one is encrypted.
//!
//! The specifications are "LUKS1 On-Disk Format Specification", version 1.2.3, and "LUKS2 On-Disk Format Specification",
//! version 1.1.3. The cipher is AES in XTS mode with the sector's number as its tweak (`aes-xts-plain64`), which is what is
//! made everywhere; others are refused by name. Primitives come from crates; nothing is invented here.

mod cipher;
mod disk;
mod encrypted;
mod error;
mod format;
mod header;
mod kdf;
mod secret;
mod slots;
mod split;
mod v1;
mod v2;

pub use cipher::SectorCipher;
pub use disk::{Luks, LuksOptions};
pub use encrypted::Encrypted;
pub use error::LuksError;
pub use format::{FormatOptions, KeyBits, format, header_len};
pub use header::{Header, Unlocked};
pub use kdf::Hash;
pub use secret::Secret;
pub use slots::{SlotChange, Step, Which};

/// What the fuzzer calls: a header, as it may stand in front of anybody's disk. Nothing is unlocked: a header may ask for
/// minutes of work, as one that is sound does.
pub fn fuzz(bytes: &[u8]) {
    if let Ok(header) = Header::read(bytes) {
        let _ = (header.payload_offset(), header.describe());
        // Which slot is wiped, and whether its place is one that may be written, is decided without unlocking.
        for number in 0..8 {
            if let Ok(change) = header.remove_key(bytes, bytes.len() as u64, Which::Number(number)) {
                assert!(change.steps.iter().all(|step| {
                    step.offset
                        .checked_add(step.bytes.len() as u64)
                        .is_some_and(|end| end <= bytes.len() as u64)
                }));
            }
        }
    }
}
