//! `/etc/fstab` from the devices named, as fstab(5) has it.

use crate::Filesystem;

use super::Mount;

/// The whole file. `filesystem` is the root's where its type is not named.
pub(super) fn text(mounts: &[Mount], filesystem: Filesystem) -> String {
    let mut text = String::from("# device\tmount point\ttype\toptions\tdump\tpass\n");
    for mount in mounts {
        let Some(point) = &mount.point else {
            text.push_str(&format!("{}\tnone\tswap\tsw\t0\t0\n", mount.device));
            continue;
        };
        let kind = mount.kind.as_deref().unwrap_or(if point == "/" { filesystem.name() } else { "auto" });
        let ext = kind.starts_with("ext");
        let options = match &mount.options {
            Some(options) => options,
            None if point == "/" && ext => "errors=remount-ro",
            None => "defaults",
        };
        let pass = match point.as_str() {
            "/" => 1,
            _ if ext => 2,
            _ => 0,
        };
        text.push_str(&format!("{}\t{point}\t{kind}\t{options}\t0\t{pass}\n", mount.device));
    }
    text
}

/// The text with a line for a file that is swapped to, unless it has one for that path.
pub(super) fn with_swap_file(text: &str, path: &str) -> String {
    if text.lines().any(|line| line.split_whitespace().next() == Some(path)) {
        return text.to_owned();
    }
    let end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    format!("{text}{end}{path}\tnone\tswap\tsw\t0\t0\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swap_file_has_one_line() {
        let once = with_swap_file("LABEL=x / ext4", "/swapfile");
        assert_eq!(once, "LABEL=x / ext4\n/swapfile\tnone\tswap\tsw\t0\t0\n");
        assert_eq!(with_swap_file(&once, "/swapfile"), once);
        assert_eq!(with_swap_file("#/swapfile\n", "/swapfile").lines().count(), 2);
    }

    #[test]
    fn the_root_is_checked_first() {
        let mounts = ["/dev/vda:/", "/dev/vdb:/srv:ext4", "/dev/vdc:swap", "LABEL=x:/x:xfs:ro"];
        let mounts: Vec<Mount> = mounts.iter().map(|m| m.parse().unwrap()).collect();
        let text = text(&mounts, Filesystem::Ext3);
        let lines: Vec<&str> = text.lines().skip(1).collect();
        assert_eq!(
            lines,
            [
                "/dev/vda\t/\text3\terrors=remount-ro\t0\t1",
                "/dev/vdb\t/srv\text4\tdefaults\t0\t2",
                "/dev/vdc\tnone\tswap\tsw\t0\t0",
                "LABEL=x\t/x\txfs\tro\t0\t0",
            ]
        );
    }
}
