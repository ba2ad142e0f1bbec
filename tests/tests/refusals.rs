//! What vbd refuses to serve, and how it says so: the file by its name, the reason, what to do; nothing lost.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use vbd_tests::{Attach, Finished, Scratch, command, run, run_ok};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// Tries to serve `file` and gives how that ended.
fn attach(scratch: &Scratch, file: &Path, options: &[&str]) -> Result<Finished> {
    let nbd = format!("unix:{}", scratch.socket("refused.sock").display());
    let arguments = ["attach", &file.to_string_lossy(), "--nbd", &nbd].map(str::to_owned);
    scratch.vbd(arguments.into_iter().chain(options.iter().map(|option| (*option).to_owned())))
}

/// Checks that it failed (exit code 1) with a message that has each of `words` in it.
#[track_caller]
fn assert_refused(finished: &Finished, words: &[&str]) {
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    for word in words {
        assert!(finished.stderr.contains(word), "{word:?} is missing in: {}", finished.stderr);
    }
    assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
}

#[test]
fn a_file_that_is_missing_empty_or_no_file() -> Result<()> {
    let scratch = Scratch::new()?;
    let missing = scratch.path("missing");
    assert_refused(&attach(&scratch, &missing, &[])?, &["missing"]);
    assert!(!missing.exists(), "nothing was made in its place");
    let empty = scratch.sparse("empty", 0)?;
    assert_refused(&attach(&scratch, &empty, &[])?, &["empty"]);
    assert_refused(&attach(&scratch, &scratch.path(""), &[])?, &["directory"]);
    let dangling = scratch.path("dangling");
    symlink("nowhere", &dangling)?;
    assert_refused(&attach(&scratch, &dangling, &[])?, &["dangling"]);
    Ok(())
}

#[test]
fn a_file_that_this_user_may_not_read_or_write() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.sparse("closed", MIB)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o000))?;
    if fs::File::open(&file).is_ok() {
        // Root may read anything: without that capability it may not.
        let vbd = vbd_tests::vbd().to_string_lossy().into_owned();
        let (file, nbd) =
            (file.to_string_lossy().into_owned(), format!("unix:{}", scratch.socket("s").display()));
        let less = ["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"];
        let words = less.iter().copied().chain([vbd.as_str(), "attach", &file, "--nbd", &nbd]);
        assert_refused(&run("setpriv", words, LIMIT)?, &["closed", "ermission"]);
    } else {
        assert_refused(&attach(&scratch, &file, &[])?, &["closed", "ermission"]);
    }
    Ok(())
}

#[test]
fn a_file_whose_size_is_no_multiple_of_a_sector_is_served_with_its_tail() -> Result<()> {
    let scratch = Scratch::new()?;
    // dd's classic: bs=1k seek=2048k count=1, and a file that ends within a sector.
    for (name, size) in [("dd", 2_147_484_672), ("odd", MIB + 100)] {
        let file = scratch.sparse(name, size)?;
        let bytes = fs::File::options().read(true).write(true).open(&file)?;
        bytes.write_all_at(b"tail", size - 4)?;
        let socket = scratch.socket(format!("{name}.sock"));
        let server = Attach::new(&scratch, &file).nbd(&socket).start()?;
        let code = format!(
            "assert h.get_size() == {}\nassert h.pread(4, {at}) == b'tail'\nh.pwrite(b'TAIL', {at})\nh.flush()",
            size.next_multiple_of(512),
            at = size - 4
        );
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        run_ok("/usr/bin/python3", ["-m", "nbd", "-u", &uri, "-c", &code], LIMIT)?;
        assert!(server.stop()?.success());
        let mut tail = [0; 4];
        bytes.read_exact_at(&mut tail, size - 4)?;
        assert_eq!(&tail, b"TAIL");
        // A write to its last sector makes a file that ends within one whole, as QEMU's does.
        assert!([size, size.next_multiple_of(512)].contains(&bytes.metadata()?.len()));
    }
    Ok(())
}

#[test]
fn a_second_writer_is_told_who_the_first_is() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.sparse("disk", MIB)?;
    let first = Attach::new(&scratch, &file).nbd(&scratch.socket("first.sock")).start()?;
    assert_refused(&attach(&scratch, &file, &[])?, &["disk", &first.id().to_string()]);
    assert_refused(&attach(&scratch, &file, &["--read-only"])?, &[&first.id().to_string()]);
    // A kill leaves no lock behind.
    first.kill();
    let second = Attach::new(&scratch, &file).nbd(&scratch.socket("second.sock")).start()?;
    assert!(second.stop()?.success());
    Ok(())
}

#[test]
fn readers_share_a_file() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.sparse("disk", MIB)?;
    let reader = |name| {
        Attach::new(&scratch, &file)
            .nbd(&scratch.socket(name))
            .option("--read-only")
            .option("--name")
            .option(name)
    };
    let (first, second) = (reader("first").start()?, reader("second").start()?);
    assert_refused(&attach(&scratch, &file, &[])?, &["disk"]);
    assert!(first.stop()?.success() && second.stop()?.success());
    Ok(())
}

#[test]
fn qemu_and_vbd_exclude_each_other_both_ways() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.sparse("disk", MIB)?;
    let path = file.to_string_lossy();
    let write = ["-f", "raw", "-c", "write 0 512", &path];

    let server = Attach::new(&scratch, &file).nbd(&scratch.socket("disk.sock")).start()?;
    let refused = run("qemu-io", write, LIMIT)?;
    assert!(!refused.status.success() && refused.stderr.contains("lock"), "{}", refused.stderr);
    assert!(server.stop()?.success());
    run_ok("qemu-io", write, LIMIT)?;

    let mut qemu = command("qemu-io");
    qemu.args(["-f", "raw", &path]);
    let mut qemu = vbd_tests::Process::spawn(qemu)?;
    qemu.send("write 0 512\n")?;
    qemu.stdout.wait_for("wrote 512/512", LIMIT)?;
    assert_refused(&attach(&scratch, &file, &[])?, &["disk", &qemu.id().to_string()]);
    qemu.kill();
    assert!(Attach::new(&scratch, &file).nbd(&scratch.socket("disk.sock")).start()?.stop()?.success());
    Ok(())
}

#[test]
fn a_socket_that_is_alive_is_refused_and_a_dead_one_replaced() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.sparse("disk", MIB)?;
    let socket: PathBuf = scratch.socket("refused.sock");
    let listener = UnixListener::bind(&socket)?;
    assert_refused(&attach(&scratch, &file, &[])?, &["refused.sock"]);
    assert!(socket.exists(), "the other's socket is still there");
    drop(listener);
    let server = Attach::new(&scratch, &file).nbd(&socket).start()?;
    assert!(server.stop()?.success());
    assert!(!socket.exists(), "a clean stop takes its sockets away");
    // What is no socket is nobody's to replace.
    fs::write(&socket, "precious")?;
    assert_refused(&attach(&scratch, &file, &[])?, &["refused.sock"]);
    assert_eq!(fs::read(&socket)?, b"precious");
    Ok(())
}

#[test]
fn a_mounted_file_is_refused() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.sparse("disk", 16 * MIB)?;
    let path = file.to_string_lossy().into_owned();
    run_ok("/sbin/mke2fs", ["-q", "-t", "ext4", &path], LIMIT)?;
    let Ok(device) = run_ok("losetup", ["--find", "--show", &path], LIMIT) else {
        eprintln!("skipped: this user, or this container, has no loop devices");
        return Ok(());
    };
    let mounted = scratch.path("mounted");
    fs::create_dir(&mounted)?;
    let mount = run_ok("mount", [device.trim(), &mounted.to_string_lossy()], LIMIT);
    let refused = attach(&scratch, &file, &[]);
    if mount.is_ok() {
        run_ok("umount", [&mounted], LIMIT)?;
    }
    run_ok("losetup", ["--detach", device.trim()], LIMIT)?;
    mount?;
    assert_refused(&refused?, &["disk", "mounted"]);
    Ok(())
}

#[test]
fn a_configuration_error_has_its_line_and_column() -> Result<()> {
    let scratch = Scratch::new()?;
    let file = scratch.path("vm.toml");
    for (text, place, word) in [
        ("[[disk]]\npath = \"disk\"\nquues = 4\n", "3:1", "quues"),
        ("[[disk]]\npath = \"disk\"\nqueues = 0\n", "3:10", "queues"),
        ("[[disk]\n", "1:", "vm.toml"),
    ] {
        fs::write(&file, text)?;
        let finished = scratch.vbd(["up".as_ref(), file.as_os_str()])?;
        assert_refused(&finished, &[&format!("vm.toml:{place}"), word]);
    }
    Ok(())
}

#[test]
fn a_wrong_call_ends_with_2() -> Result<()> {
    let scratch = Scratch::new()?;
    let wrong: [&[&str]; 4] = [&[], &["atach"], &["attach"], &["create", "disk", "--size", "many"]];
    for arguments in wrong {
        let finished = scratch.vbd(arguments)?;
        assert_eq!(finished.status.code(), Some(2), "{arguments:?}: {finished:?}");
    }
    Ok(())
}
