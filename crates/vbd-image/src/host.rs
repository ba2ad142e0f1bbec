//! What the host itself does with a file: mounted, attached to a loop device, a block device in use.
//!
//! A mounted filesystem that somebody else writes to is destroyed, and the kernel takes no lock that would tell: it is
//! found in /sys/block, /proc/self/mountinfo and /proc/swaps. Mounts in other mount namespaces are not seen there, but a
//! loop device is one for all, and a block device in use refuses to be opened with `O_EXCL`.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A use of a file by the host.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, thiserror::Error)]
#[error(
    "{} is {}: writing to it meanwhile destroys what is on it; {} first", .path.display(), self.facts(), self.remedy()
)]
pub struct InUse {
    /// The file or block device.
    pub path: PathBuf,
    /// The loop devices that it is attached to.
    pub loops: Vec<PathBuf>,
    /// Where it, a loop device on it, or a partition of one of them is mounted.
    pub mounts: Vec<PathBuf>,
    /// What else uses it: swap, logical volumes and the like, by their devices.
    pub users: Vec<String>,
}

impl InUse {
    /// What the use is: "attached to /dev/loop0 and mounted on /mnt".
    pub fn facts(&self) -> String {
        let names = |paths: &[PathBuf]| {
            paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
        };
        let mut facts = Vec::new();
        if !self.loops.is_empty() {
            facts.push(format!("attached to {}", names(&self.loops)));
        }
        if !self.mounts.is_empty() {
            facts.push(format!("mounted on {}", names(&self.mounts)));
        }
        facts.extend(self.users.iter().map(|user| format!("used by {user}")));
        facts.join(" and ")
    }

    /// What ends the use.
    fn remedy(&self) -> String {
        let unmount = self.mounts.iter().map(|mount| format!("`umount {}`", mount.display()));
        let detach = self.loops.iter().map(|device| format!("`losetup -d {}`", device.display()));
        let commands: Vec<_> = unmount.chain(detach).collect();
        if commands.is_empty() { "end that".to_owned() } else { format!("run {}", commands.join(" and ")) }
    }
}

/// Whether the host uses the file or block device; `Ok(None)`: it does not, as far as can be seen.
pub fn usage(file: &File, path: &Path) -> io::Result<Option<InUse>> {
    let metadata = file.metadata()?;
    let mounts = Mounts::read()?;
    let mut used = InUse { path: path.to_owned(), loops: vec![], mounts: vec![], users: vec![] };
    if metadata.file_type().is_block_device() {
        look_at_device(metadata.rdev(), &mounts, &mut used);
    } else {
        used.loops = loops_on(metadata.dev(), metadata.ino());
        for device in &used.loops.clone() {
            if let Ok(metadata) = device.metadata() {
                look_at_device(metadata.rdev(), &mounts, &mut used);
            }
        }
        // Without a loop device: erofs on a file, or a FUSE filesystem that names its file.
        if let Ok(path) = path.canonicalize() {
            used.mounts.extend(mounts.of_source(&path));
        }
    }
    used.mounts.sort();
    used.mounts.dedup();
    let free = used.loops.is_empty() && used.mounts.is_empty() && used.users.is_empty();
    Ok((!free).then_some(used))
}

/// What is in the way of a block device that was busy (`EBUSY`) when opened with `O_EXCL`.
pub fn busy_device(path: &Path) -> InUse {
    let found = || usage(&File::open(path).ok()?, path).ok()?;
    found().unwrap_or_else(|| InUse {
        path: path.to_owned(),
        loops: vec![],
        mounts: vec![],
        users: vec!["another program, or a mount that cannot be seen from here".to_owned()],
    })
}

/// Collect the mounts and other users of a block device and its partitions.
fn look_at_device(device: u64, mounts: &Mounts, used: &mut InUse) {
    let sys = PathBuf::from(format!("/sys/dev/block/{}", Device(device)));
    let Ok(sys) = sys.canonicalize() else { return };
    let partitions = fs::read_dir(&sys).into_iter().flatten().flatten().map(|entry| entry.path());
    for directory in
        std::iter::once(sys.clone()).chain(partitions.filter(|path| path.join("partition").exists()))
    {
        let Some(name) = directory.file_name() else { continue };
        let node = Path::new("/dev").join(name);
        let number = fs::read_to_string(directory.join("dev")).unwrap_or_default();
        used.mounts.extend(mounts.of_device(number.trim(), &node));
        if swaps().contains(&node) {
            used.users.push(format!("swap on {}", node.display()));
        }
        for holder in fs::read_dir(directory.join("holders")).into_iter().flatten().flatten() {
            used.users.push(format!("/dev/{}", holder.file_name().display()));
        }
    }
}

/// The loop devices whose backing file is `device:inode`.
fn loops_on(device: u64, inode: u64) -> Vec<PathBuf> {
    let blocks = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let attached = blocks.filter(|block| {
        let Ok(mut backing) = fs::read(block.path().join("loop/backing_file")) else { return false };
        backing.pop_if(|byte| *byte == b'\n');
        let same = |file: fs::Metadata| file.dev() == device && file.ino() == inode;
        fs::metadata(OsStr::from_bytes(&backing)).is_ok_and(same)
    });
    let mut found: Vec<_> = attached.map(|block| Path::new("/dev").join(block.file_name())).collect();
    found.sort();
    found
}

/// The devices and files in use for swap (/proc/swaps).
fn swaps() -> Vec<PathBuf> {
    let text = fs::read("/proc/swaps").unwrap_or_default();
    let lines = text.split(|byte| *byte == b'\n').skip(1);
    lines.filter_map(|line| Some(unescape(line.split(|byte| *byte == b' ').next()?))).collect()
}

/// A device number as /sys writes it: `major:minor`.
struct Device(u64);

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", rustix::fs::major(self.0), rustix::fs::minor(self.0))
    }
}

/// A mount that this process sees (proc(5), mountinfo).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// `major:minor` of the filesystem.
    device: String,
    /// Where it is mounted.
    pub(crate) point: PathBuf,
    /// The type of the filesystem.
    pub(crate) kind: String,
    /// What is mounted: a device for most.
    source: PathBuf,
}

impl Mount {
    /// Read a line such as `36 35 98:0 /root /mnt rw,noatime master:1 - ext3 /dev/sda1 rw`.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut words = line.split(|byte| *byte == b' ');
        let text = |word: &[u8]| String::from_utf8_lossy(word).into_owned();
        let device = text(words.nth(2)?);
        let point = unescape(words.nth(1)?);
        let mut rest = words.skip_while(|word| *word != b"-").skip(1);
        Some(Mount { device, point, kind: text(rest.next()?), source: unescape(rest.next()?) })
    }
}

/// All mounts that this process sees.
pub(crate) struct Mounts(Vec<Mount>);

impl Mounts {
    pub(crate) fn read() -> io::Result<Self> {
        let text = fs::read("/proc/self/mountinfo")?;
        Ok(Mounts(text.split(|byte| *byte == b'\n').filter_map(Mount::parse).collect()))
    }

    /// Where a device is mounted. The source is compared too: Btrfs shows a device number of its own.
    fn of_device(&self, number: &str, node: &Path) -> impl Iterator<Item = PathBuf> {
        self.0
            .iter()
            .filter(move |mount| mount.device == number || mount.source == node)
            .map(|m| m.point.clone())
    }

    fn of_source(&self, path: &Path) -> impl Iterator<Item = PathBuf> {
        self.0.iter().filter(move |mount| mount.source == path).map(|mount| mount.point.clone())
    }

    /// The mount that `path` (canonical) is on: the last of those with the longest name.
    pub(crate) fn containing(&self, path: &Path) -> Option<&Mount> {
        let above = self.0.iter().filter(|mount| path.starts_with(&mount.point));
        above.max_by_key(|mount| mount.point.as_os_str().len())
    }
}

/// Undo the octal escapes (`\040`) of /proc.
fn unescape(word: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, tail @ ..] = rest {
        let octal = (*first == b'\\').then(|| tail.get(..3)).flatten();
        let octal = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        plain.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(std::ffi::OsString::from_vec(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_lines() {
        let line =
            br"36 35 7:3 /sub /mnt/a\040b rw,noatime master:1 shared:2 - ext4 /dev/loop3 rw,errors=continue";
        let mount = Mount::parse(line).unwrap();
        assert_eq!(mount.device, "7:3");
        assert_eq!(mount.point, Path::new("/mnt/a b"));
        assert_eq!(mount.kind, "ext4");
        assert_eq!(mount.source, Path::new("/dev/loop3"));
        assert_eq!(Mount::parse(b"36 35 7:3 / /mnt rw - ext4"), None);
        assert_eq!(Mount::parse(b""), None);
        assert_eq!(unescape(br"a\134b\xyz\04"), Path::new(r"a\b\xyz\04"));
    }

    #[test]
    fn sentences_name_the_remedy() {
        let used = InUse {
            path: "/x/vm".into(),
            loops: vec!["/dev/loop1".into()],
            mounts: vec!["/mnt".into()],
            users: vec![],
        };
        assert_eq!(
            used.to_string(),
            "/x/vm is attached to /dev/loop1 and mounted on /mnt: writing to it meanwhile destroys what is on it; \
             run `umount /mnt` and `losetup -d /dev/loop1` first"
        );
    }
}
