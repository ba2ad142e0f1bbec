//! Digests of what is read.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use crate::ahead::Chunk;
use crate::digest::hex;

/// A SHA-256, as `sha256:` and 64 digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Digest(String);

impl Digest {
    /// Where the blob is in a layout.
    pub(super) fn path(&self) -> String {
        format!("blobs/sha256/{}", self.0)
    }

    /// The digest of bytes.
    #[cfg(feature = "registry")]
    pub(super) fn of(bytes: &[u8]) -> Digest {
        digest_of(Sha256::new_with_prefix(bytes))
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Digest, String> {
        let digits = text.strip_prefix("sha256:").ok_or_else(|| format!("{text:?} is no SHA-256 digest"))?;
        let plain = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if digits.len() != 64 || !digits.bytes().all(plain) {
            return Err(format!("{text:?} is no SHA-256 digest: 64 hexadecimal digits"));
        }
        Ok(Digest(digits.to_owned()))
    }
}

/// Whether a digest is the one that was wanted.
pub(super) fn check(found: &Digest, wanted: Option<&Digest>) -> io::Result<()> {
    let Some(wanted) = wanted.filter(|wanted| *wanted != found) else { return Ok(()) };
    let reason = format!(
        "is damaged or not what it says: its digest is sha256:{} and must be sha256:{}",
        found.0, wanted.0
    );
    Err(io::Error::new(io::ErrorKind::InvalidData, reason))
}

/// The digest of pieces, up to the first that cannot be read.
pub(super) fn of_chunks(chunks: impl Iterator<Item = io::Result<Chunk>>) -> io::Result<Digest> {
    let mut state = Sha256::new();
    for chunk in chunks {
        state.update(&*chunk?);
    }
    Ok(digest_of(state))
}

fn digest_of(state: Sha256) -> Digest {
    let found: [u8; 32] = state.finalize().into();
    Digest(hex(&found))
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

/// A reader that takes the digest of what it reads.
pub(super) struct Hashing<R> {
    reader: R,
    state: Sha256,
}

impl<R: Read> Hashing<R> {
    pub(super) fn new(reader: R) -> Hashing<R> {
        Hashing { reader, state: Sha256::new() }
    }

    /// Reads to the end.
    pub(super) fn drain(&mut self) -> io::Result<()> {
        io::copy(self, &mut io::sink()).map(|_| ())
    }

    /// Whether what was read is what it should be.
    pub(super) fn check(&self, wanted: Option<&Digest>) -> io::Result<()> {
        check(&self.found(), wanted)
    }

    /// The digest of what was read.
    pub(super) fn found(&self) -> Digest {
        digest_of(self.state.clone())
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.state.update(&buffer[..read]);
        Ok(read)
    }
}
