//! ACLs as text (IEEE 1003.1e draft 17, as `star` and GNU tar write them) and as the kernel takes them.

const VERSION: u32 = 2;
const NO_ID: u32 = u32::MAX;

/// Whose name it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    User,
    Group,
}

/// The value of `system.posix_acl_access` or `_default` for a text; nothing for an empty one, nor for an access ACL that
/// says no more than the permission bits.
///
/// Users and groups are numbers, or have their number as a fourth field, or `number` knows it by the kind and the name.
pub(super) fn binary(
    text: &str,
    access: bool,
    number: &dyn Fn(Who, &str) -> Option<u32>,
) -> Result<Option<Vec<u8>>, String> {
    let mut entries: Vec<(u16, u16, u32)> = Vec::new();
    for line in text.split([',', '\n']) {
        let line = line.split('#').next().unwrap_or("").trim();
        if !line.is_empty() {
            entries.push(entry(line, number)?);
        }
    }
    let plain = access && entries.iter().all(|&(tag, _, _)| matches!(tag, 0x01 | 0x04 | 0x20));
    if entries.is_empty() || plain {
        return Ok(None);
    }
    entries.sort_by_key(|&(tag, _, id)| (tag, id));
    let mut value = VERSION.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&permissions.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    Ok(Some(value))
}

fn entry(line: &str, number: &dyn Fn(Who, &str) -> Option<u32>) -> Result<(u16, u16, u32), String> {
    let bad = || format!("has an ACL with the entry {line:?}");
    let fields: Vec<&str> = line.split(':').collect();
    let (kind, who, permissions) = match fields[..] {
        // `mask::rwx` is also written without the empty field.
        [kind, permissions] => (kind, "", permissions),
        [kind, who, permissions] => (kind, who, permissions),
        [kind, who, permissions, id] => (kind, if id.is_empty() { who } else { id }, permissions),
        _ => return Err(bad()),
    };
    let (own, named) = match kind {
        "user" | "u" => (0x01, Some((0x02, Who::User))),
        "group" | "g" => (0x04, Some((0x08, Who::Group))),
        "mask" | "m" => (0x10, None),
        "other" | "o" => (0x20, None),
        _ => return Err(bad()),
    };
    let (tag, id) = match (who, named) {
        ("", _) => (own, NO_ID),
        (who, Some((tag, kind))) => match who.parse().ok().or_else(|| number(kind, who)) {
            Some(id) if id != NO_ID => (tag, id),
            _ => return Err(format!("has an ACL for {who:?}, who is not known in the archive")),
        },
        (_, None) => return Err(bad()),
    };
    let mut bits = 0;
    for c in permissions.chars() {
        bits |= match c {
            'r' => 4,
            'w' => 2,
            'x' => 1,
            '-' => 0,
            _ => return Err(bad()),
        };
    }
    Ok((tag, bits, id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(who: Who, name: &str) -> Option<u32> {
        (who == Who::Group && name == "games").then_some(60)
    }

    #[test]
    fn entries_are_in_the_kernels_order() {
        let value =
            binary("user::rw-,other::r--,group::r--,user:lp:rw-:7,mask::rw-,group:9:r-x", true, &known)
                .unwrap()
                .unwrap();
        assert_eq!(value[..4], 2u32.to_le_bytes());
        let tags: Vec<u8> = value[4..].chunks(8).map(|e| e[0]).collect();
        assert_eq!(tags, [1, 2, 4, 8, 16, 32]);
        let games = binary("group:games:r--", false, &known).unwrap().unwrap();
        assert_eq!(games[4..], [8, 0, 4, 0, 60, 0, 0, 0]);
        assert_eq!(value[4 + 8..4 + 16], [2, 0, 6, 0, 7, 0, 0, 0]);
        assert_eq!(binary("\n", false, &known), Ok(None));
        assert_eq!(binary("user::rw-,group::r--,other::r--", true, &known), Ok(None));
        assert!(binary("user::rw-,group::r--,other::r--", false, &known).unwrap().is_some());
        for bad in ["user:lp:rw-", "nobody::r--", "mask:3:r--", "user::rq-", "a", "a:b:c:d:e"] {
            assert!(binary(bad, false, &known).is_err(), "{bad}");
        }
    }
}
