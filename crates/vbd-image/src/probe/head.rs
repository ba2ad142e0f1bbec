//! Reading fields of a header, none of which has to be there.

/// The first bytes of a disk or partition.
#[derive(Clone, Copy)]
pub(super) struct Head<'a>(pub(super) &'a [u8]);

impl<'a> Head<'a> {
    pub(super) fn array<const N: usize>(self, offset: usize) -> Option<[u8; N]> {
        self.bytes(offset, N)?.try_into().ok()
    }

    pub(super) fn bytes(self, offset: usize, length: usize) -> Option<&'a [u8]> {
        self.0.get(offset..offset.checked_add(length)?)
    }

    pub(super) fn has(self, offset: usize, magic: &[u8]) -> bool {
        self.bytes(offset, magic.len()) == Some(magic)
    }

    pub(super) fn u8(self, offset: usize) -> Option<u8> {
        self.array(offset).map(|[byte]| byte)
    }

    pub(super) fn u16(self, offset: usize) -> Option<u16> {
        self.array(offset).map(u16::from_le_bytes)
    }

    pub(super) fn u32(self, offset: usize) -> Option<u32> {
        self.array(offset).map(u32::from_le_bytes)
    }

    pub(super) fn u64(self, offset: usize) -> Option<u64> {
        self.array(offset).map(u64::from_le_bytes)
    }

    pub(super) fn u16_be(self, offset: usize) -> Option<u16> {
        self.array(offset).map(u16::from_be_bytes)
    }

    pub(super) fn u32_be(self, offset: usize) -> Option<u32> {
        self.array(offset).map(u32::from_be_bytes)
    }

    pub(super) fn u64_be(self, offset: usize) -> Option<u64> {
        self.array(offset).map(u64::from_be_bytes)
    }

    /// A text that ends at a NUL or at its field's end, without the blanks that fill it up; `None` if nothing is left.
    pub(super) fn text(self, offset: usize, length: usize) -> Option<String> {
        let field = self.bytes(offset, length)?;
        let end = field.iter().position(|byte| *byte == 0).unwrap_or(length);
        plain(&String::from_utf8_lossy(&field[..end]))
    }

    /// As [`Head::text`], of little-endian UTF-16.
    pub(super) fn utf16(self, offset: usize, length: usize) -> Option<String> {
        let units =
            self.bytes(offset, length)?.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
        let units: Vec<_> = units.take_while(|unit| *unit != 0).collect();
        plain(&String::from_utf16_lossy(&units))
    }

    /// A UUID in the order of RFC 9562; `None` if it is all zero.
    pub(super) fn uuid(self, offset: usize) -> Option<String> {
        self.array::<16>(offset).and_then(uuid)
    }
}

fn uuid(bytes: [u8; 16]) -> Option<String> {
    if bytes == [0; 16] {
        return None;
    }
    let hex = |range: &[u8]| range.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let groups = [&bytes[..4], &bytes[4..6], &bytes[6..8], &bytes[8..10], &bytes[10..]];
    Some(groups.map(hex).join("-"))
}

/// The text without blanks around it and with what could steer a terminal shown as a question mark.
pub(super) fn plain(text: &str) -> Option<String> {
    let text = text.trim_matches(' ');
    (!text.is_empty()).then(|| text.chars().map(|c| if c.is_control() { '?' } else { c }).collect())
}
