//! The tests of find(1), those that make sense for a disk.

use std::cmp::Ordering;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::time::{SystemTime, UNIX_EPOCH};

use vbd_ext4::read::{self, FileType, Filesystem, Inode, Links, Timestamp};
use vbd_fs::inside::Found;
use vbd_fs::inside::walk::sorted;

use super::shown::letter;

const DAY: i64 = 86_400;

/// A number, with what it is compared by: more, less or just that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Number {
    order: Ordering,
    value: u64,
}

impl Number {
    fn parse(text: &str) -> Option<Number> {
        let (order, digits) = match text.as_bytes().first()? {
            b'+' => (Ordering::Greater, &text[1..]),
            b'-' => (Ordering::Less, &text[1..]),
            _ => (Ordering::Equal, text),
        };
        let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        Some(Number { order, value: digits.parse().ok().filter(|_| plain)? })
    }

    fn fits(self, value: u64) -> bool {
        value.cmp(&self.value) == self.order
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Permissions {
    Exactly,
    All,
    Any,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    Name(Vec<u8>),
    NameWithoutCase(Vec<u8>),
    Path(Vec<u8>),
    Kinds(Vec<char>),
    /// In units of so many bytes, rounded up.
    Size(Number, u64),
    Mode(Permissions, u16),
    Uid(Number),
    Gid(Number),
    Links(Number),
    Inode(Number),
    /// Whole days since the last change.
    Changed(Number),
    /// A path of the disk.
    Newer(Vec<u8>),
    Empty,
}

/// What is looked for, as it was said.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Expression {
    /// Each with whether it is turned round.
    tests: Vec<(bool, Test)>,
    min_depth: usize,
    max_depth: Option<usize>,
    zero: bool,
}

impl Expression {
    /// From the words behind the disk. Errors: the text for the user.
    pub(super) fn parse(words: &[OsString]) -> Result<Expression, String> {
        let mut expression = Expression::default();
        let mut words = words.iter();
        let mut inverted = false;
        while let Some(word) = words.next() {
            let key = word.to_string_lossy();
            // Both spellings, for those who write options with two dashes.
            let key = key.strip_prefix('-').map_or(&*key, |key| key.trim_start_matches('-'));
            let mut value = || words.next().ok_or_else(|| format!("-{key} wants a value"));
            let number = |value: &OsString| {
                let text = value.to_string_lossy();
                Number::parse(&text).ok_or_else(|| format!("-{key} {text}: is no number"))
            };
            let depth = |value: &OsString| {
                let text = value.to_string_lossy();
                text.parse::<usize>().map_err(|_| format!("-{key} {text}: is no depth"))
            };
            let test = match key {
                "!" | "not" => {
                    inverted = !inverted;
                    continue;
                }
                "a" | "and" | "print" => continue,
                "print0" => {
                    expression.zero = true;
                    continue;
                }
                "mindepth" => {
                    expression.min_depth = depth(value()?)?;
                    continue;
                }
                "maxdepth" => {
                    expression.max_depth = Some(depth(value()?)?);
                    continue;
                }
                "name" => Test::Name(value()?.as_bytes().to_vec()),
                "iname" => Test::NameWithoutCase(value()?.as_bytes().to_ascii_lowercase()),
                "path" | "wholename" => Test::Path(value()?.as_bytes().to_vec()),
                "type" => kinds(&value()?.to_string_lossy())?,
                "size" => size(&value()?.to_string_lossy())?,
                "perm" => permissions(&value()?.to_string_lossy())?,
                "uid" => Test::Uid(number(value()?)?),
                "gid" => Test::Gid(number(value()?)?),
                "links" => Test::Links(number(value()?)?),
                "inum" => Test::Inode(number(value()?)?),
                "mtime" => Test::Changed(number(value()?)?),
                "newer" => Test::Newer(value()?.as_bytes().to_vec()),
                "empty" => Test::Empty,
                _ => return Err(format!("{}: is no test that is known; see --help", word.display())),
            };
            expression.tests.push((std::mem::take(&mut inverted), test));
        }
        if inverted { Err("there is nothing behind the last `!`".to_owned()) } else { Ok(expression) }
    }

    /// With what has to be looked up before.
    pub(super) fn ready<'a>(&'a self, filesystem: &'a Filesystem) -> read::Result<Tests<'a>> {
        let mut newer = Vec::new();
        for (_, test) in &self.tests {
            if let Test::Newer(path) = test {
                newer.push((&path[..], filesystem.lookup(path, Links::Follow)?.attributes().mtime));
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Ok(Tests { expression: self, filesystem, newer, now: i64::try_from(now).unwrap_or(i64::MAX) })
    }
}

fn kinds(text: &str) -> Result<Test, String> {
    let letters: Vec<char> = text.split(',').filter_map(|part| part.chars().next()).collect();
    let known = letters.iter().all(|letter| "fdlcbps".contains(*letter));
    if known && !letters.is_empty() && text.split(',').all(|part| part.len() == 1) {
        return Ok(Test::Kinds(letters));
    }
    Err(format!("-type {text}: is none of f, d, l, c, b, p, s"))
}

fn size(text: &str) -> Result<Test, String> {
    let units = [('c', 1), ('k', 1 << 10), ('M', 1 << 20), ('G', 1 << 30), ('b', 512), ('w', 2)];
    let found = text.chars().last().and_then(|last| units.iter().find(|(unit, _)| *unit == last));
    let (number, unit) = match found {
        Some((unit, bytes)) => (text.strip_suffix(*unit).unwrap_or(text), *bytes),
        None => (text, 512),
    };
    let number =
        Number::parse(number).ok_or_else(|| format!("-size {text}: is no size; write for example +10M"))?;
    Ok(Test::Size(number, unit))
}

fn permissions(text: &str) -> Result<Test, String> {
    let (how, digits) = match text.as_bytes().first() {
        Some(b'-') => (Permissions::All, &text[1..]),
        Some(b'/') => (Permissions::Any, &text[1..]),
        _ => (Permissions::Exactly, text),
    };
    let bits = u16::from_str_radix(digits, 8).ok().filter(|bits| *bits <= 0o7777 && !digits.starts_with('+'));
    let bits = bits.ok_or_else(|| format!("-perm {text}: is no mode in octal digits"))?;
    Ok(Test::Mode(how, bits))
}

/// What is looked for, ready to be asked.
pub(super) struct Tests<'a> {
    expression: &'a Expression,
    filesystem: &'a Filesystem,
    newer: Vec<(&'a [u8], Timestamp)>,
    now: i64,
}

impl Tests<'_> {
    /// No entries further down than this.
    pub(super) fn max_depth(&self) -> usize {
        self.expression.max_depth.unwrap_or(usize::MAX)
    }

    /// Whether names end in a zero byte instead of a line's end.
    pub(super) fn zero(&self) -> bool {
        self.expression.zero
    }

    /// Whether all tests hold of an entry.
    pub(super) fn hold(&self, path: &[u8], name: &[u8], found: &Found) -> read::Result<bool> {
        if found.depth < self.expression.min_depth || found.depth > self.max_depth() {
            return Ok(false);
        }
        for (inverted, test) in &self.expression.tests {
            if self.holds(test, path, name, &found.inode)? == *inverted {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn holds(&self, test: &Test, path: &[u8], name: &[u8], inode: &Inode) -> read::Result<bool> {
        let attributes = inode.attributes();
        Ok(match test {
            Test::Name(pattern) => matches(pattern, name),
            Test::NameWithoutCase(pattern) => matches(pattern, &name.to_ascii_lowercase()),
            Test::Path(pattern) => matches(pattern, path),
            Test::Kinds(letters) => {
                let own =
                    if inode.file_type() == FileType::Regular { 'f' } else { letter(inode.file_type()) };
                letters.contains(&own)
            }
            Test::Size(number, unit) => number.fits(inode.size().div_ceil(*unit)),
            Test::Mode(Permissions::Exactly, bits) => attributes.mode == *bits,
            Test::Mode(Permissions::All, bits) => attributes.mode & bits == *bits,
            Test::Mode(Permissions::Any, bits) => *bits == 0 || attributes.mode & bits != 0,
            Test::Uid(number) => number.fits(attributes.uid.into()),
            Test::Gid(number) => number.fits(attributes.gid.into()),
            Test::Links(number) => number.fits(inode.links().into()),
            Test::Inode(number) => number.fits(inode.number().into()),
            Test::Changed(number) => {
                // What changes in the future is of today.
                let age = self.now.saturating_sub(attributes.mtime.seconds).max(0) / DAY;
                number.fits(u64::try_from(age).unwrap_or(0))
            }
            Test::Newer(path) => {
                let other = self.newer.iter().find(|(known, _)| known == path);
                other.is_some_and(|(_, time)| attributes.mtime > *time)
            }
            Test::Empty => match inode.file_type() {
                FileType::Regular => inode.size() == 0,
                FileType::Directory => sorted(self.filesystem, inode)?.is_empty(),
                _ => false,
            },
        })
    }
}

/// A pattern as fnmatch(3) has them without flags: `*`, `?`, `[a-z]`, `[!a-z]`, and a backslash before what stands for
/// itself. Goes back to the latest star alone, so a hostile pattern costs no more than the square of the length.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star = None;
    loop {
        if pattern.get(p) == Some(&b'*') {
            p += 1;
            star = Some((p, t));
            continue;
        }
        let step = match (pattern.get(p), text.get(t)) {
            (None, None) => return true,
            (Some(_), Some(byte)) => one(&pattern[p..], *byte),
            _ => None,
        };
        if let Some(length) = step {
            (p, t) = (p + length, t + 1);
        } else if let Some((after, at)) = star.filter(|(_, at)| *at < text.len()) {
            star = Some((after, at + 1));
            (p, t) = (after, at + 1);
        } else {
            return false;
        }
    }
}

/// How much of a pattern stands for this byte, if it does.
fn one(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern {
        [b'?', ..] => Some(1),
        [b'\\', escaped, ..] => (*escaped == byte).then_some(2),
        [b'[', rest @ ..] => match set(rest, byte) {
            Some((true, length)) => Some(length + 1),
            Some((false, _)) => None,
            // Without an end it is no set.
            None => (byte == b'[').then_some(1),
        },
        [own, ..] => (*own == byte).then_some(1),
        [] => None,
    }
}

/// Whether a byte is in the set that begins behind `[`, and how long that is with its end.
fn set(pattern: &[u8], byte: u8) -> Option<(bool, usize)> {
    let inverted = matches!(pattern.first(), Some(b'!' | b'^'));
    let first = usize::from(inverted);
    let mut at = first;
    let mut found = false;
    loop {
        let low = *pattern.get(at)?;
        if low == b']' && at > first {
            return Some((found != inverted, at + 1));
        }
        match (pattern.get(at + 1), pattern.get(at + 2)) {
            (Some(b'-'), Some(high)) if *high != b']' => {
                found |= (low..=*high).contains(&byte);
                at += 3;
            }
            _ => {
                found |= low == byte;
                at += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Expression, String> {
        Expression::parse(&words.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn words_become_tests() {
        let found = parse("-name *.conf ! -type d,l --size +10M -perm /6000 -maxdepth 3 -print0").unwrap();
        let more = Number { order: Ordering::Greater, value: 10 };
        let expected = [
            (false, Test::Name(b"*.conf".to_vec())),
            (true, Test::Kinds(vec!['d', 'l'])),
            (false, Test::Size(more, 1 << 20)),
            (false, Test::Mode(Permissions::Any, 0o6000)),
        ];
        assert_eq!(found.tests, expected);
        assert_eq!((found.max_depth, found.zero), (Some(3), true));
        for (words, text) in [
            ("-name", "-name wants a value"),
            ("-type x", "-type x: is none of"),
            ("-type ff", "-type ff: is none of"),
            ("-size M", "is no size"),
            ("-size ++1", "is no size"),
            ("-perm 8", "octal"),
            ("-perm 17777", "octal"),
            ("-links one", "is no number"),
            ("-exec rm", "-exec: is no test"),
            ("-empty !", "nothing behind"),
            ("-maxdepth -1", "is no depth"),
        ] {
            let error = parse(words).unwrap_err();
            assert!(error.contains(text), "{words}: {error}");
        }
    }

    #[test]
    fn patterns() {
        for (pattern, text) in [
            ("", ""),
            ("*", ""),
            ("*", "a/b"),
            ("a*b*c", "aXbXXbc"),
            ("[a-c]?", "b/"),
            ("[!a-c]", "d"),
            ("[]x]", "]"),
            ("[a-]", "-"),
            ("\\*", "*"),
            ("[", "["),
            ("*.conf", "ä.conf"),
        ] {
            assert!(matches(pattern.as_bytes(), text.as_bytes()), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("", "a"),
            ("a", ""),
            ("?", ""),
            ("[!a]", "a"),
            ("[a-c]", "d"),
            ("\\*", "x"),
            ("a*b", "a"),
            ("[ab", "a"),
        ] {
            assert!(!matches(pattern.as_bytes(), text.as_bytes()), "{pattern} {text}");
        }
        assert!(!matches(&b"*a".repeat(50), &b"a".repeat(49)));
        assert!(!matches(&[&b"*a".repeat(40)[..], b"b"].concat(), &b"a".repeat(4000)));
    }
}
