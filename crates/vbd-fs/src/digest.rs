//! Names that follow from what is made: the same request, the same names.

use sha2::{Digest, Sha256};
use vbd_image::partition::Guid;

/// What names are made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Origin([u8; 32]);

impl Origin {
    /// From everything that the request says, in a fixed form.
    pub(crate) fn new(request: &[u8]) -> Origin {
        Origin(Sha256::digest(request).into())
    }

    fn derived(self, purpose: &str) -> [u8; 16] {
        let digest: [u8; 32] = Sha256::new().chain_update(self.0).chain_update(purpose).finalize().into();
        let mut half = [0; 16];
        half.copy_from_slice(&digest[..16]);
        half
    }

    /// A UUID for a purpose.
    pub(crate) fn uuid(self, purpose: &str) -> Guid {
        Guid::from_digest(self.derived(purpose))
    }

    /// A number for a purpose, never 0.
    pub(crate) fn number(self, purpose: &str) -> u32 {
        let [a, b, c, d, ..] = self.derived(purpose);
        u32::from_be_bytes([a, b, c, d]).max(1)
    }
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
