//! The lease: readers share, writers do not, holders are named, and nothing outlives its process.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use vbd_image::lease::{self, Lease, LeaseError, Mode, Options};

const WAIT: Duration = Duration::from_secs(10);

/// A directory with an image of 1 MiB in it.
fn image() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.img");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    (directory, path)
}

fn record(path: &Path) -> PathBuf {
    path.with_file_name(".vm.img.lease")
}

fn acquire(path: &Path, mode: Mode, options: Options) -> Result<Lease, LeaseError> {
    let file = File::options().read(true).write(mode == Mode::Write).open(path).unwrap();
    Lease::acquire(file.as_fd(), path, mode, options)
}

fn take(path: &Path, mode: Mode) -> Result<Lease, LeaseError> {
    acquire(path, mode, Options::default())
}

/// Not a test by itself: the tests start it as a process of its own that holds a lease until it is ended.
#[test]
fn a_process_that_holds() {
    let (Some(path), Ok(mode)) = (std::env::var_os("VBD_TEST_PATH"), std::env::var("VBD_TEST_MODE")) else {
        return;
    };
    let mode = if mode == "write" { Mode::Write } else { Mode::Read };
    let _lease = take(Path::new(&path), mode).unwrap();
    eprintln!("ready");
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// A child process that is ended and waited for, whatever happens.
struct Holder(Child);

impl Holder {
    fn start(command: &mut Command, ready: &str) -> Self {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut holder = Holder(child.spawn().unwrap());
        let lines = BufReader::new(holder.0.stderr.take().unwrap()).lines();
        let found = lines.map_while(Result::ok).any(|line| line.contains(ready));
        assert!(found, "{command:?} ended before it was ready");
        holder
    }

    fn vbd(path: &Path, mode: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "a_process_that_holds", "--nocapture"]);
        Self::start(command.env("VBD_TEST_PATH", path).env("VBD_TEST_MODE", mode), "ready")
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn in_use(result: Result<Lease, LeaseError>) -> (Vec<lease::Holder>, String) {
    let error = result.expect_err("the lease is held");
    let text = error.to_string();
    match error {
        LeaseError::InUse { holders, .. } => (holders, text),
        other => panic!("{other}"),
    }
}

#[test]
fn readers_share_and_writers_do_not() {
    let (_directory, path) = image();
    let reader = take(&path, Mode::Read).unwrap();
    let another = take(&path, Mode::Read).unwrap();
    in_use(take(&path, Mode::Write));
    drop(reader);
    in_use(take(&path, Mode::Write));
    drop(another);
    let writer = take(&path, Mode::Write).unwrap();
    in_use(take(&path, Mode::Write));
    in_use(take(&path, Mode::Read));
    drop(writer);
    assert_eq!(lease::holders(&path).unwrap(), []);
    take(&path, Mode::Write).unwrap();
    assert!(!record(&path).exists(), "the last one out removes the record");
}

#[test]
fn the_holder_is_named() {
    let (_directory, path) = image();
    let holder = Holder::vbd(&path, "write");
    let (holders, text) = in_use(take(&path, Mode::Write));
    assert_eq!(holders.len(), 1, "{holders:?}");
    let found = &holders[0];
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!((found.mode, found.pid), (Mode::Write, Some(holder.pid())));
    assert_eq!(found.host.as_deref(), Some(host.trim()));
    assert!(found.command.as_ref().unwrap().ends_with("--exact a_process_that_holds --nocapture"));
    assert!(found.since.is_some());
    let place = format!("(process {} on {}, writing since 20", holder.pid(), host.trim());
    assert!(text.contains(&place) && text.contains("vm.img"), "{text}");
    assert_eq!(lease::holders(&path).unwrap(), holders, "info tells the same");
}

#[test]
fn a_symbolic_link_leads_to_the_same_lease_and_record() {
    let (directory, path) = image();
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let _lease = take(&link, Mode::Write).unwrap();
    assert!(record(&path).exists());
    in_use(take(&path, Mode::Read));
}

#[test]
fn kill_9_leaves_no_lock() {
    let (_directory, path) = image();
    Holder::vbd(&path, "write").kill();
    assert!(record(&path).exists(), "nobody was left to remove it");
    assert_eq!(lease::holders(&path).unwrap(), [], "a record without a lock means nothing");
    let lease = acquire(&path, Mode::Write, Options { wait: WAIT, ..Options::default() }).unwrap();
    let holders: Vec<_> = lease::holders(&path).unwrap().iter().map(|holder| holder.pid).collect();
    assert_eq!(holders, [Some(std::process::id())], "the dead one's entry is gone");
    drop(lease);
    assert!(!record(&path).exists());
}

#[test]
fn one_that_waits_gets_it_when_the_holder_ends() {
    let (_directory, path) = image();
    let holder = Holder::vbd(&path, "read");
    std::thread::scope(|scope| {
        let waiting =
            scope.spawn(|| acquire(&path, Mode::Write, Options { wait: WAIT, ..Options::default() }));
        holder.kill();
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn override_shares_and_is_still_seen() {
    let (_directory, path) = image();
    let share = Options { override_: true, ..Options::default() };
    let first = acquire(&path, Mode::Write, share).unwrap();
    let second = acquire(&path, Mode::Write, share).unwrap();
    let third = acquire(&path, Mode::Read, share).unwrap();
    assert_eq!(lease::holders(&path).unwrap().len(), 3);
    in_use(take(&path, Mode::Write));
    in_use(take(&path, Mode::Read));
    drop((first, second));
    drop(take(&path, Mode::Read).unwrap());
    take(&path, Mode::Write).expect("a reader that shares is in nobody's way");
    drop(third);
}

#[test]
fn what_uses_the_same_description_keeps_the_lock_until_it_is_dropped() {
    let (_directory, path) = image();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let lease = Lease::acquire(file.as_fd(), &path, Mode::Write, Options::default()).unwrap();
    let duplicate = file.try_clone().unwrap();
    drop(file);
    in_use(take(&path, Mode::Read));
    drop(lease);
    take(&path, Mode::Write).unwrap();
    duplicate.write_all_at(b"x", 0).unwrap();
}

#[test]
fn a_directory_that_cannot_be_written_to_has_no_record() {
    let (directory, path) = image();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    // Root may write everywhere, so where the test runs as root another user is asked for, who may not be allowed to
    // look where this program is.
    let program = directory.path().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o555)).unwrap();
    let mut command = Command::new(&program);
    if rustix::process::geteuid().is_root() {
        command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
    }
    command.args(["--exact", "a_process_that_holds", "--nocapture"]);
    let holder = Holder::start(command.env("VBD_TEST_PATH", &path).env("VBD_TEST_MODE", "write"), "ready");
    assert!(!record(&path).exists());
    let (holders, _) = in_use(take(&path, Mode::Write));
    assert_eq!(holders[0].pid, Some(holder.pid()), "found in /proc instead");
    drop(holder);
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_foreign_file_in_the_place_of_the_record_is_left_alone() {
    let (directory, path) = image();
    let untouched = |contents: &str| {
        let lease = take(&path, Mode::Write).unwrap();
        in_use(take(&path, Mode::Read));
        drop(lease);
        assert_eq!(fs::read_to_string(record(&path)).unwrap(), contents);
    };
    fs::write(record(&path), "my notes").unwrap();
    untouched("my notes");

    fs::remove_file(record(&path)).unwrap();
    let target = directory.path().join("target");
    fs::write(&target, "").unwrap();
    std::os::unix::fs::symlink(&target, record(&path)).unwrap();
    untouched("");

    fs::remove_file(record(&path)).unwrap();
    fs::hard_link(&target, record(&path)).unwrap();
    untouched("");
}

#[test]
fn a_record_cut_off_by_a_crash_is_written_anew() {
    let (_directory, path) = image();
    fs::write(record(&path), [0; 100]).unwrap();
    let _lease = take(&path, Mode::Write).unwrap();
    assert!(fs::read_to_string(record(&path)).unwrap().starts_with("{\"holders\":[{"));
}

#[test]
fn a_lying_record_neither_locks_nor_steers_the_terminal() {
    let (_directory, path) = image();
    let lie = r#"{"holders":[{"pid":1,"start":0,"namespace":"","boot":"elsewhere","host":"\u001b[2Jmars",
        "command":"\u001b]0;x\u0007","since":"long","mode":"write"}]}"#;
    fs::write(record(&path), lie).unwrap();
    assert_eq!(lease::holders(&path).unwrap(), []);
    let _reader = take(&path, Mode::Read).unwrap();
    let (_, text) = in_use(take(&path, Mode::Write));
    assert!(text.contains("?[2Jmars") && !text.contains('\u{1b}'), "{text:?}");
}

#[test]
fn a_lock_of_the_whole_file_by_another_program_counts() {
    let (_directory, path) = image();
    let other = File::options().read(true).write(true).open(&path).unwrap();
    let mut lock: libc::flock = libc::flock { l_type: 1, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    assert_eq!(i32::from(lock.l_type), libc::F_WRLCK);
    let file = std::os::fd::AsRawFd::as_raw_fd(&other);
    // SAFETY: the descriptor is open and the kernel reads the structure during the call only.
    assert_eq!(unsafe { libc::fcntl(file, libc::F_OFD_SETLK, &raw mut lock) }, 0);
    let (holders, _) = in_use(take(&path, Mode::Read));
    assert_eq!(holders[0].pid, Some(std::process::id()));
    drop(other);
    take(&path, Mode::Read).unwrap();
}

#[test]
fn holders_of_what_is_no_disk() {
    let (directory, _) = image();
    let error = |path: &Path| lease::holders(path).unwrap_err().to_string();
    assert!(error(&directory.path().join("none")).contains("there is no such file"));
    assert!(error(directory.path()).contains("is a directory"));
}

/// QEMU's side, both ways.
mod qemu {
    use super::*;

    fn run(program: &str, arguments: &[&str]) -> (bool, String) {
        let output = Command::new(program).args(arguments).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    fn read(path: &Path) -> (bool, String) {
        let copy = path.with_file_name("copy");
        run("qemu-img", &["convert", "-f", "raw", "-O", "raw", text(path), text(&copy)])
    }

    fn write(path: &Path) -> (bool, String) {
        run("qemu-io", &["-f", "raw", "-c", "write 0 4k", text(path)])
    }

    fn text(path: &Path) -> &str {
        path.to_str().unwrap()
    }

    fn locked((success, text): (bool, String)) {
        assert!(!success && text.contains("lock"), "{success} {text}");
    }

    fn works((success, text): (bool, String)) {
        assert!(success, "{text}");
    }

    /// qemu-storage-daemon with the image exported over NBD, as a virtual machine has it open.
    fn daemon(path: &Path, writable: bool) -> Holder {
        let read_only = if writable { "off" } else { "on" };
        let writable = if writable { "on" } else { "off" };
        let socket = path.with_file_name("socket");
        let pidfile = path.with_file_name("pid");
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!(
                "driver=raw,node-name=disk,read-only={read_only},file.driver=file,file.filename={}",
                path.display()
            ))
            .arg("--nbd-server")
            .arg(format!("addr.type=unix,addr.path={}", socket.display()))
            .arg("--export")
            .arg(format!("type=nbd,id=export,node-name=disk,writable={writable}"))
            .arg("--pidfile")
            .arg(&pidfile);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let holder = Holder(child);
        // The daemon writes its pidfile after all exports are open.
        let deadline = std::time::Instant::now() + WAIT;
        while !pidfile.exists() {
            assert!(std::time::Instant::now() < deadline, "qemu-storage-daemon does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        holder
    }

    #[test]
    fn is_kept_out_by_our_writer() {
        let (_directory, path) = image();
        let lease = take(&path, Mode::Write).unwrap();
        locked(write(&path));
        locked(read(&path));
        locked(run("qemu-img", &["resize", "-f", "raw", text(&path), "2M"]));
        works(run("qemu-img", &["info", "-f", "raw", "-U", text(&path)]));
        works(run("qemu-io", &["-r", "-U", "-f", "raw", "-c", "read 0 4k", text(&path)]));
        drop(lease);
        works(write(&path));
    }

    #[test]
    fn reads_with_our_readers_and_does_not_write() {
        let (_directory, path) = image();
        let lease = take(&path, Mode::Read).unwrap();
        works(read(&path));
        locked(write(&path));
        drop(lease);
        works(write(&path));
    }

    #[test]
    fn its_writer_keeps_us_out_and_is_named() {
        let (_directory, path) = image();
        let daemon = daemon(&path, true);
        for mode in [Mode::Write, Mode::Read] {
            let (holders, text) = in_use(take(&path, mode));
            assert_eq!(holders.len(), 1, "{holders:?}");
            assert_eq!((holders[0].pid, holders[0].mode), (Some(daemon.pid()), Mode::Write));
            assert!(text.contains("qemu-storage"), "{text}");
        }
        let share = Options { override_: true, ..Options::default() };
        drop(acquire(&path, Mode::Read, share).unwrap());
        daemon.kill();
        acquire(&path, Mode::Write, Options { wait: WAIT, ..Options::default() }).unwrap();
    }

    #[test]
    fn its_readers_share_with_ours_and_keep_our_writer_out() {
        let (_directory, path) = image();
        let daemon = daemon(&path, false);
        take(&path, Mode::Read).unwrap();
        let (holders, _) = in_use(take(&path, Mode::Write));
        assert_eq!((holders[0].pid, holders[0].mode), (Some(daemon.pid()), Mode::Read));
    }
}
