//! Keys and passphrases: from a file or a descriptor, never from a command line, and wiped when they are not needed.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use zeroize::Zeroizing;

use crate::LuksError;

/// The longest key: what cryptsetup takes from a file.
const MOST: u64 = 8 << 20;

/// A key or passphrase. It is not shown, and its memory is wiped at the end.
#[derive(Clone)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// These bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Secret(Zeroizing::new(bytes))
    }

    /// All bytes of a file, a newline at the end included, as cryptsetup's key files and QEMU's secrets are read.
    ///
    /// # Errors
    /// It cannot be read, is empty or has more than 8 MiB.
    pub fn from_file(path: &Path) -> Result<Self, LuksError> {
        let failed = |error| LuksError::Key { from: path.display().to_string(), error };
        Self::read(File::open(path).map_err(failed)?).map_err(failed)
    }

    /// All that a descriptor gives until its end: of a pipe, as a rule.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file).
    pub fn from_descriptor(descriptor: OwnedFd) -> Result<Self, LuksError> {
        let failed = |error| LuksError::Key { from: "the descriptor".into(), error };
        Self::read(File::from(descriptor)).map_err(failed)
    }

    fn read(file: File) -> std::io::Result<Self> {
        // Room for all of it at first: a buffer that grows leaves copies behind.
        let expected = file.metadata().map_or(0, |metadata| metadata.len()).clamp(4096, MOST) + 1;
        let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(expected).unwrap_or(4096)));
        file.take(MOST + 1).read_to_end(&mut bytes)?;
        let refuse = |what: &str| Err(std::io::Error::new(std::io::ErrorKind::InvalidData, what.to_owned()));
        match bytes.len() as u64 {
            0 => refuse("it is empty"),
            len if len > MOST => refuse("it has more than 8 MiB"),
            _ => Ok(Secret(bytes)),
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}
