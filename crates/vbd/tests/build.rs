//! `vbd build`: its report, its exit codes, and what a signal leaves. What is in an image is tested where it is made.

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{names, refused};

fn vbd(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vbd"));
    command.current_dir(directory).env_remove("TMPDIR").stdin(Stdio::null());
    command
}

fn build(directory: &Path, arguments: &[&str]) -> Output {
    vbd(directory).arg("build").args(arguments).output().unwrap()
}

/// A place with a small tree in it.
fn place() -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir_all(place.path().join("tree/etc")).unwrap();
    fs::write(place.path().join("tree/etc/motd"), b"hello\n").unwrap();
    place
}

const ARGUMENTS: [&str; 5] = ["disk", "--size", "16M", "--from", "tree"];

#[test]
fn the_report_is_for_people_or_programs() {
    let place = place();
    let built = build(place.path(), &[&ARGUMENTS[..], &["--label", "root", "--hostname", "vm1"]].concat());
    let said = String::from_utf8(built.stdout).unwrap();
    assert!(built.status.success() && built.stderr.is_empty(), "{}", String::from_utf8_lossy(&built.stderr));
    assert!(said.starts_with("disk: 16 MiB, ") && said.contains("\next4 \"root\" "), "{said}");
    assert!(said.contains("\n3 files with ") && said.contains("2 directories"), "{said}");

    let built = build(place.path(), &[&ARGUMENTS[..], &["--force", "--json"]].concat());
    let report: serde_json::Value = serde_json::from_slice(&built.stdout).unwrap();
    assert_eq!((&report["size"], &report["counts"]["files"]), (&(16 << 20).into(), &1.into()));
    assert_eq!(report["filesystem"], "ext4");
    assert_eq!(fs::metadata(place.path().join("disk")).unwrap().len(), 16 << 20);
    assert_eq!(names(place.path()), ["disk", "tree"]);
}

#[test]
fn a_whole_disk_is_reported_by_its_partitions() {
    let place = place();
    let call = ["--disk", "gpt", "--size", "64M", "--esp", "16M", "--swap", "1M", "--architecture", "arm64"];
    let built = build(place.path(), &[&call[..], &["--from", "tree", "disk"]].concat());
    let said = String::from_utf8(built.stdout).unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    assert!(said.contains("\npartition 1: 16 MiB EFI system, vfat, PARTUUID "), "{said}");
    assert!(said.contains("\npartition 3: ") && said.contains("Linux root (ARM-64), ext4"), "{said}");
    let warned = String::from_utf8_lossy(&built.stderr).into_owned();
    assert!(warned.contains("the tree has no kernel in /boot"), "{warned}");

    fs::write(
        place.path().join("layout.toml"),
        "table = \"mbr\"\n[[partition]]\nsize = \"4M\"\nfrom = \"tree\"\n",
    )
    .unwrap();
    let call =
        ["--disk-layout", "layout.toml", "--size", "64M", "--from", "tree", "disk", "--force", "--json"];
    let report: serde_json::Value = serde_json::from_slice(&build(place.path(), &call).stdout).unwrap();
    assert_eq!(
        (&report["partitions"][0]["size"], &report["partitions"][1]["type"]),
        (&(4 << 20).into(), &"Linux".into())
    );

    for call in [&["--esp", "16M"][..], &["--boot", "uefi"], &["--kernel-option", "x"], &["--disk", "apm"]] {
        let output = build(place.path(), &[&ARGUMENTS[..], &["--force"], call].concat());
        assert_eq!(output.status.code(), Some(2), "{call:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    fs::create_dir(place.path().join("tree/boot")).unwrap();
    fs::write(place.path().join("tree/boot/vmlinuz-1"), "kernel").unwrap();
    let built = build(
        place.path(),
        &[&ARGUMENTS[..], &["--force", "--boot", "xen", "--kernel-option", "quiet"]].concat(),
    );
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let bytes = fs::read(place.path().join("disk")).unwrap();
    let line = b"linux /boot/vmlinuz-1 root=/dev/xvda ro console=hvc0 quiet";
    assert!(bytes.windows(line.len()).any(|window| window == line));
}

#[test]
fn an_odd_size_keeps_its_tail() {
    let place = place();
    let built = build(place.path(), &["disk", "--size", "16777217", "--from", "tree"]);
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    assert_eq!(fs::metadata(place.path().join("disk")).unwrap().len(), (16 << 20) + 1);
}

#[test]
fn a_reproducible_image_is_the_same_file_as_small_as_it_can_be() {
    let place = place();
    let make = |name: &str, epoch: &str| {
        let mut command = vbd(place.path());
        command
            .env("SOURCE_DATE_EPOCH", epoch)
            .args(["build", name, "--size", "auto+10%", "--from", "tree", "--verify"]);
        command.output().unwrap()
    };
    for name in ["one", "two"] {
        let made = make(name, "1700000000");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    let files = ["one", "two"].map(|name| fs::read(place.path().join(name)).unwrap());
    assert!(files[0] == files[1] && files[0].len() < 8 << 20);
    refused(&make("three", "yesterday"), 2, &["SOURCE_DATE_EPOCH", "yesterday"]);
}

#[test]
fn refusals_have_their_exit_codes() {
    let place = place();
    let with = |more: &[&str]| build(place.path(), &[&ARGUMENTS[..], more].concat());
    fs::write(place.path().join("bad.toml"), "hostname = 'vm1'\nhostnam = 'vm2'\n").unwrap();
    refused(&with(&["--tailor", "bad.toml"]), 1, &["bad.toml", "line 2", "hostnam"]);
    refused(&with(&["--label", "far too long for a label"]), 2, &["at most 16 bytes"]);
    refused(&with(&["--fstab", "/dev/vda"]), 2, &["no mount point", "--fstab"]);
    refused(&with(&["--mkfs-arg", "-v"]), 2, &["no mke2fs makes ext4"]);
    refused(&with(&["--min-size", "1G"]), 2, &["go with --size auto"]);
    refused(&with(&["--journal", "1M"]), 2, &["from 4M to 40000M"]);
    refused(&with(&["--root-mode", "9"]), 2, &["755"]);
    refused(&with(&["--filesystem", "xfs"]), 2, &["none of ext2, ext3, ext4"]);
    refused(&with(&["--password-hash", "$6$x"]), 2, &["--user"]);
    refused(&with(&["--network", "dhcp-networkd"]), 1, &["the tree has no systemd-networkd"]);
    refused(&build(place.path(), &["disk", "--size", "0", "--from", "tree"]), 2, &["size"]);
    refused(
        &build(place.path(), &["disk", "--size", "16M", "--from", "-"]),
        1,
        &["standard input is truncated"],
    );
    refused(&build(place.path(), &["disk", "--size", "16M", "--from", "no"]), 1, &["no: cannot be read"]);
    assert_eq!(names(place.path()), ["bad.toml", "tree"]);
    assert!(with(&[]).status.success());
    refused(&with(&[]), 1, &["exists already", "--force"]);
}

/// In the place of mmdebstrap: notes its arguments, and has the tree of the place for a suite.
fn with_a_stand_in(place: &Path, script: &str) -> Command {
    use std::os::unix::fs::PermissionsExt;

    let program = place.join("bin/mmdebstrap");
    fs::create_dir_all(place.join("bin")).unwrap();
    fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", place.join("bin").display(), std::env::var("PATH").unwrap());
    let mut command = vbd(place);
    command.env("PATH", path).env("PLACE", place);
    command
}

#[test]
fn suites_of_both_distributions_are_installed_by_mmdebstrap() {
    let place = place();
    let record = "printf '%s\\n' \"$@\" >\"$PLACE/arguments\"; exec tar -C \"$PLACE/tree\" -cf - .";
    let install = |from: &str, more: &[&str]| {
        let mut command = with_a_stand_in(place.path(), record);
        command.args(["build", "disk", "--force", "--size", "16M", "--json", "--from", from]).args(more);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["counts"]["files"], 1, "the tree of the place");
        let text = fs::read_to_string(place.path().join("arguments")).unwrap();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let all = [
        "--components",
        "main,universe",
        "--packages",
        "vim,ssh",
        "--variant",
        "minbase",
        "--mirror",
        "http://m/u",
    ];
    for from in ["debian:trixie", "ubuntu:noble"] {
        let suite = from.split_once(':').unwrap().1;
        let plain =
            ["--format=tar", "--variant", "minbase", "--components", "main,universe", "--include", "vim,ssh"];
        assert_eq!(install(from, &all), [&plain[..], &["--", suite, "-", "http://m/u"]].concat());
        // The host's own archives, of that distribution alone; where it has none, mmdebstrap's.
        let arguments = install(from, &[]);
        let (plain, archives) = arguments.split_at(7);
        assert_eq!(plain, ["--format=tar", "--variant", "important", "--components", "main", "--", suite]);
        assert_eq!(archives[0], "-");
        let distribution = format!("/{}", from.split_once(':').unwrap().0);
        let of_it = |line: &String| {
            line.starts_with("deb ") && line.contains(&distribution) && line.ends_with(" main")
        };
        assert!(archives[1..].iter().all(of_it), "{archives:?}");
    }
}

#[test]
fn a_suite_that_is_not_to_be_had_leaves_nothing_and_says_why() {
    let place = place();
    let unsigned = "echo \"E: The repository 'http://u noble InRelease' is not signed.\" >&2; exit 25";
    for (script, texts) in [
        (unsigned, &["mmdebstrap failed", "is not signed", "ubuntu-keyring"][..]),
        ("echo 'E: no such suite' >&2; exit 1", &["mmdebstrap failed", "no such suite"]),
        // What came before it failed is no image.
        ("tar -C \"$PLACE/tree\" -cf - .; echo 'E: too late' >&2; exit 1", &["too late"]),
    ] {
        let mut command = with_a_stand_in(place.path(), script);
        let output =
            command.args(["build", "disk", "--size", "16M", "--from", "ubuntu:noble"]).output().unwrap();
        refused(&output, 1, texts);
        assert_eq!(names(place.path()), ["bin", "tree"]);
    }
}

#[test]
fn a_signal_ends_it_and_leaves_nothing() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let place = tempfile::tempdir().unwrap();
        let mut command = vbd(place.path());
        command
            .args(["build", "disk", "--size", "16M", "--from", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // The start of an archive whose rest never comes, and more than a pipe holds: when it is written, it was read.
        let mut archive = tar::Header::new_ustar();
        archive.set_path("file").unwrap();
        archive.set_size(1 << 30);
        archive.set_mode(0o644);
        archive.set_cksum();
        stdin.write_all(archive.as_bytes()).unwrap();
        stdin.write_all(&[1; 1 << 20]).unwrap();
        let pid = libc::pid_t::try_from(child.id()).unwrap();
        // SAFETY: the process is a child that was not waited for, so that the number is its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
        refused(&child.wait_with_output().unwrap(), 1, &["interrupted: nothing was left behind"]);
        assert_eq!(names(place.path()), [""; 0]);
        drop(stdin);
    }
}
