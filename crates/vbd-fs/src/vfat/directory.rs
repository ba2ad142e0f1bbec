//! Directories: short names, and the long ones in front of them.

use std::io;

use super::time;
use crate::Time;

pub(super) const READ_ONLY_LABEL: u8 = 0x08;
pub(super) const DIRECTORY: u8 = 0x10;
const FILE: u8 = 0x20;
pub(super) const LONG: u8 = 0x0F;
/// UTF-16 units in an entry for a long name.
pub(super) const UNITS: usize = 13;

/// What an entry leads to.
#[derive(Debug)]
enum Node {
    File { cluster: u32, size: u32 },
    Directory(Box<Directory>),
}

#[derive(Debug)]
struct Entry {
    name: String,
    node: Node,
}

/// A directory that is being filled.
#[derive(Debug, Default)]
pub(super) struct Directory {
    entries: Vec<Entry>,
    /// Its first cluster, once it has a place.
    pub(super) cluster: u32,
}

fn invalid(name: &str, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?}: {why}"))
}

/// Whether two names are the same to a FAT.
fn same(a: &str, b: &str) -> bool {
    a.chars().flat_map(char::to_lowercase).eq(b.chars().flat_map(char::to_lowercase))
}

impl Directory {
    /// The directory at a path below this one, made where it is missing.
    pub(super) fn descend(&mut self, path: &str) -> io::Result<&mut Directory> {
        let mut at = self;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let index = match at.entries.iter().position(|entry| same(&entry.name, name)) {
                Some(index) => index,
                None => {
                    check(name)?;
                    let node = Node::Directory(Box::default());
                    at.entries.push(Entry { name: name.to_owned(), node });
                    at.entries.len() - 1
                }
            };
            at = match &mut at.entries[index].node {
                Node::Directory(directory) => directory,
                Node::File { .. } => return Err(invalid(name, "is a file, not a directory")),
            };
        }
        Ok(at)
    }

    /// Whether a name can be added.
    pub(super) fn check_new(&self, name: &str) -> io::Result<()> {
        check(name)?;
        if self.entries.iter().any(|entry| same(&entry.name, name)) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{name:?} is there already")));
        }
        Ok(())
    }

    pub(super) fn add_file(&mut self, name: &str, cluster: u32, size: u32) -> io::Result<()> {
        self.check_new(name)?;
        self.entries.push(Entry { name: name.to_owned(), node: Node::File { cluster, size } });
        Ok(())
    }

    pub(super) fn directories(&mut self) -> impl Iterator<Item = &mut Directory> {
        self.entries.iter_mut().filter_map(|entry| match &mut entry.node {
            Node::Directory(directory) => Some(&mut **directory),
            Node::File { .. } => None,
        })
    }

    /// Bytes that it takes, with its entries for itself and its parent.
    pub(super) fn size(&self) -> io::Result<u64> {
        Ok(64 + self.encode(Time::default())?.len() as u64)
    }

    /// Its entries, in the order of their names.
    pub(super) fn encode(&self, time: Time) -> io::Result<Vec<u8>> {
        let mut sorted: Vec<&Entry> = self.entries.iter().collect();
        sorted.sort_by(|a, b| a.name.cmp(&b.name));
        // Names that are short ones by themselves have the first claim on them.
        let mut taken: Vec<[u8; 11]> = sorted.iter().filter_map(|entry| exact(&entry.name)).collect();
        let mut bytes = Vec::new();
        for entry in sorted {
            let short = match exact(&entry.name) {
                Some(short) => short,
                None => {
                    let short = alias(&entry.name, &taken)?;
                    taken.push(short);
                    bytes.extend(long(&entry.name, &short));
                    short
                }
            };
            bytes.extend(match &entry.node {
                Node::File { cluster, size } => record(&short, FILE, *cluster, *size, time),
                Node::Directory(directory) => record(&short, DIRECTORY, directory.cluster, 0, time),
            });
        }
        // Linux takes no directory of more than 2 MiB, which others may not either.
        if bytes.len() > (2 << 20) - 64 {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "too many files in one directory of a FAT",
            ));
        }
        Ok(bytes)
    }
}

/// Whether a FAT can have a name.
fn check(name: &str) -> io::Result<()> {
    if name.is_empty() || name.encode_utf16().count() > 255 {
        return Err(invalid(name, "names on a FAT have 1 to 255 characters"));
    }
    let odd = |c: char| c.is_control() || matches!(c, '"' | '*' | '/' | ':' | '<' | '>' | '?' | '\\' | '|');
    if name.contains(odd) || name.ends_with(['.', ' ']) || name.starts_with(' ') {
        return Err(invalid(name, "no FAT has such a name"));
    }
    Ok(())
}

fn is_short(byte: u8) -> bool {
    byte.is_ascii_uppercase() || byte.is_ascii_digit() || b"!#$%&'()-@^_`{}~".contains(&byte)
}

/// The short form of a name that is nothing else: up to eight and three capital letters.
fn exact(name: &str) -> Option<[u8; 11]> {
    let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
    let fits = (1..=8).contains(&stem.len()) && extension.len() <= 3 && !name.ends_with('.');
    let plain = stem.bytes().chain(extension.bytes()).all(is_short);
    (fits && plain).then(|| padded(stem, extension))
}

fn padded(stem: &str, extension: &str) -> [u8; 11] {
    let mut short = [b' '; 11];
    short[..stem.len()].copy_from_slice(stem.as_bytes());
    short[8..8 + extension.len()].copy_from_slice(extension.as_bytes());
    short
}

/// A short name for a long one that nobody in the directory has: `LONGNA~1.TXT`.
fn alias(name: &str, taken: &[[u8; 11]]) -> io::Result<[u8; 11]> {
    let (stem, extension) = name.rsplit_once('.').filter(|(stem, _)| !stem.is_empty()).unwrap_or((name, ""));
    let plain = |text: &str, most: usize| -> String {
        let upper = text.chars().filter(|c| *c != '.' && *c != ' ').map(|c| c.to_ascii_uppercase());
        upper.map(|c| if u8::try_from(c).is_ok_and(is_short) { c } else { '_' }).take(most).collect()
    };
    let (stem, extension) = (plain(stem, 6), plain(extension, 3));
    (1..1_000_000u32)
        .map(|number| {
            let tail = format!("~{number}");
            let kept = stem.len().min(8 - tail.len());
            padded(&format!("{}{tail}", &stem[..kept]), &extension)
        })
        .find(|short| !taken.contains(short))
        .ok_or_else(|| invalid(name, "there are too many names like it"))
}

/// The sum of a short name, which its long one has: a program that changes the short one alone is found out.
pub(super) fn checksum(short: &[u8; 11]) -> u8 {
    short.iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte))
}

/// The entries for a long name, which end with its beginning.
fn long(name: &str, short: &[u8; 11]) -> Vec<u8> {
    let mut units: Vec<u16> = name.encode_utf16().collect();
    if !units.len().is_multiple_of(UNITS) {
        units.push(0);
        units.resize(units.len().next_multiple_of(UNITS), 0xFFFF);
    }
    let checksum = checksum(short);
    let last = units.len() / UNITS;
    let entries = (1..=last).rev().map(|number| {
        let mut entry = [0; 32];
        entry[0] = u8::try_from(number).unwrap_or(0) | if number == last { 0x40 } else { 0 };
        entry[11] = LONG;
        entry[13] = checksum;
        let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain((28..32).step_by(2));
        for (place, unit) in places.zip(&units[(number - 1) * UNITS..number * UNITS]) {
            entry[place..place + 2].copy_from_slice(&unit.to_le_bytes());
        }
        entry
    });
    entries.flatten().collect()
}

fn record(short: &[u8; 11], attributes: u8, cluster: u32, size: u32, when: Time) -> [u8; 32] {
    let mut entry = [0; 32];
    let (date, time) = time::encode(when);
    let [a, b, c, d] = cluster.to_le_bytes();
    entry[..11].copy_from_slice(short);
    entry[11] = attributes;
    for (offset, field) in [
        (14, time),
        (16, date),
        (18, date),
        (20, u16::from_le_bytes([c, d])),
        (22, time),
        (24, date),
        (26, u16::from_le_bytes([a, b])),
    ] {
        entry[offset..offset + 2].copy_from_slice(&field.to_le_bytes());
    }
    entry[28..].copy_from_slice(&size.to_le_bytes());
    entry
}

/// The entries of a directory for itself and for its parent (0: the root).
pub(super) fn dots(own: u32, parent: u32, time: Time) -> Vec<u8> {
    [record(b".          ", DIRECTORY, own, 0, time), record(b"..         ", DIRECTORY, parent, 0, time)]
        .concat()
}

/// The root's entry for the filesystem's label.
pub(super) fn label(label: &[u8; 11], time: Time) -> [u8; 32] {
    record(label, READ_ONLY_LABEL, 0, 0, time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names() {
        assert_eq!(exact("BOOTX64.EFI").as_ref(), Some(b"BOOTX64 EFI"));
        assert_eq!(exact("EFI").as_ref(), Some(b"EFI        "));
        for long in ["efi", "LONGERNAME", "A.B.C", ".A", "A.LONG", "Ä"] {
            assert_eq!(exact(long), None, "{long}");
        }
        let mut taken = Vec::new();
        for wanted in [b"INITRD~1IMG", b"INITRD~2IMG"] {
            let short = alias("initrd of a kernel.img", &taken).unwrap();
            assert_eq!(&short, wanted);
            taken.push(short);
        }
        taken.extend((3..10).map(|n| padded(&format!("INITRD~{n}"), "IMG")));
        assert_eq!(&alias("initrd of a kernel.img", &taken).unwrap(), b"INITR~10IMG");
        assert_eq!(&alias(".hidden", &[]).unwrap(), b"HIDDEN~1   ");
        assert_eq!(&alias("äö.tar.gz", &[]).unwrap(), b"__TAR~1 GZ ");
    }
}
