//! POSIX ACLs: the kernel's interface has version 2 (posix_acl_xattr.h), ext4 on the disk version 1, which leaves out the
//! number where an entry has none.

const INTERFACE_VERSION: u32 = 2;
const DISK_VERSION: u32 = 1;
/// What an entry without a number has at the interface.
const NO_ID: u32 = u32::MAX;

mod tag {
    pub(super) const USER_OBJECT: u16 = 0x01;
    pub(super) const USER: u16 = 0x02;
    pub(super) const GROUP_OBJECT: u16 = 0x04;
    pub(super) const GROUP: u16 = 0x08;
    pub(super) const MASK: u16 = 0x10;
    pub(super) const OTHER: u16 = 0x20;
}

/// Why a value is no ACL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AclError {
    /// Its version is another one.
    #[error("the ACL has version {found}, not {wanted}")]
    Version {
        /// What it says.
        found: u32,
        /// What it should say.
        wanted: u32,
    },
    /// It ends inside an entry.
    #[error("the ACL ends inside an entry")]
    Short,
    /// It has an entry of no known kind.
    #[error("the ACL has an entry of the unknown kind {0:#x}")]
    Tag(u16),
}

fn has_id(tag: u16) -> Result<bool, AclError> {
    match tag {
        tag::USER | tag::GROUP => Ok(true),
        tag::USER_OBJECT | tag::GROUP_OBJECT | tag::MASK | tag::OTHER => Ok(false),
        other => Err(AclError::Tag(other)),
    }
}

/// Takes the version off.
fn body(value: &[u8], wanted: u32) -> Result<&[u8], AclError> {
    let (version, rest) = value.split_first_chunk::<4>().ok_or(AclError::Short)?;
    let found = u32::from_le_bytes(*version);
    if found == wanted { Ok(rest) } else { Err(AclError::Version { found, wanted }) }
}

/// From the interface's form to the disk's.
pub fn to_disk(value: &[u8]) -> Result<Vec<u8>, AclError> {
    let mut disk = DISK_VERSION.to_le_bytes().to_vec();
    for entry in body(value, INTERFACE_VERSION)?.chunks(8) {
        let entry: &[u8; 8] = entry.try_into().map_err(|_| AclError::Short)?;
        let with_id = has_id(u16::from_le_bytes([entry[0], entry[1]]))?;
        disk.extend_from_slice(&entry[..if with_id { 8 } else { 4 }]);
    }
    Ok(disk)
}

/// From the disk's form to the interface's.
pub fn from_disk(value: &[u8]) -> Result<Vec<u8>, AclError> {
    let mut rest = body(value, DISK_VERSION)?;
    let mut interface = INTERFACE_VERSION.to_le_bytes().to_vec();
    while !rest.is_empty() {
        let (short, after) = rest.split_first_chunk::<4>().ok_or(AclError::Short)?;
        interface.extend_from_slice(short);
        rest = after;
        if has_id(u16::from_le_bytes([short[0], short[1]]))? {
            let (id, after) = rest.split_first_chunk::<4>().ok_or(AclError::Short)?;
            interface.extend_from_slice(id);
            rest = after;
        } else {
            interface.extend_from_slice(&NO_ID.to_le_bytes());
        }
    }
    Ok(interface)
}

/// What a fuzzer calls with any bytes: those that are an ACL on the disk come back as they were.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    if let Ok(interface) = from_disk(bytes) {
        assert_eq!(to_disk(&interface).as_deref(), Ok(bytes));
    }
    if let Ok(disk) = to_disk(bytes) {
        assert_eq!(from_disk(&disk).map(|interface| interface.len()), Ok(bytes.len()));
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// user::rw-, user:1000:r--, group::r--, mask::r--, other::---
    const INTERFACE: [u8; 44] = [
        2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0, 255, 255, 255,
        255, 0x10, 0, 4, 0, 255, 255, 255, 255, 0x20, 0, 0, 0, 255, 255, 255, 255,
    ];

    #[test]
    fn there_and_back() {
        let disk = to_disk(&INTERFACE).unwrap();
        assert_eq!(
            disk,
            [1, 0, 0, 0, 1, 0, 6, 0, 2, 0, 4, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0, 0x10, 0, 4, 0, 0x20, 0, 0, 0]
        );
        assert_eq!(from_disk(&disk).unwrap(), INTERFACE);
    }

    proptest! {
        /// Whatever comes is refused, or comes back as it was, but for numbers where none belong.
        #[test]
        fn any_bytes_are_refused_or_come_back(
            entries in vec((prop::sample::select(vec![1u16, 2, 4, 8, 0x10, 0x20, 0x40]), any::<u16>(), any::<u32>()), 0..20),
            cut in 0..3usize,
        ) {
            let mut value = vec![2, 0, 0, 0];
            for (tag, permissions, id) in &entries {
                value.extend(tag.to_le_bytes());
                value.extend(permissions.to_le_bytes());
                value.extend(if matches!(tag, 2 | 8) { *id } else { NO_ID }.to_le_bytes());
            }
            value.truncate(value.len() - cut.min(value.len() - 4));
            let known = entries.iter().all(|(tag, ..)| *tag != 0x40);
            let whole = cut == 0 || entries.is_empty();
            match to_disk(&value) {
                Ok(disk) => {
                    prop_assert!(known && whole);
                    prop_assert_eq!(from_disk(&disk).unwrap(), value);
                }
                Err(_) => prop_assert!(!known || !whole),
            }
        }

        #[test]
        fn any_bytes_are_answered(value in vec(any::<u8>(), 0..100)) {
            if let Ok(interface) = from_disk(&value) {
                prop_assert_eq!(to_disk(&interface).unwrap(), value);
            }
        }
    }

    #[test]
    fn what_is_none_is_refused() {
        assert_eq!(to_disk(&INTERFACE[..43]), Err(AclError::Short));
        assert_eq!(to_disk(b""), Err(AclError::Short));
        assert_eq!(to_disk(&[1, 0, 0, 0]), Err(AclError::Version { found: 1, wanted: 2 }));
        assert_eq!(to_disk(&[2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]), Err(AclError::Tag(3)));
        assert_eq!(from_disk(&[1, 0, 0, 0, 2, 0, 0, 0]), Err(AclError::Short));
        assert_eq!(from_disk(&[1, 0, 0, 0, 0x40, 0, 0, 0]), Err(AclError::Tag(0x40)));
    }
}
