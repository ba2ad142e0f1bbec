//! Where a differencing disk keeps the names of its parent ("Parent Locator Entries").

use vbd_image::ReadAt;

use super::{FormatError, SECTOR};

/// How many there can be.
pub const LOCATORS: usize = 8;
/// The longest name that is read, in bytes.
const MOST_NAME: u32 = 64 << 10;

/// Where one name is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locator {
    /// The platform that can use the name; zeroes where the entry is not used.
    pub platform: [u8; 4],
    /// Room for the name: sectors as the specification has it, bytes as most programs write it.
    pub space: u32,
    /// Bytes of the name.
    pub length: u32,
    /// Where it is, in bytes.
    pub offset: u64,
}

/// A name of the parent, as some platform wrote it. A path in it is not to be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentName {
    /// Whether it is relative to the directory of the image itself.
    pub relative: bool,
    /// The path, with `/` between its parts.
    pub path: String,
}

impl Locator {
    /// Whether the entry is used.
    pub fn is_used(&self) -> bool {
        self.platform != [0; 4]
    }

    /// Room for the name in bytes. What is less than a sector can only be meant as a number of sectors.
    pub fn space_bytes(&self) -> u64 {
        match u64::from(self.space) {
            sectors if sectors < SECTOR => sectors * SECTOR,
            bytes => bytes.next_multiple_of(SECTOR),
        }
    }

    /// The name, where the platform is one whose names can be told: W2ru, W2ku, MacX, and Wi2r, Wi2k.
    ///
    /// # Errors
    /// The entry points outside the file, or is too long, or the name cannot be read.
    pub fn name(
        &self,
        source: &(impl ReadAt + ?Sized),
        file_len: u64,
    ) -> Result<Option<ParentName>, FormatError> {
        if !matches!(&self.platform, b"W2ru" | b"W2ku" | b"MacX" | b"Wi2r" | b"Wi2k") || self.length == 0 {
            return Ok(None);
        }
        if self.length > MOST_NAME {
            return Err(FormatError::value(
                "the length of a parent locator",
                self.length,
                "65536 is the most",
            ));
        }
        let end = self.offset.saturating_add(u64::from(self.length));
        if end > file_len {
            return Err(FormatError::Truncated { what: "a parent locator", len: file_len, needed: end });
        }
        let mut bytes = vec![0; self.length as usize];
        let filled = source.fill_at(self.offset, &mut bytes)?;
        bytes.truncate(filled);
        Ok(decode(&self.platform, &bytes))
    }
}

fn decode(platform: &[u8; 4], bytes: &[u8]) -> Option<ParentName> {
    let text = match platform {
        b"W2ru" | b"W2ku" => {
            let units: Vec<u16> = bytes
                .chunks_exact(2)
                .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
                .take_while(|unit| *unit != 0)
                .collect();
            String::from_utf16(&units).ok()?
        }
        _ => {
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            String::from_utf8(bytes[..end].to_vec()).ok()?
        }
    };
    if text.is_empty() {
        return None;
    }
    if platform == b"MacX" {
        // RFC 2396: file://HOST/PATH; relative ones are written file://./NAME.
        let path = percent_decoded(text.strip_prefix("file://")?)?;
        let path = path.strip_prefix("localhost").unwrap_or(&path).to_owned();
        return Some(ParentName { relative: !path.starts_with('/'), path });
    }
    let path = text.replace('\\', "/");
    let relative = matches!(platform, b"W2ru" | b"Wi2r");
    Some(ParentName { relative, path })
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        match (first, tail) {
            (b'%', [high, low, tail @ ..]) => {
                let digit = |byte: &u8| char::from(*byte).to_digit(16);
                bytes.push(u8::try_from(digit(high)? << 4 | digit(low)?).ok()?);
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

/// The bytes of a name as W2ru and W2ku have it.
pub(crate) fn encode_windows(path: &str) -> Vec<u8> {
    path.replace('/', "\\").encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// The bytes of a name as MacX has it: a URL.
pub(crate) fn encode_url(path: &str) -> Vec<u8> {
    let mut url = b"file://".to_vec();
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' | b'~' => url.push(byte),
            other => url.extend(format!("%{other:02x}").bytes()),
        }
    }
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_as_they_were_written() {
        let relative = decode(b"W2ru", &encode_windows("./base ü.vhd")).unwrap();
        assert_eq!(relative, ParentName { relative: true, path: "./base ü.vhd".into() });
        let absolute = decode(b"W2ku", &encode_windows("/images/base.vhd")).unwrap();
        assert_eq!(absolute, ParentName { relative: false, path: "/images/base.vhd".into() });
        for (path, is_relative) in [("./a b%ü.vhd", true), ("/images/base.vhd", false)] {
            let url = decode(b"MacX", &encode_url(path)).unwrap();
            assert_eq!(url, ParentName { relative: is_relative, path: path.into() });
        }
        assert_eq!(decode(b"MacX", b"http://elsewhere/x"), None);
        assert_eq!(decode(b"MacX", b"file:///bad%zz"), None);
        assert_eq!(decode(b"W2ru", b"\0\0"), None);
    }
}
