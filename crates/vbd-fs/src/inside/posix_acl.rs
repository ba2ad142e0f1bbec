//! Access control lists as the kernel gives them (`system.posix_acl_access`), as the text that tar archives hold.

/// The text (IEEE 1003.1e draft 17, users and groups by their numbers) of a list in the kernel's form, version 2.
/// `None` if it is none.
pub(super) fn text(value: &[u8]) -> Option<String> {
    let (version, entries) = value.split_first_chunk()?;
    if u32::from_le_bytes(*version) != 2 {
        return None;
    }
    let (entries, rest) = entries.as_chunks::<8>();
    if !rest.is_empty() {
        return None;
    }
    let mut lines = Vec::new();
    for &[tag, tag_high, permissions, _, a, b, c, d] in entries {
        let id = u32::from_le_bytes([a, b, c, d]);
        let who = match u16::from_le_bytes([tag, tag_high]) {
            0x01 => "user:".to_owned(),
            0x02 => format!("user:{id}"),
            0x04 => "group:".to_owned(),
            0x08 => format!("group:{id}"),
            0x10 => "mask:".to_owned(),
            0x20 => "other:".to_owned(),
            _ => return None,
        };
        let bit = |bit: u8, letter: char| if permissions & bit != 0 { letter } else { '-' };
        lines.push(format!("{who}:{}{}{}", bit(4, 'r'), bit(2, 'w'), bit(1, 'x')));
    }
    Some(lines.join("\n") + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_lines() {
        let mut value = 2u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in
            [(1u16, 6u16, u32::MAX), (2, 7, 1000), (4, 4, u32::MAX), (0x20, 0, u32::MAX)]
        {
            value.extend_from_slice(&tag.to_le_bytes());
            value.extend_from_slice(&permissions.to_le_bytes());
            value.extend_from_slice(&id.to_le_bytes());
        }
        assert_eq!(text(&value).unwrap(), "user::rw-\nuser:1000:rwx\ngroup::r--\nother::---\n");
        assert_eq!(text(&value[..value.len() - 1]), None);
        assert_eq!(text(&[1, 0, 0, 0]), None);
        assert_eq!(text(&[2]), None);
    }
}
