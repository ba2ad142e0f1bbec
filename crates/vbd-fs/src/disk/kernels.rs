//! Kernels in a tree, by the names that distributions give them.

use std::cmp::Ordering;

/// A kernel of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// Its version, or what stands in its place in the name.
    pub(crate) version: String,
    /// Its path in the tree.
    pub(crate) image: String,
    /// The path of its first filesystem, where there is one.
    pub(crate) initrd: Option<String>,
}

/// The kernels among the names in a tree's `/boot`, the newest first: `vmlinuz-VERSION`, with `initrd.img-VERSION`
/// (Debian), `initramfs-VERSION.img` (Fedora, Arch) or `initramfs-VERSION` (Alpine).
pub(crate) fn find<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Vec<Kernel> {
    let path = |name: &str| format!("/boot/{name}");
    let kernels = names.clone().filter_map(|name| {
        let version = name.strip_prefix("vmlinuz-").filter(|version| is_plain(version))?;
        let initrds = [
            format!("initrd.img-{version}"),
            format!("initramfs-{version}.img"),
            format!("initramfs-{version}"),
        ];
        let initrd = initrds.into_iter().find(|initrd| names.clone().any(|name| name == initrd));
        Some(Kernel {
            version: version.to_owned(),
            image: path(name),
            initrd: initrd.map(|name| path(&name)),
        })
    });
    let mut kernels: Vec<_> = kernels.collect();
    kernels.sort_by(|a, b| compare(&b.version, &a.version));
    kernels
}

/// Whether a name from a tree can go into a boot loader's files and onto a FAT as it is.
pub(crate) fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '+' | '~');
    !name.is_empty()
        && name.len() <= 200
        && name.chars().all(plain)
        && !name.starts_with('.')
        && !name.ends_with('.')
}

/// Versions in their order: runs of digits by their number, `~` before everything, the rest by its bytes.
pub(crate) fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        match (a.chars().next(), b.chars().next()) {
            (None, None) => return Ordering::Equal,
            (None, Some(next)) => return if next == '~' { Ordering::Greater } else { Ordering::Less },
            (Some(next), None) => return if next == '~' { Ordering::Less } else { Ordering::Greater },
            (Some(x), Some(y)) if x.is_ascii_digit() && y.is_ascii_digit() => {
                let ((x, rest_a), (y, rest_b)) = (number(a), number(b));
                // Without leading zeros the longer number is the larger one.
                let order = x.len().cmp(&y.len()).then_with(|| x.cmp(y));
                if order != Ordering::Equal {
                    return order;
                }
                (a, b) = (rest_a, rest_b);
            }
            (Some(x), Some(y)) if x == y => (a, b) = (&a[x.len_utf8()..], &b[y.len_utf8()..]),
            (Some('~'), _) => return Ordering::Less,
            (_, Some('~')) => return Ordering::Greater,
            (Some(x), Some(y)) => return x.cmp(&y),
        }
    }
}

/// The number that a text begins with, without leading zeros, and the rest.
fn number(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (text[..end].trim_start_matches('0'), &text[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_newest_first() {
        let names = [
            "config-6.1.0-9-amd64",
            "vmlinuz-6.1.0-9-amd64",
            "vmlinuz-6.1.0-32-amd64",
            "initrd.img-6.1.0-32-amd64",
            "vmlinuz-virt",
            "initramfs-virt",
            "vmlinuz-a b",
            "vmlinuz-",
        ];
        let found = find(names.into_iter());
        let listed: Vec<_> = found.iter().map(|k| (k.version.as_str(), k.initrd.as_deref())).collect();
        assert_eq!(
            listed,
            [
                ("virt", Some("/boot/initramfs-virt")),
                ("6.1.0-32-amd64", Some("/boot/initrd.img-6.1.0-32-amd64")),
                ("6.1.0-9-amd64", None),
            ]
        );
    }

    #[test]
    fn versions_in_their_order() {
        let sorted = ["6.1", "6.1.0~rc1", "6.1.0", "6.1.0-9", "6.1.0-32", "6.01.1", "6.12.0"];
        for pair in sorted.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
        }
        assert_eq!(compare("6.1", "6.01"), Ordering::Equal);
    }
}
