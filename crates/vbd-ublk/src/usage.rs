//! Whether somebody uses a block device for good: mounted, swap, or below another device.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Whether a device of this name (`ublkb0`), or a partition of it, is mounted, is swap, or is part of another device.
/// Mounts in other mount namespaces are not seen. Opens nothing, so that nobody is disturbed.
pub(crate) fn is_used(name: &str) -> bool {
    let dir = Path::new("/sys/block").join(name);
    let partitions = fs::read_dir(&dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let partitions = partitions.filter(|path| path.join("partition").exists());
    let devices: Vec<_> = partitions.chain([dir.clone()]).collect();
    let held = |path: &Path| fs::read_dir(path.join("holders")).is_ok_and(|mut dir| dir.next().is_some());
    if devices.iter().any(|path| held(path)) {
        return true;
    }
    let numbers: Vec<_> =
        devices.iter().filter_map(|path| fs::read_to_string(path.join("dev")).ok()).collect();
    let numbers: Vec<_> = numbers.iter().map(|number| number.trim()).collect();
    let names: Vec<_> = devices.iter().filter_map(|path| path.file_name()).collect();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    is_mounted(&mounts, &numbers) || is_swap(&swaps, |name| names.iter().any(|known| *known == name))
}

/// Whether one of the devices (`MAJOR:MINOR`) is in /proc/self/mountinfo.
fn is_mounted(mounts: &str, numbers: &[&str]) -> bool {
    mounts.lines().any(|line| line.split(' ').nth(2).is_some_and(|number| numbers.contains(&number)))
}

/// Whether one of the devices is in /proc/swaps.
fn is_swap(swaps: &str, is_ours: impl Fn(&str) -> bool) -> bool {
    let paths = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    paths.filter_map(|path| path.strip_prefix("/dev/")).any(is_ours)
}

/// Takes a block device for ourselves, as a mount would.
///
/// # Errors
/// EBUSY where somebody has it.
pub(crate) fn claim(path: &Path) -> io::Result<OwnedFd> {
    fs::File::options().read(true).custom_flags(libc::O_EXCL).open(path).map(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_and_swap_are_found_by_their_device() {
        let mounts =
            "22 1 259:1 / /mnt rw,noatime - ext4 /dev/ublkb0p1 rw\n23 1 0:5 / /dev rw - devtmpfs dev rw\n";
        assert!(is_mounted(mounts, &["259:0", "259:1"]));
        assert!(!is_mounted(mounts, &["259:2", "22"]));
        let swaps = "Filename Type Size Used Priority\n/dev/ublkb1 partition 1024 0 -2\n";
        assert!(is_swap(swaps, |name| name == "ublkb1"));
        assert!(!is_swap(swaps, |name| name == "ublkb0"));
    }

    #[test]
    fn what_is_not_there_is_not_used() {
        assert!(!is_used("ublkb4294967295"));
    }
}
