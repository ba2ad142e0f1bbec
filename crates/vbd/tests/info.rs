//! `vbd info`: what it tells of good files and of bad ones.

mod common;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output};

use common::refused;
use serde_json::Value;
use vbd_image::lease::{Lease, Mode, Options};

/// Programs of the system's administrator are not on every user's path.
fn path_of_programs() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

fn run(program: &str, arguments: &[&str], directory: &Path) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(directory).env("PATH", path_of_programs());
    command.output().unwrap()
}

fn info(directory: &Path, arguments: &[&str]) -> Output {
    run(env!("CARGO_BIN_EXE_vbd"), &[&["info"], arguments].concat(), directory)
}

fn text(directory: &Path, name: &str) -> String {
    let output = info(directory, &[name]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(directory: &Path, name: &str) -> Value {
    serde_json::from_slice(&info(directory, &["--json", name]).stdout).unwrap()
}

/// A file of 2 GiB and 1 KiB with an ext4 in it.
fn disk(directory: &Path) {
    File::create(directory.join("vm1disk")).unwrap().set_len(2_147_484_672).unwrap();
    let made = run("mke2fs", &["-q", "-t", "ext4", "-L", "root", "vm1disk"], directory);
    assert!(made.status.success(), "mke2fs of e2fsprogs");
}

#[test]
fn a_disk_with_a_filesystem() {
    let directory = tempfile::tempdir().unwrap();
    disk(directory.path());
    let text = text(directory.path(), "vm1disk");
    for expected in [
        "file          vm1disk\n",
        "virtual size  2 GiB (2147484672 bytes)\n",
        "filesystem    ext4 \"root\", UUID ",
        " free, clean\n",
        "stored on     ",
        "direct I/O    ",
        "in use by     nobody\n",
    ] {
        assert!(text.contains(expected), "{expected:?} is not in: {text}");
    }

    let json = json(directory.path(), "vm1disk");
    let number = |name: &str| json[name].as_u64().unwrap();
    assert_eq!(number("virtual_size"), 2_147_484_672);
    assert_eq!(number("data") + number("holes") + number("preallocated"), 2_147_484_672);
    assert!(number("data") > 0 && number("allocated") < 200 << 20);
    assert_eq!(json["filesystem"]["type"], "ext4");
    assert_eq!(json["filesystem"]["label"], "root");
    assert_eq!(json["filesystem"]["clean"], true);
    assert_eq!(json["filesystem"]["size"], 2_147_483_648u64);
    assert!(json["host_filesystem"]["type"].is_string());
    assert_eq!(json["holders"], Value::Array(vec![]));
}

#[test]
fn a_partitioned_disk() {
    let directory = tempfile::tempdir().unwrap();
    let file = File::create(directory.path().join("disk")).unwrap();
    file.set_len(1 << 20).unwrap();
    // One entry: Linux, from sector 8 on, 2048 sectors, which is more than the disk has.
    let entry = [0, 0, 0, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 0, 8, 0, 0];
    file.write_all_at(&entry, 446).unwrap();
    file.write_all_at(b"\x55\xaa", 510).unwrap();
    let text = text(directory.path(), "disk");
    assert!(text.contains("partitions    MBR\n"), "{text}");
    assert!(text.contains("1: 1 MiB at 4096, Linux, ends beyond the disk\n"), "{text}");
    assert_eq!(json(directory.path(), "disk")["table"]["partitions"][0]["size"], 1 << 20);
}

#[test]
fn who_uses_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let file = File::open(&path).unwrap();
    let lease = Lease::acquire(file.as_fd(), &path, Mode::Write, Options::default()).unwrap();
    let holder = format!("(process {}", std::process::id());
    let told = text(directory.path(), "vm");
    assert!(
        told.contains("in use by     \"") && told.contains(&holder) && told.contains(", writing"),
        "{told}"
    );
    let json = json(directory.path(), "vm");
    assert_eq!(json["holders"][0]["pid"], std::process::id());
    assert_eq!(json["holders"][0]["mode"], "write");
    drop(lease);
    assert!(text(directory.path(), "vm").contains("nobody"));
}

#[test]
fn an_empty_file() {
    let directory = tempfile::tempdir().unwrap();
    File::create(directory.path().join("empty")).unwrap();
    assert!(text(directory.path(), "empty").contains("empty: not a disk yet"));
}

#[test]
fn what_cannot_be_a_disk() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    run("mkfifo", &["fifo"], path);
    refused(&info(path, &["missing"]), 1, &["missing: there is no such file"]);
    refused(&info(path, &["."]), 1, &["is a directory; a disk is"]);
    refused(&info(path, &["fifo"]), 1, &["is a FIFO"]);
    refused(&info(path, &["/dev/null"]), 1, &["is a character device"]);
    refused(&info(path, &[]), 2, &["<FILE>"]);
}

#[test]
fn an_unreadable_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(path.join("vm"), "secret").unwrap();
    fs::set_permissions(path.join("vm"), fs::Permissions::from_mode(0o200)).unwrap();
    // Root may read everything, so where the test runs as root another user is asked for.
    fs::copy(env!("CARGO_BIN_EXE_vbd"), path.join("vbd")).unwrap();
    let output = if rustix::process::geteuid().is_root() {
        let arguments = ["--reuid=65534", "--regid=65534", "--clear-groups", "./vbd", "info", "vm"];
        run("setpriv", &arguments, path)
    } else {
        info(path, &["vm"])
    };
    refused(&output, 1, &["vm: not allowed to read it"]);
}
