//! What the fuzz target calls.

use crate::read::Padded;

/// Bytes that an image is taken to have at least: zeros after what is there.
const SIZE: u64 = 16 << 20;

/// Looks at an image. Never panics, whatever the bytes.
pub fn check(bytes: &[u8]) {
    let _ = super::check(Padded::new(bytes.to_vec(), SIZE), &mut |_, _| {});
}
