//! Whether storage may still read a page of memory after it has answered.
//!
//! A network's retransmission can: what it sends then is in the page by that time. A page that a domain granted is its own
//! again after the answer, so for such storage the data is copied first. xl's `direct-io-safe` says that this storage
//! does not.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Filesystems on devices of this host, by the magic number that statfs(2) gives (linux/magic.h).
const LOCAL: [i64; 8] = [
    0xEF53,      // ext2, ext3, ext4
    0x5846_5342, // xfs
    0x9123_683E, // btrfs
    0xF2F5_2010, // f2fs
    0x0102_1994, // tmpfs
    0x2FC1_2FC1, // zfs
    0xCA45_1A4E, // bcachefs
    0x4D44,      // vfat
];
/// How deep device-mapper devices may be stacked.
const DEEPEST: usize = 8;

/// Whether pages are done with when the storage of this file or block device has answered, as far as can be told.
pub(super) fn is_local(path: &Path) -> bool {
    looked_at(path).unwrap_or(false)
}

fn looked_at(path: &Path) -> io::Result<bool> {
    let about = fs::metadata(path)?;
    let device = if about.file_type().is_block_device() {
        about.rdev()
    } else {
        // A read-only descriptor of the file itself: an automounted path may lead elsewhere by now.
        let magic = rustix::fs::fstatfs(File::open(path)?)?.f_type;
        if !LOCAL.contains(&magic) {
            return Ok(false);
        }
        about.dev()
    };
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    if major == 0 {
        // No device of its own: memory, or a filesystem over several (btrfs, zfs).
        return Ok(true);
    }
    Ok(device_is_local(&fs::canonicalize(format!("/sys/dev/block/{major}:{minor}"))?, 0))
}

/// Whether a device of /sys is this host's, and all that it is made of.
fn device_is_local(sys: &Path, depth: usize) -> bool {
    if depth > DEEPEST || over_network(sys) {
        return false;
    }
    // A partition is below its disk; that has the slaves.
    let slaves = sys.join("slaves");
    let below: Vec<PathBuf> = fs::read_dir(&slaves)
        .map(|entries| entries.flatten().filter_map(|entry| fs::canonicalize(entry.path()).ok()).collect())
        .unwrap_or_default();
    below.iter().all(|device| device_is_local(device, depth + 1))
}

/// Whether the device's place in /sys is one behind a network.
fn over_network(sys: &Path) -> bool {
    let mut names = sys.iter().filter_map(|name| name.to_str());
    if names.any(|name| {
        let numbered = |prefix: &str| {
            name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        };
        // nbd0, rbd0, drbd0; session1 of iSCSI; a loop device's own file may be anywhere.
        ["nbd", "rbd", "drbd", "session", "loop", "aoe"].into_iter().any(numbered)
            || name.starts_with("etherd!")
    }) {
        return true;
    }
    // An NVMe namespace is below its controller, which knows its transport.
    let controllers = sys.ancestors().take(4).map(|dir| dir.join("transport"));
    controllers.filter_map(|file| fs::read_to_string(file).ok()).any(|transport| transport.trim() == "tcp")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_behind_a_network_is_seen_by_its_place() {
        let local = [
            "/sys/devices/pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:0/block/sda/sda1",
            "/sys/devices/virtual/block/dm-0",
            "/sys/devices/pci0000:00/0000:00:01.1/0000:01:00.0/nvme/nvme0/nvme0n1",
        ];
        let remote = [
            "/sys/devices/virtual/block/nbd0",
            "/sys/devices/platform/host6/session1/target6:0:0/6:0:0:1/block/sdb",
            "/sys/devices/virtual/block/drbd3",
            "/sys/devices/virtual/block/loop2",
        ];
        assert_eq!(local.map(|path| over_network(Path::new(path))), [false; 3]);
        assert_eq!(remote.map(|path| over_network(Path::new(path))), [true; 4]);
    }

    #[test]
    fn devices_over_others_are_what_those_are() {
        let sys = tempfile::tempdir().unwrap();
        let (upper, disk) = (sys.path().join("dm-0"), sys.path().join("sda"));
        fs::create_dir_all(upper.join("slaves")).unwrap();
        fs::create_dir_all(&disk).unwrap();
        std::os::unix::fs::symlink(&disk, upper.join("slaves/sda")).unwrap();
        assert!(device_is_local(&upper, 0));
        let remote = sys.path().join("nbd7");
        fs::create_dir_all(&remote).unwrap();
        std::os::unix::fs::symlink(&remote, upper.join("slaves/nbd7")).unwrap();
        assert!(!device_is_local(&upper, 0));
    }

    #[test]
    fn memory_is_local_and_proc_is_not() {
        if Path::new("/dev/shm").is_dir() {
            let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
            assert!(is_local(file.path()));
        }
        assert!(!is_local(Path::new("/proc/self/status")));
        assert!(!is_local(Path::new("/nowhere")));
    }
}
