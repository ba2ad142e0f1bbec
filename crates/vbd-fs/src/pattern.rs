//! Patterns for paths, as a shell has them.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A set of patterns for paths relative to a root.
#[derive(Debug, Clone, Default)]
pub(crate) struct Patterns(Vec<Vec<u8>>);

impl Patterns {
    /// A leading or a trailing slash means nothing: patterns always start at the root.
    pub(crate) fn new<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Patterns {
        Patterns(patterns.into_iter().map(|p| p.trim_matches('/').as_bytes().to_vec()).collect())
    }

    /// Whether there are any.
    pub(crate) fn any(&self) -> bool {
        !self.0.is_empty()
    }

    /// Whether one of them is the whole of `path`.
    pub(crate) fn matches(&self, path: &Path) -> bool {
        self.0.iter().any(|pattern| matches(pattern, path.as_os_str().as_bytes()))
    }
}

/// `?` is one character and `*` any number of them, but neither is a slash; `**` is any number, slashes included.
///
/// Goes back to the latest star alone (and to the latest double star beyond that), so a hostile pattern costs no more
/// than the square of the length.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    let mut double: Option<(usize, usize)> = None;
    loop {
        if pattern[p..].starts_with(b"**") {
            p += 2;
            double = Some((p, t));
            star = None;
            continue;
        }
        match pattern.get(p) {
            Some(b'*') => {
                p += 1;
                star = Some((p, t));
                continue;
            }
            None if t == text.len() => return true,
            Some(&c) if t < text.len() && (c == text[t] || c == b'?' && text[t] != b'/') => {
                (p, t) = (p + 1, t + 1);
                continue;
            }
            _ => {}
        }
        if let Some((after, at)) = star
            && at < text.len()
            && text[at] != b'/'
        {
            star = Some((after, at + 1));
            (p, t) = (after, at + 1);
        } else if let Some((after, at)) = double
            && at < text.len()
        {
            double = Some((after, at + 1));
            star = None;
            (p, t) = (after, at + 1);
        } else {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stop_at_slashes_unless_doubled() {
        let yes = [
            ("a", "a"),
            ("a/*", "a/b"),
            ("*/b*", "a/bcd"),
            ("**/x", "a/b/x"),
            ("a/**", "a/b/c"),
            ("a?c", "abc"),
        ];
        let no = [
            ("a", "ab"),
            ("a/*", "a/b/c"),
            ("*", "a/b"),
            ("a?c", "a/c"),
            ("**/x", "a/xy"),
            ("", "a"),
            ("*/x", "x"),
        ];
        for (pattern, path) in yes {
            assert!(Patterns::new([pattern]).matches(Path::new(path)), "{pattern} {path}");
        }
        for (pattern, path) in no {
            assert!(!Patterns::new([pattern]).matches(Path::new(path)), "{pattern} {path}");
        }
        assert!(Patterns::new(["/var/cache/"]).matches(Path::new("var/cache")));
        assert!(matches(&b"*a".repeat(40), &b"a".repeat(4000)));
        assert!(!matches(&[&b"*a".repeat(40)[..], b"b"].concat(), &b"a".repeat(4000)));
    }
}
