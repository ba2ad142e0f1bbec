//! UUIDs that change, and the text files that name them. An old and a new one are as long, so a file stays as long, too.

/// Old names, in lower case, and what takes their place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Names(Vec<(String, String)>);

/// Files in a tree that name filesystems and partitions.
pub(super) const FILES: [&str; 12] = [
    "/etc/fstab",
    "/etc/crypttab",
    "/etc/kernel/cmdline",
    "/etc/default/grub",
    "/etc/initramfs-tools/conf.d/resume",
    "/boot/grub/grub.cfg",
    "/boot/grub/menu.lst",
    "/boot/grub2/grub.cfg",
    "/grub/grub.cfg",
    "/grub/menu.lst",
    "/boot/efi/EFI/debian/grub.cfg",
    "/boot/extlinux/extlinux.conf",
];
/// Directories of such files whose names end with `.conf`.
pub(super) const DIRECTORIES: [&str; 4] =
    ["/boot/loader/entries", "/loader/entries", "/efi/loader/entries", "/boot/efi/loader/entries"];

impl Names {
    /// From now on this name is that one; both are as long.
    pub(super) fn add(&mut self, old: &str, new: &str) {
        if old.len() == new.len() && !old.is_empty() {
            self.0.push((old.to_ascii_lowercase(), new.to_ascii_lowercase()));
        }
    }

    /// The bytes with new names in place of the old ones; nothing where none is in them.
    pub(super) fn replace(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut new = bytes.to_vec();
        let mut changed = false;
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            let found = self.0.iter().find(|(old, _)| {
                rest.get(..old.len()).is_some_and(|start| start.eq_ignore_ascii_case(old.as_bytes()))
                    // A part of something longer is something else.
                    && !rest.get(old.len()).is_some_and(u8::is_ascii_alphanumeric)
                    && (at == 0 || !bytes[at - 1].is_ascii_alphanumeric())
            });
            match found {
                Some((old, name)) => {
                    new[at..at + old.len()].copy_from_slice(name.as_bytes());
                    changed = true;
                    at += old.len();
                }
                None => at += 1,
            }
        }
        changed.then_some(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_names_alone_in_any_case() {
        let mut names = Names::default();
        names.add("0a1b-2c", "ffff-00");
        names.add("short", "longer");
        names.add("1234abcd-01", "99999999-01");
        let replaced = names.replace(b"UUID=0A1B-2c / x0a1b-2c 0a1b-2cd PARTUUID=1234abcd-01").unwrap();
        assert_eq!(replaced, b"UUID=ffff-00 / x0a1b-2c 0a1b-2cd PARTUUID=99999999-01");
        assert_eq!(names.replace(b"short 0a1b"), None);
        assert_eq!(names.replace(b""), None);
    }
}
