//! GUIDs, as a GPT has them: names of disks, partitions and types of partitions.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A GUID (RFC 9562). As text: `c12a7328-f81f-11d2-ba4b-00a0c93ec93b`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Guid(pub u128);

impl Guid {
    /// From the bytes of a GPT, where the first three groups are little-endian (UEFI 2.10, appendix A).
    pub fn from_disk(bytes: [u8; 16]) -> Guid {
        Guid(u128::from_be_bytes(swapped(bytes)))
    }

    /// The bytes of a GPT.
    pub fn to_disk(self) -> [u8; 16] {
        swapped(self.0.to_be_bytes())
    }

    /// A GUID made of other bytes, a digest's: version 8 (RFC 9562, 5.8), which says nothing of how it was made.
    pub fn from_digest(bytes: [u8; 16]) -> Guid {
        let bits = u128::from_be_bytes(bytes);
        Guid(bits & !(0xF << 76) & !(0x3 << 62) | 0x8 << 76 | 0x2 << 62)
    }

    /// Whether it is the one of an entry that is not used.
    pub fn is_nil(self) -> bool {
        self.0 == 0
    }
}

/// The other order of the bytes in the groups of four, two and two.
fn swapped(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = format!("{:032x}", self.0);
        write!(f, "{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no GUID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no UUID (8-4-4-4-12 hexadecimal digits)")]
pub struct NoGuid(String);

impl FromStr for Guid {
    type Err = NoGuid;

    fn from_str(text: &str) -> Result<Guid, NoGuid> {
        let groups: Vec<&str> = text.split('-').collect();
        let is_guid = groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12])
            && groups.iter().all(|group| group.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let number = is_guid.then(|| u128::from_str_radix(&groups.concat(), 16).ok()).flatten();
        number.map(Guid).ok_or_else(|| NoGuid(text.to_owned()))
    }
}

impl TryFrom<String> for Guid {
    type Error = NoGuid;

    fn try_from(text: String) -> Result<Guid, NoGuid> {
        text.parse()
    }
}

impl From<Guid> for String {
    fn from(guid: Guid) -> String {
        guid.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_disk_agree() {
        let esp: Guid = "C12A7328-f81f-11d2-ba4b-00a0c93ec93b".parse().unwrap();
        assert_eq!(esp.to_string(), "c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
        assert_eq!(esp.to_disk()[..8], [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11]);
        assert_eq!(Guid::from_disk(esp.to_disk()), esp);
        for bad in
            ["", "c12a7328", "c12a7328-f81f-11d2-ba4b-00a0c93ec93", "+12a7328-f81f-11d2-ba4b-00a0c93ec93b"]
        {
            assert!(bad.parse::<Guid>().is_err(), "{bad}");
        }
    }

    #[test]
    fn made_of_a_digest_it_says_so() {
        let made = Guid::from_digest([0xFF; 16]).to_string();
        assert_eq!(made, "ffffffff-ffff-8fff-bfff-ffffffffffff");
        assert_eq!(Guid::from_digest([0; 16]).to_string(), "00000000-0000-8000-8000-000000000000");
    }
}
