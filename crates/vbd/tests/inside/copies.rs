//! `vbd cp` out of a disk and `vbd tar`: nothing is lost on the way.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Stdio;

use crate::common::{names, refused};
use crate::support::{command, describe, disk, is_root, ok, run, same, tree, vbd};

fn prepared() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    tree(&directory.path().join("tree"));
    disk(directory.path(), "tree", "disk", &[]);
    directory
}

#[test]
fn a_copy_of_everything_is_the_tree() {
    let directory = prepared();
    let path = directory.path();
    let (mut expected, copied) = (describe(&path.join("tree")), || describe(&path.join("out")));
    ok(&["cp", "disk:/", "out"], path);
    same(&expected, &copied());
    // Once more over what is there. A directory that was there keeps its own attributes, and its time is of now.
    ok(&["cp", "disk:/", "out"], path);
    let mut again = copied();
    for lines in [&mut expected, &mut again] {
        lines.remove("etc");
    }
    same(&expected, &again);
    let sparse = fs::metadata(path.join("out/sparse")).unwrap();
    assert!(sparse.blocks() * 512 < 500_000, "the holes were filled: {} blocks", sparse.blocks());
}

#[test]
fn places_of_copies() {
    let directory = prepared();
    let path = directory.path();
    fs::create_dir(path.join("there")).unwrap();
    // Into a directory by its name, elsewhere as the name that is said.
    ok(&["cp", "disk:/etc/deep", "disk:/link", "there"], path);
    ok(&["cp", "disk:/etc/hostname", "name"], path);
    ok(&["cp", "-L", "disk:/link", "followed"], path);
    assert_eq!(names(&path.join("there")), ["deep", "link"]);
    assert!(path.join("there/link").is_symlink() && path.join("there/deep/er/data").is_file());
    assert_eq!(fs::read_to_string(path.join("name")).unwrap(), "vm1\n");
    assert!(!path.join("followed").is_symlink());
    // What is in the way is replaced, and a link is not followed.
    std::os::unix::fs::symlink("name", path.join("alias")).unwrap();
    ok(&["cp", "disk:/etc/nothing", "alias"], path);
    assert!(!path.join("alias").is_symlink());
    assert_eq!(fs::read_to_string(path.join("name")).unwrap(), "vm1\n");

    refused(
        &vbd(&["cp", "disk:/etc", "name"], path),
        1,
        &["name: there is something that is no directory", "1 entries were not copied"],
    );
    fs::create_dir_all(path.join("there/hostname")).unwrap();
    refused(
        &vbd(&["cp", "disk:/etc/hostname", "there"], path),
        1,
        &["there/hostname", "there is a directory of that name"],
    );
    refused(&vbd(&["cp", "disk:/etc", "disk:/empty", "new"], path), 1, &["new: is no directory"]);
    refused(&vbd(&["cp", "name", "disk:/etc", "there"], path), 2, &["name: is no place in a disk"]);
    refused(&vbd(&["cp", "disk:/etc", "not/there"], path), 1, &["cannot open not: No such file"]);
    refused(
        &vbd(&["cp", "disk:/gone", "x"], path),
        1,
        &["disk:/gone: there is no such file or directory in the image"],
    );
    assert!(!path.join("x").exists());
}

/// Runs vbd as a user who is not root; needs root to become one.
fn as_user(arguments: &[&str], directory: &Path) -> std::process::Output {
    fs::copy(env!("CARGO_BIN_EXE_vbd"), directory.join("vbd")).unwrap();
    fs::set_permissions(directory, fs::Permissions::from_mode(0o777)).unwrap();
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups", "./vbd"];
    command("setpriv", &[&user[..], arguments].concat(), directory).output().unwrap()
}

#[test]
fn an_ordinary_user_gets_what_he_may_have() {
    if !is_root() {
        // Then every other test of this file is this one.
        return;
    }
    let directory = prepared();
    let path = directory.path();
    fs::set_permissions(path.join("disk"), fs::Permissions::from_mode(0o644)).unwrap();
    let output = as_user(&["cp", "disk:/", "out"], path);
    refused(&output, 1, &["out/disk: a device, which only root may make", "1 entries were not copied"]);
    let mode = |name: &str| fs::symlink_metadata(path.join("out").join(name)).unwrap().mode() & 0o7777;
    // Root's program that runs as root must not become one that runs as somebody else.
    assert_eq!(mode("etc/nothing"), 0o755);
    assert_eq!(mode("etc/deep"), 0o1750);
    assert_eq!(fs::read_to_string(path.join("out/zz-same")).unwrap(), "vm1\n");
    let output = as_user(&["cp", "--no-devices", "--json", "disk:/", "again"], path);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((report["devices_left_out"].as_u64(), report["failed"].as_u64()), (Some(1), Some(0)));
}

#[test]
fn a_tar_is_the_tree_and_the_same_every_time() {
    let directory = prepared();
    let path = directory.path();
    let first = run(env!("CARGO_BIN_EXE_vbd"), &["tar", "disk"], path);
    ok(&["tar", "disk:/", "--output", "second.tar"], path);
    assert!(first == fs::read(path.join("second.tar")).unwrap());
    assert_eq!(first.len() % 10_240, 0);
    assert!(first.len() < 2_000_000, "holes are in the archive");

    fs::create_dir(path.join("out")).unwrap();
    let all =
        ["-xpf", "second.tar", "-C", "out", "--acls", "--xattrs", "--xattrs-include=*", "--numeric-owner"];
    run("tar", &all, path);
    let mut expected = describe(&path.join("tree"));
    // Where an ACL comes back as text, nothing else differs.
    let mut found = describe(&path.join("out"));
    for lines in [&mut expected, &mut found] {
        lines.remove("");
    }
    same(&expected, &found);
}

#[test]
fn a_disk_built_from_the_tar_is_the_same_disk() {
    let directory = prepared();
    let path = directory.path();
    let mut tar =
        command(env!("CARGO_BIN_EXE_vbd"), &["tar", "disk"], path).stdout(Stdio::piped()).spawn().unwrap();
    let mut build =
        command(env!("CARGO_BIN_EXE_vbd"), &["build", "copy", "--size", "64M", "--from", "-"], path);
    let built = build.stdin(tar.stdout.take().unwrap()).stdout(Stdio::null()).status().unwrap();
    assert!(built.success() && tar.wait().unwrap().success());
    let output = vbd(&["diff", "disk", "copy"], path);
    let said = String::from_utf8_lossy(&output.stdout);
    // Of the root the time is mke2fs's own, and what it adds is of now.
    let rest: Vec<_> = said
        .lines()
        .filter(|line| !line.starts_with("~ /: mtime ") && !line.starts_with("~ /lost+found: mtime "))
        .collect();
    assert!(rest.is_empty(), "{said}");
}

#[test]
fn a_part_of_a_disk_and_one_file() {
    let directory = prepared();
    let path = directory.path();
    let listed = |target: &str| {
        ok(&["tar", target, "-o", "part.tar"], path);
        let names = run("tar", &["-tf", "part.tar"], path);
        String::from_utf8(names).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(listed("disk:/etc/deep"), ["./", "er/", "er/data"]);
    assert_eq!(listed("disk:/link"), ["link"]);
    assert_eq!(listed("disk:/empty"), ["./"]);
}
