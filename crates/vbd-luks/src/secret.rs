//! Keys and passphrases: from a file or a descriptor, never from a command line, and wiped when they are not needed.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{BorrowedFd, OwnedFd};
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

    /// All bytes of the descriptor that this process was given by number, up to its end; of a file, from its start on. The
    /// descriptor stays open.
    ///
    /// # Errors
    /// There is none of that number, or as [`from_file`](Self::from_file).
    pub fn from_number(number: i32) -> Result<Self, LuksError> {
        let failed = |error| LuksError::Key { from: format!("descriptor {number}"), error };
        if number < 0 {
            return Err(failed(std::io::ErrorKind::InvalidInput.into()));
        }
        // SAFETY: the kernel alone looks at the number, and says so if it is no descriptor.
        let given = unsafe { BorrowedFd::borrow_raw(number) };
        let own = rustix::io::fcntl_dupfd_cloexec(given, 3).map_err(|error| failed(error.into()))?;
        let mut file = File::from(own);
        if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            file.rewind().map_err(failed)?;
        }
        Self::read(file).map_err(failed)
    }

    /// The key in a file, or of a descriptor that this process was given, where one of them is said.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file) and [`from_number`](Self::from_number).
    pub fn from_either(file: Option<&Path>, number: Option<i32>) -> Result<Option<Self>, LuksError> {
        match (file, number) {
            (Some(file), _) => Self::from_file(file).map(Some),
            (None, Some(number)) => Self::from_number(number).map(Some),
            (None, None) => Ok(None),
        }
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
