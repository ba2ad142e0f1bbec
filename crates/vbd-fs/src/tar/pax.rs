//! The records of an extended header: `LENGTH KEY=VALUE\n`, again and again.

use std::cell::Cell;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::acl;
use super::content::Pieces;
use crate::entry::{Time, Xattr};

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// Whether that attribute is the ACL of the entry itself, which the permission bits are a part of.
pub(super) fn is_access(attribute: &str) -> bool {
    attribute == ACCESS
}

/// What the records before a member say of it.
#[derive(Default)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<Time>,
    pub(super) xattrs: Vec<Xattr>,
    /// ACLs as text, with the attribute that they are in the kernel.
    acls: Vec<(&'static str, Vec<u8>)>,
    /// Those of them whose users and groups have names alone.
    pub(super) named_acls: Vec<(&'static str, String)>,
    pub(super) sparse: Sparse,
}

/// GNU's records of a sparse file, in formats 0.0, 0.1 and 1.0.
#[derive(Default)]
pub(super) struct Sparse {
    pub(super) major: Option<u64>,
    pub(super) size: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) pieces: Pieces,
    offset: Option<u64>,
}

impl Records {
    /// Reads the records of a header that describes one member.
    pub(super) fn parse(data: &[u8]) -> Result<Records, String> {
        let mut records = Records::default();
        for record in split(data) {
            let (key, value) = record?;
            records.take(key, value)?;
        }
        for (name, text) in std::mem::take(&mut records.acls) {
            records.acl(name, &text)?;
        }
        Ok(records)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number(value)?),
            b"uid" => self.uid = Some(number(value)?),
            b"gid" => self.gid = Some(number(value)?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"SCHILY.acl.access" => self.acls.push((ACCESS, value.to_vec())),
            b"SCHILY.acl.default" => self.acls.push((DEFAULT, value.to_vec())),
            b"RHT.security.selinux" => self.xattr(b"security.selinux", value.to_vec())?,
            b"GNU.sparse.major" => self.sparse.major = Some(number(value)?),
            b"GNU.sparse.minor" if number(value)? > 1 => {
                return Err("is sparse in a format that is not known".to_owned());
            }
            b"GNU.sparse.name" => self.sparse.name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.size = Some(number(value)?),
            b"GNU.sparse.offset" => self.sparse.offset = Some(number(value)?),
            b"GNU.sparse.numbytes" => {
                let offset = self.sparse.offset.take().ok_or("has a sparse piece without its offset")?;
                self.sparse.pieces.push(offset, number(value)?)?;
            }
            b"GNU.sparse.map" => {
                let numbers: Result<Vec<u64>, String> = value.split(|&b| b == b',').map(number).collect();
                let numbers = if value.is_empty() { Vec::new() } else { numbers? };
                let (pairs, rest) = numbers.as_chunks::<2>();
                if !rest.is_empty() {
                    return Err("has a sparse map of an odd length".to_owned());
                }
                for &[offset, length] in pairs {
                    self.sparse.pieces.push(offset, length)?;
                }
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattr(name, value.to_vec())?;
                }
                // Any other record is a remark: POSIX has readers pass over what they do not know.
            }
        }
        Ok(())
    }

    /// Where the attributes have the same ACL in the kernel's form, that one stays: it needs no names.
    fn acl(&mut self, attribute: &'static str, text: &[u8]) -> Result<(), String> {
        if self.xattrs.iter().any(|(name, _)| name == attribute) {
            return Ok(());
        }
        let text = std::str::from_utf8(text).map_err(|_| "has an ACL that is no text")?;
        let named = Cell::new(false);
        let later = |_, _: &str| {
            named.set(true);
            Some(0)
        };
        match acl::binary(text, is_access(attribute), &later)? {
            Some(_) if named.get() => self.named_acls.push((attribute, text.to_owned())),
            Some(value) => self.xattr(attribute.as_bytes(), value)?,
            None => {}
        }
        Ok(())
    }

    fn xattr(&mut self, name: &[u8], value: Vec<u8>) -> Result<(), String> {
        if name.is_empty() || name.len() > 255 || name.contains(&0) || value.len() > 65536 {
            return Err("has an extended attribute that no filesystem takes".to_owned());
        }
        let name = OsString::from_vec(name.to_vec());
        self.xattrs.retain(|(n, _)| *n != name);
        self.xattrs.push((name, value));
        Ok(())
    }
}

/// The records of a header that is meant for all members: remarks only, for nothing else has one meaning everywhere.
pub(super) fn check_global(data: &[u8]) -> Result<(), String> {
    for record in split(data) {
        let (key, _) = record?;
        if key != b"comment" && !key.starts_with(b"VENDOR.") {
            let key = String::from_utf8_lossy(key);
            return Err(format!("sets {key:?} for all entries, which is not supported"));
        }
    }
    Ok(())
}

/// Splits records; each says its own length, the number itself included.
fn split(mut data: &[u8]) -> impl Iterator<Item = Result<(&[u8], &[u8]), String>> {
    std::iter::from_fn(move || {
        if data.is_empty() || data.iter().all(|&b| b == 0) {
            return None;
        }
        let record = one(data);
        data = match &record {
            Ok((_, _, rest)) => rest,
            Err(_) => &[],
        };
        Some(record.map(|(key, value, _)| (key, value)))
    })
}

/// One record's key and value, and what follows it.
type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

fn one(data: &[u8]) -> Result<Record<'_>, String> {
    let bad = || "has an extended header that is damaged".to_owned();
    let space = data.iter().take(20).position(|&b| b == b' ').ok_or_else(bad)?;
    let length = usize::try_from(number(&data[..space])?).map_err(|_| bad())?;
    if length <= space + 1 || length > data.len() || data[length - 1] != b'\n' {
        return Err(bad());
    }
    let body = &data[space + 1..length - 1];
    let equals = body.iter().position(|&b| b == b'=').ok_or_else(bad)?;
    Ok((&body[..equals], &body[equals + 1..], &data[length..]))
}

fn number(text: &[u8]) -> Result<u64, String> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text)
        .ok()
        .filter(|_| digits)
        .and_then(|t| t.parse().ok())
        .ok_or_else(|| format!("has the number {:?}", String::from_utf8_lossy(text)))
}

/// Decimal seconds, which may be negative and have a fraction.
fn time(text: &[u8]) -> Result<Time, String> {
    let (negative, text) = text.strip_prefix(b"-").map_or((false, text), |rest| (true, rest));
    let dot = text.iter().position(|&b| b == b'.');
    let (whole, fraction) = dot.map_or((text, &b""[..]), |dot| (&text[..dot], &text[dot + 1..]));
    let seconds = i64::try_from(number(whole)?).map_err(|_| "has a time that is too far away")?;
    let mut digits = [b'0'; 9];
    for (digit, given) in digits.iter_mut().zip(fraction) {
        *digit = *given;
    }
    let nanoseconds = u32::try_from(number(&digits)?).map_err(|_| "has a damaged time")?;
    Ok(match (negative, nanoseconds) {
        (false, nanoseconds) => Time { seconds, nanoseconds },
        (true, 0) => Time { seconds: -seconds, nanoseconds: 0 },
        (true, nanoseconds) => Time { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_count_their_fraction_upwards() {
        assert_eq!(time(b"1.5"), Ok(Time { seconds: 1, nanoseconds: 500_000_000 }));
        assert_eq!(time(b"-1.25"), Ok(Time { seconds: -2, nanoseconds: 750_000_000 }));
        assert_eq!(time(b"-3"), Ok(Time { seconds: -3, nanoseconds: 0 }));
        assert_eq!(time(b"7.1234567891"), Ok(Time { seconds: 7, nanoseconds: 123_456_789 }));
        for bad in [&b""[..], b"x", b"1.x", b"--1", b"99999999999999999999"] {
            assert!(time(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_acl_in_the_kernels_form_counts_wherever_it_stands() {
        let record = |text: &str| format!("{} {text}\n", text.len() + 4);
        let text = record("SCHILY.acl.access=user::rw-,user:somebody:r--,group::r--,mask::r--,other::r--");
        let binary = record("SCHILY.xattr.system.posix_acl_access=binary");
        let records = Records::parse(text.as_bytes()).unwrap();
        assert!(records.xattrs.is_empty() && records.named_acls[0].1.contains("somebody"));
        for both in [format!("{text}{binary}"), format!("{binary}{text}")] {
            let records = Records::parse(both.as_bytes()).unwrap();
            assert!(records.named_acls.is_empty());
            assert_eq!(records.xattrs, [("system.posix_acl_access".into(), b"binary".to_vec())]);
        }
    }

    #[test]
    fn records_say_their_own_length() {
        let records = Records::parse(b"12 path=abc\n11 size=17\n").unwrap();
        assert_eq!((records.path.as_deref(), records.size), (Some(&b"abc"[..]), Some(17)));
        for bad in [&b"13 path=abc\n"[..], b"3 a", b"0 \n", b"99999999999999999999999 a=b\n", b"6 abc\n"] {
            assert!(Records::parse(bad).is_err(), "{bad:?}");
        }
    }
}
