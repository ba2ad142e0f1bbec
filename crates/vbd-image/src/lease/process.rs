//! Who a process is, and which processes hold a lock on a file, as /proc tells.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Holder, Mode, bytes};
use crate::clock::timestamp;

/// Clock ticks in a second as /proc shows them (`USER_HZ`), the same on every architecture that matters here.
const TICKS: u64 = 100;

/// This process and the place it runs in.
pub(super) struct Place {
    pub(super) host: String,
    pub(super) boot: String,
    /// The namespace that process numbers belong to.
    pub(super) namespace: String,
}

impl Place {
    pub(super) fn here() -> Self {
        let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        Place {
            host: line("/proc/sys/kernel/hostname"),
            boot: line("/proc/sys/kernel/random/boot_id"),
            namespace: namespace.to_string_lossy().into_owned(),
        }
    }
}

/// The command of this process, as it was called.
pub(super) fn own_command() -> String {
    let mut words = std::env::args_os();
    let name = words.next().unwrap_or_default();
    let name = Path::new(&name).file_name().unwrap_or_default().to_string_lossy().into_owned();
    words.fold(name, |command, word| format!("{command} {}", word.to_string_lossy()))
}

/// When a process started, in clock ticks since the host did: with its number, this names it for one boot.
/// `None` if there is no such process. Field 22 of /proc/PID/stat (proc(5)).
pub(super) fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in parentheses, which may itself contain parentheses and blanks.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The processes that hold a lock of the scheme on the file `device:inode`, as far as this user may look.
pub(super) fn lock_holders(device: u64, inode: u64) -> Vec<Holder> {
    let host = line("/proc/sys/kernel/hostname");
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let found = pids.filter_map(|pid| Some((pid, lock_of(pid, device, inode)?)));
    found
        .map(|(pid, mode)| Holder {
            mode,
            pid: Some(pid),
            command: Some(line(&format!("/proc/{pid}/comm"))).filter(|name| !name.is_empty()),
            host: Some(host.clone()),
            since: started(pid),
        })
        .collect()
}

/// The strongest lock that a process holds on the file.
fn lock_of(pid: u32, device: u64, inode: u64) -> Option<Mode> {
    let mut strongest = None;
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten() {
        let same = |file: fs::Metadata| file.dev() == device && file.ino() == inode;
        if !fs::metadata(entry.path()).is_ok_and(same) {
            continue;
        }
        let Some(number) = entry.file_name().to_str().map(str::to_owned) else { continue };
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).unwrap_or_default();
        strongest = strongest.max(info.lines().filter_map(lock_line).max());
    }
    strongest
}

/// Read a line of fdinfo such as `lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10010747 100 101` (proc(5)).
fn lock_line(line: &str) -> Option<Mode> {
    let mut words = line.strip_prefix("lock:")?.split_ascii_whitespace().skip(1);
    if !matches!(words.next()?, "OFDLCK" | "POSIX") {
        return None;
    }
    let exclusive = words.nth(1)? == "WRITE";
    let first = words.nth(2)?.parse().ok()?;
    let last = match words.next()? {
        "EOF" => i64::MAX,
        number => number.parse().ok()?,
    };
    bytes::meaning(exclusive, first, last)
}

/// When a process started, for people.
fn started(pid: u32) -> Option<String> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let boot: u64 = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    let since_boot = Duration::from_secs(start_ticks(pid)? / TICKS);
    let start: SystemTime = UNIX_EPOCH.checked_add(Duration::from_secs(boot))?.checked_add(since_boot)?;
    Some(timestamp(start))
}

/// The first line of a small file of /proc; empty if it cannot be read.
fn line(path: &str) -> String {
    let text = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_lines() {
        let line = |kind: &str, range: &str| lock_line(&format!("lock:\t1: {kind} -1 fe:00:10747 {range}"));
        assert_eq!(line("OFDLCK ADVISORY  READ", "100 101"), Some(Mode::Write));
        assert_eq!(line("OFDLCK ADVISORY  READ", "100 100"), Some(Mode::Read));
        assert_eq!(line("OFDLCK ADVISORY  READ", "203 203"), Some(Mode::Read));
        assert_eq!(line("POSIX  ADVISORY  WRITE", "0 EOF"), Some(Mode::Write));
        assert_eq!(line("POSIX  ADVISORY  READ", "0 EOF"), Some(Mode::Read));
        assert_eq!(line("OFDLCK ADVISORY  READ", "0 50"), None, "not a byte of the scheme");
        assert_eq!(line("FLOCK  ADVISORY  WRITE", "0 EOF"), None, "flock is another scheme");
        for broken in ["", "lock:", "lock:\t1: OFDLCK", "pos:\t0", "lock:\t1: OFDLCK ADVISORY READ -1 x y z"]
        {
            assert_eq!(lock_line(broken), None, "{broken}");
        }
    }
}
