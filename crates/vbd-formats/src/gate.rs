//! Which files an image may name.
//!
//! An image comes from anywhere, and what it calls its backing file is read by a guest: `/etc/shadow`, if nobody looks.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use vbd_core::{Error, ErrorKind, Result};

/// Lets files through that lie where an image may name files: in the image's own directory or below it, and in or below
/// directories that were allowed by whoever opens the image. Links are followed first, and only regular files pass.
///
/// It guards against images that others made, not against others who can change the directories meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gate {
    allowed: Vec<PathBuf>,
}

impl Gate {
    /// The image's own directory, and these.
    pub fn new(allowed: impl IntoIterator<Item = PathBuf>) -> Self {
        Gate { allowed: allowed.into_iter().collect() }
    }

    /// The directories that were allowed.
    pub fn allowed(&self) -> &[PathBuf] {
        &self.allowed
    }

    /// The file that an image calls `name`: its real path. `top` is the image that was asked for, `image` the one of its
    /// chain whose file names another, as its `role` ("backing file").
    ///
    /// # Errors
    /// The name is no plain file's, there is no such file, or it lies elsewhere.
    pub fn pass(&self, top: &Path, image: &Path, name: &OsStr, role: &str) -> Result<PathBuf> {
        let refuse = |kind, message| Err(Error::new(kind, message).of(shown(image.as_os_str())));
        let named = named(image, name).map_err(|what| {
            let message = format!("its {role} is {what}; only files are opened");
            Error::new(ErrorKind::Unsupported, message).of(shown(image.as_os_str()))
        })?;
        let text = shown(named.as_os_str());
        let real = match named.canonicalize() {
            Ok(real) => real,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let message = format!(
                    "its {role} {text} is missing: put it back, or name the one it is now (for a backing file: \
                     `vbd rebase --unsafe`)"
                );
                return refuse(ErrorKind::Corrupt, message);
            }
            Err(error) => {
                return Err(
                    Error::io(format!("cannot find its {role} {text}"), error).of(shown(image.as_os_str()))
                );
            }
        };
        let own = directory_of(top).canonicalize();
        let own =
            own.map_err(|error| Error::io("cannot find its directory", error).of(shown(top.as_os_str())))?;
        // A directory that is not there allows nothing.
        let allowed = self.allowed.iter().filter_map(|directory| directory.canonicalize().ok());
        if !std::iter::once(own.clone()).chain(allowed).any(|directory| real.starts_with(directory)) {
            let outside = shown(directory_of(&real).as_os_str());
            let message = format!(
                "its {role} {text} is outside {}: if it may be opened, say --allow-dir {outside} (`allow-dirs` in a \
                 configuration)",
                shown(own.as_os_str())
            );
            return refuse(ErrorKind::Unsupported, message);
        }
        let metadata = real.metadata();
        let metadata =
            metadata.map_err(|error| Error::io(format!("cannot look at its {role}"), error).of(&text))?;
        if !metadata.is_file() {
            return refuse(ErrorKind::Unsupported, format!("its {role} {text} is no regular file"));
        }
        Ok(real)
    }
}

/// A path or name for messages: what could steer a terminal is shown as a question mark.
pub(crate) fn shown(name: &OsStr) -> String {
    name.to_string_lossy().chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Where the file is that an image calls so: relative names begin where the image is. Names are read as QEMU reads them:
/// what has a colon before its first slash is no file but something reached by a protocol, except for `file:`.
fn named(image: &Path, name: &OsStr) -> std::result::Result<PathBuf, String> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.contains(&0) {
        return Err("a name that no file can have".into());
    }
    let bytes = bytes.strip_prefix(b"file:").unwrap_or(bytes);
    let first = bytes.iter().position(|byte| *byte == b'/').unwrap_or(bytes.len());
    if let Some(colon) = bytes[..first].iter().position(|byte| *byte == b':') {
        return Err(format!("reached by `{}`", shown(OsStr::from_bytes(&bytes[..colon]))));
    }
    Ok(directory_of(image).join(OsStr::from_bytes(bytes)))
}
