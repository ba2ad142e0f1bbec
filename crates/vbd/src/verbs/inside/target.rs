//! `IMAGE:/path`: a disk file, and a place in it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// A disk file and a path in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// The file.
    pub(super) image: PathBuf,
    /// From the root of the filesystem; empty or with a slash in front.
    pub(super) path: Vec<u8>,
    /// Whether a path was said, be it empty.
    pub(super) said: bool,
}

impl Target {
    /// Takes a word of the command line apart at its first `:/`, or at a colon at its end; without either it is the file.
    fn new(word: &OsStr) -> Target {
        let bytes = word.as_bytes();
        let colon = bytes.windows(2).position(|pair| pair == b":/");
        let colon = colon.or_else(|| bytes.len().checked_sub(1).filter(|last| bytes[*last] == b':'));
        match colon.filter(|colon| *colon > 0) {
            Some(colon) => Target {
                image: OsString::from_vec(bytes[..colon].to_vec()).into(),
                path: bytes[colon + 1..].to_vec(),
                said: true,
            },
            None => Target { image: word.into(), path: Vec::new(), said: false },
        }
    }

    /// The last part of the path; nothing for the root.
    pub(super) fn name(&self) -> Option<&[u8]> {
        let mut parts =
            self.path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".");
        parts.next_back().filter(|part| *part != b"..")
    }

    /// For messages: what could steer a terminal is shown as a question mark.
    pub(super) fn shown(&self) -> String {
        let path = String::from_utf8_lossy(&self.path);
        format!("{}:{path}", self.image.display()).replace(char::is_control, "?")
    }
}

impl From<OsString> for Target {
    fn from(word: OsString) -> Self {
        Target::new(&word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_taken_apart_at_the_first_colon_with_a_slash() {
        for (word, image, path, said) in [
            ("vm1", "vm1", "", false),
            ("vm1:", "vm1", "", true),
            ("vm1:/", "vm1", "/", true),
            ("vm1:/etc/fstab", "vm1", "/etc/fstab", true),
            ("/a/b:c/vm1:/dev/pci-0:/x", "/a/b:c/vm1", "/dev/pci-0:/x", true),
            ("vm1:etc", "vm1:etc", "", false),
            (":/etc", ":/etc", "", false),
        ] {
            let expected = Target { image: image.into(), path: path.into(), said };
            assert_eq!(Target::new(word.as_ref()), expected, "{word}");
        }
    }

    #[test]
    fn names() {
        for (word, name) in
            [("i:/", None), ("i:/a/..", None), ("i:/a/b/", Some(&b"b"[..])), ("i:/a/.", Some(b"a"))]
        {
            assert_eq!(Target::new(word.as_ref()).name(), name, "{word}");
        }
    }
}
