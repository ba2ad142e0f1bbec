//! `vbd create`: what it makes, and what it refuses without leaving anything behind.

mod common;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{names, refused};
use vbd_image::lease::{Lease, Mode, Options};

fn vbd() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vbd"))
}

fn create(directory: &Path, arguments: &[&str]) -> Output {
    vbd().arg("create").args(arguments).current_dir(directory).output().unwrap()
}

/// Expect success, and silence.
fn made(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!((output.stdout.len(), output.stderr.len()), (0, 0));
}

fn directory() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    (directory, path)
}

#[test]
fn a_sparse_file_of_any_size() {
    let (_guard, dir) = directory();
    for (size, bytes) in [
        ("2G", 2 << 30),
        ("2147484672", 2_147_484_672),
        ("1", 1),
        ("1.5TiB", 3 << 39),
        ("500MB", 500_000_000),
    ] {
        made(&create(&dir, &[size, "--size", size]));
        let metadata = dir.join(size).metadata().unwrap();
        assert_eq!((metadata.len(), metadata.blocks()), (bytes, 0), "{size}");
    }
}

#[test]
fn a_preallocated_file() {
    let (_guard, dir) = directory();
    made(&create(&dir, &["vm", "--size", "1049600", "--preallocate", "--format", "raw"]));
    let metadata = dir.join("vm").metadata().unwrap();
    assert_eq!(metadata.len(), 1_049_600);
    assert!(metadata.blocks() * 512 >= 1_049_600);
}

#[test]
fn sizes_that_are_none() {
    let (_guard, dir) = directory();
    for (size, text) in [
        ("0", "makes no disk"),
        ("-1", "\"-1\" is negative"),
        ("-2G", "\"-2G\" is negative"),
        ("9E", "\"9E\" is too large"),
        ("", "no size given"),
        ("2X", "is no unit"),
        ("two", "\"two\" is no size"),
    ] {
        refused(&create(&dir, &["vm", "--size", size]), 2, &[text]);
    }
    refused(&create(&dir, &["vm"]), 2, &["--size"]);
    refused(&create(&dir, &["vm", "--size", "2G", "--format", "floppy"]), 2, &["floppy"]);
    assert_eq!(names(&dir), [""; 0]);
}

#[test]
fn beyond_the_limit_of_the_filesystem() {
    let (_guard, dir) = directory();
    let too_large = create(&dir, &["vm", "--size", "7E"]);
    if rustix::fs::statfs(&dir).unwrap().f_type == 0xEF53 {
        refused(&too_large, 1, &["vm: 7 EiB is more than one file can hold here", "filesystem"]);
        assert_eq!(names(&dir), [""; 0]);
    } else {
        made(&too_large);
    }
}

#[test]
fn beyond_the_limit_of_the_process() {
    let (_guard, dir) = directory();
    let script = format!("ulimit -f 8; exec {} create vm --size 1M", env!("CARGO_BIN_EXE_vbd"));
    let output = Command::new("sh").args(["-c", &script]).current_dir(&dir).output().unwrap();
    refused(&output, 1, &["1 MiB is more than one file can hold here", "ulimit -f"]);
    assert_eq!(names(&dir), [""; 0]);
}

#[test]
fn no_room_to_preallocate() {
    let (_guard, dir) = directory();
    let stat = rustix::fs::statvfs(&dir).unwrap();
    let size = stat.f_bavail * stat.f_frsize + (64 << 30);
    let output = create(&dir, &["vm", "--preallocate", "--size", &size.to_string()]);
    refused(&output, 1, &["are to be preallocated", "are missing", "leave out --preallocate"]);
    assert_eq!(names(&dir), [""; 0]);
}

#[test]
fn an_existing_file_stays_without_force() {
    let (_guard, dir) = directory();
    fs::write(dir.join("vm"), "precious").unwrap();
    refused(&create(&dir, &["vm", "--size", "1M"]), 1, &["vm: exists already", "--force"]);
    assert_eq!(fs::read(dir.join("vm")).unwrap(), b"precious");

    fs::set_permissions(dir.join("vm"), fs::Permissions::from_mode(0o666)).unwrap();
    made(&create(&dir, &["vm", "--size", "1M", "--force"]));
    let metadata = dir.join("vm").metadata().unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o777), (1 << 20, 0o666));
    assert_eq!(names(&dir), ["vm"]);
}

#[test]
fn force_replaces_what_a_link_leads_to() {
    let (_guard, dir) = directory();
    fs::write(dir.join("real"), "precious").unwrap();
    symlink("real", dir.join("link")).unwrap();
    refused(&create(&dir, &["link", "--size", "1M"]), 1, &["link: exists already"]);
    made(&create(&dir, &["link", "--size", "1M", "--force"]));
    assert!(dir.join("link").is_symlink());
    assert_eq!(dir.join("real").metadata().unwrap().len(), 1 << 20);

    symlink("nothing", dir.join("dangling")).unwrap();
    for force in [&["--force"][..], &[]] {
        let output = create(&dir, &[&["dangling", "--size", "1M"], force].concat());
        refused(&output, 1, &["dangling: is a link to nothing"]);
    }
    assert_eq!(names(&dir), ["dangling", "link", "real"]);
}

#[test]
fn a_file_in_use_is_not_replaced() {
    let (_guard, dir) = directory();
    let path = dir.join("vm");
    fs::write(&path, "precious").unwrap();
    for mode in [Mode::Read, Mode::Write] {
        let file = File::open(&path).unwrap();
        let lease = Lease::acquire(file.as_fd(), &path, mode, Options::default()).unwrap();
        let process = format!("process {}", std::process::id());
        refused(
            &create(&dir, &["vm", "--size", "1M", "--force"]),
            1,
            &["in use by", &process, "not replaced"],
        );
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        drop(lease);
    }
    made(&create(&dir, &["vm", "--size", "1M", "--force"]));
}

#[test]
fn names_that_cannot_be_a_file() {
    let (_guard, dir) = directory();
    for force in [&["--force"][..], &[]] {
        let attempt = |name| create(&dir, &[&[name, "--size", "1M"], force].concat());
        refused(&attempt("."), 1, &["is a directory"]);
        refused(&attempt("/dev/null"), 1, &["/dev/null: is no regular file"]);
        refused(&attempt("none/vm"), 1, &["there is no directory none", "make it first"]);
    }
    assert_eq!(names(&dir), [""; 0]);
}

#[test]
fn a_directory_that_may_not_be_written_to() {
    let (_guard, dir) = directory();
    let program = dir.join("vbd");
    fs::copy(env!("CARGO_BIN_EXE_vbd"), &program).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o555)).unwrap();
    // Root may write everywhere, so where the test runs as root another user is asked for.
    let mut command = Command::new(&program);
    if rustix::process::geteuid().is_root() {
        command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
    }
    let output = command.args(["create", "vm", "--size", "1M"]).current_dir(&dir).output().unwrap();
    refused(&output, 1, &["vm: cannot make a file in its directory: Permission denied"]);
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
}
