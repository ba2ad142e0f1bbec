//! `vbd edit`, `cp` into a disk, `rm`, `mv`, `mkdir`, `ln`, `chmod`, `chown` and `tailor`: what is in a disk, changed.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Output, Stdio};

use vbd_image::lease::{Lease, Mode, Options};

use crate::common::refused;
use crate::support::{command, describe, disk, is_root, ok, run, same, tree, vbd};

fn prepared() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    tree(&directory.path().join("tree"));
    disk(directory.path(), "tree", "disk", &[]);
    directory
}

/// e2fsck has nothing to say.
#[track_caller]
fn check(path: &Path) {
    run("e2fsck", &["-fn", "disk"], path);
}

/// `vbd edit` with this editor.
fn edit_with(editor: &str, arguments: &[&str], path: &Path) -> Output {
    command(env!("CARGO_BIN_EXE_vbd"), arguments, path)
        .env("EDITOR", editor)
        .env_remove("VISUAL")
        .output()
        .unwrap()
}

fn inode_of(word: &str, path: &Path) -> String {
    let (disk, file) = word.split_once(':').unwrap();
    let text = String::from_utf8(run("debugfs", &["-R", &format!("stat {file}"), disk], path)).unwrap();
    text.lines().next().unwrap().split_whitespace().nth(1).unwrap().to_owned()
}

#[test]
fn a_file_through_an_editor_and_from_other_places() {
    let directory = prepared();
    let path = directory.path();
    let before = inode_of("disk:/etc/hostname", path);
    let output = edit_with("sed -i s/vm1/machine/", &["edit", "disk:/link"], path);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(ok(&["cat", "disk:/etc/hostname"], path), "machine\n");
    // The same inode by its other name.
    assert_eq!(ok(&["cat", "disk:/zz-same"], path), "machine\n");
    assert_eq!(inode_of("disk:/etc/hostname", path), before);
    let bytes = fs::read(path.join("disk")).unwrap();
    let output = edit_with("true", &["edit", "disk:/etc/hostname"], path);
    assert!(output.status.success() && String::from_utf8_lossy(&output.stderr).contains("unchanged"));
    refused(&edit_with("false", &["edit", "disk:/etc/hostname"], path), 1, &["nothing was changed"]);
    refused(&vbd(&["edit", "--stdin", "disk:/etc"], path), 1, &["is no regular file"]);
    assert!(fs::read(path.join("disk")).unwrap() == bytes, "the disk changed");

    ok(&["edit", "--content-from", "tree/etc/deep/er/data", "disk:/etc/new"], path);
    let data = fs::read(path.join("tree/etc/deep/er/data")).unwrap();
    assert!(vbd(&["cat", "disk:/etc/new"], path).stdout == data);
    let mut child = command(env!("CARGO_BIN_EXE_vbd"), &["edit", "--stdin", "disk:/etc/new"], path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"short").unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(ok(&["cat", "disk:/etc/new"], path), "short");
    check(path);
}

#[test]
fn a_tree_in_and_out_again_is_the_tree() {
    let directory = prepared();
    let path = directory.path();
    fs::create_dir(path.join("empty")).unwrap();
    run("mke2fs", &["-q", "-t", "ext4", "disk2", "64M"], path);
    ok(&["cp", "tree", "disk2:/copy"], path);
    run("e2fsck", &["-fn", "disk2"], path);
    ok(&["cp", "disk2:/copy", "out"], path);
    same(&describe(&path.join("tree")), &describe(&path.join("out")));
    // Once more over what is there, and by its name into a directory.
    ok(&["cp", "tree", "disk2:/copy"], path);
    ok(&["cp", "disk2:/copy/tree", "again"], path);
    same(&describe(&path.join("tree")), &describe(&path.join("again")));
    ok(&["cp", "--owner", "7:8", "tree/etc/hostname", "tree/etc/nothing", "disk2:/copy/etc"], path);
    let listed = ok(&["ls", "-l", "disk2:/copy/etc"], path);
    let line = listed.lines().find(|line| line.ends_with("hostname")).unwrap();
    assert!(line.contains(" 7 ") && line.contains(" 8 "), "{line}");
    fs::create_dir(path.join("odd")).unwrap();
    fs::write(path.join("odd/deep"), "a file").unwrap();
    refused(&vbd(&["cp", "odd/deep", "disk2:/copy/etc"], path), 1, &["odd/deep: \"deep\" exists already"]);
    refused(&vbd(&["cp", "tree/etc", "tree/empty", "disk2:/none"], path), 1, &["is no directory"]);
    refused(&vbd(&["cp", "disk:/etc", "disk2:/"], path), 2, &["from one disk to another"]);
    run("e2fsck", &["-fn", "disk2"], path);
}

#[test]
fn names_come_and_go() {
    let directory = prepared();
    let path = directory.path();
    ok(&["mkdir", "-p", "disk:/srv/one/two", "disk:/srv"], path);
    refused(&vbd(&["mkdir", "disk:/srv"], path), 1, &["disk:/srv: is there already"]);
    refused(&vbd(&["mkdir", "disk:/no/way"], path), 1, &["no such file or directory"]);
    ok(&["mv", "disk:/etc/hostname", "disk:/etc/nothing", "disk:/srv/one"], path);
    ok(&["mv", "disk:/srv/one", "disk:/srv/1"], path);
    assert_eq!(ok(&["cat", "disk:/srv/1/hostname"], path), "vm1\n");
    ok(&["ln", "disk:/srv/1/hostname", "disk:/srv/hard"], path);
    ok(&["ln", "-s", "1/hostname", "disk:/srv/soft"], path);
    assert_eq!(ok(&["cat", "disk:/srv/soft"], path), "vm1\n");
    refused(&vbd(&["ln", "-s", "x", "disk:/srv/soft"], path), 1, &["--force replaces it"]);
    ok(&["ln", "-sf", "hard", "disk:/srv/soft"], path);
    refused(
        &vbd(&["rm", "disk:/srv/soft", "disk:/srv/1"], path),
        1,
        &["disk:/srv/1: is a directory; --recursive"],
    );
    // Nothing was removed, not even what could be.
    assert_eq!(ok(&["cat", "disk:/srv/soft"], path), "vm1\n");
    refused(&vbd(&["rm", "disk:/none"], path), 1, &["disk:/none: there is no such file"]);
    ok(&["rm", "-f", "disk:/none"], path);
    ok(&["rm", "-r", "disk:/srv/soft", "disk:/srv/1"], path);
    assert_eq!(ok(&["ls", "disk:/srv"], path), "hard\n");
    refused(&vbd(&["rm", "-r", "disk:/"], path), 1, &["cannot be that of an entry"]);
    refused(&vbd(&["rm", "disk:/a", "other:/b"], path), 1, &["two disks"]);
    refused(&vbd(&["rm", "disk"], path), 2, &["write IMAGE:/PATH"]);
    check(path);
}

#[test]
fn permissions_and_owners() {
    let directory = prepared();
    let path = directory.path();
    fs::write(path.join("passwd"), "root:x:0:0::/:/bin/sh\nalice:x:1000:1001::/:/bin/sh\n").unwrap();
    fs::write(path.join("group"), "root:x:0:\nstaff:x:50:\n").unwrap();
    ok(&["cp", "passwd", "group", "disk:/etc"], path);
    ok(&["chown", "-R", "alice:staff", "disk:/etc"], path);
    ok(&["chmod", "u+s,go-rwx", "disk:/link"], path);
    let stat = String::from_utf8(run("debugfs", &["-R", "stat /etc/hostname", "disk"], path)).unwrap();
    assert!(
        stat.contains("Mode:  04600") && stat.contains("User:  1000") && stat.contains("Group:    50"),
        "{stat}"
    );
    ok(&["chown", ":33", "disk:/etc/hostname"], path);
    let stat = String::from_utf8(run("debugfs", &["-R", "stat /etc/hostname", "disk"], path)).unwrap();
    assert!(
        stat.contains("Mode:  0600") && stat.contains("User:  1000") && stat.contains("Group:    33"),
        "{stat}"
    );
    refused(&vbd(&["chown", "nobody", "disk:/etc"], path), 1, &["nobody is not in the disk's /etc/passwd"]);
    refused(&vbd(&["chmod", "u+q", "disk:/etc"], path), 2, &["[ugoa][+-=][rwxXst]"]);
    check(path);
}

#[test]
fn a_disk_becomes_one_machines() {
    let directory = prepared();
    let path = directory.path();
    fs::write(path.join("tree/etc/machine-id"), "0123456789abcdef0123456789abcdef\n").unwrap();
    disk(path, "tree", "disk", &[]);
    ok(&["cp", "disk:/", "before"], path);
    // The second change does not fit, so the first is not made.
    let arguments = ["tailor", "disk", "--hostname", "vm2", "--serial-console", "ttyS0"];
    refused(&vbd(&arguments, path), 1, &["serial-console"]);
    refused(&vbd(&["tailor", "disk"], path), 2, &["say what is to be changed"]);
    ok(&["cp", "disk:/", "after"], path);
    same(&describe(&path.join("before")), &describe(&path.join("after")));
    check(path);
    ok(
        &[
            "tailor",
            "disk",
            "--hostname",
            "vm2",
            "--reset-identity",
            "--write",
            "/srv/a/b=text",
            "--remove",
            "/far",
        ],
        path,
    );
    assert_eq!(ok(&["cat", "disk:/etc/hostname"], path), "vm2\n");
    assert_eq!(ok(&["cat", "disk:/srv/a/b"], path), "text\n");
    assert_ne!(ok(&["cat", "disk:/etc/machine-id"], path), "0123456789abcdef0123456789abcdef\n");
    refused(&vbd(&["cat", "disk:/far"], path), 1, &["no such file"]);
    check(path);
}

#[test]
fn disks_that_are_not_changed() {
    let directory = prepared();
    let path = directory.path();
    let image = path.join("disk");
    let file = File::open(&image).unwrap();
    let lease = Lease::acquire(file.as_fd(), &image, Mode::Read, Options::default()).unwrap();
    let holder = format!("(process {}", std::process::id());
    let changes = [
        &["rm", "disk:/link"][..],
        &["edit", "--stdin", "disk:/etc/hostname"],
        &["mkdir", "disk:/x"],
        &["chmod", "600", "disk:/link"],
        &["chown", "1", "disk:/link"],
        &["cp", "tree/link", "disk:/x"],
        &["mv", "disk:/link", "disk:/x"],
        &["ln", "-s", "x", "disk:/x"],
        &["tailor", "disk", "--hostname", "x"],
    ];
    let before = fs::read(&image).unwrap();
    for arguments in changes {
        refused(&vbd(arguments, path), 1, &["in use by", &holder]);
    }
    drop(lease);
    // Nothing is refused by halves: a feature that cannot be kept right is named.
    run("mke2fs", &["-q", "-t", "ext4", "-O", "bigalloc", "clusters", "16M"], path);
    refused(
        &vbd(&["mkdir", "clusters:/x"], path),
        1,
        &["clusters: the filesystem cannot be changed: it has the feature bigalloc"],
    );
    run("mke2fs", &["-q", "-t", "ext2", "old", "16M"], path);
    refused(&vbd(&["mkdir", "old:/x"], path), 1, &["no journal", "tune2fs -j"]);
    assert!(fs::read(&image).unwrap() == before, "the disk changed");
    if !is_root() {
        let mut permissions = fs::metadata(&image).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&image, permissions).unwrap();
        refused(&vbd(&["rm", "disk:/link"], path), 1, &["not allowed to write"]);
    }
}

#[test]
fn a_partition_of_a_whole_disk() {
    let directory = prepared();
    let path = directory.path();
    File::create(path.join("whole")).unwrap().set_len(100 << 20).unwrap();
    let mut child = command("sfdisk", &["-q", "whole"], path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let table = b"label: gpt\nstart=2048,size=16384,type=U\nstart=20480,size=131072\n";
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), table).unwrap();
    assert!(child.wait().unwrap().success());
    run("dd", &["if=disk", "of=whole", "bs=512", "seek=20480", "conv=notrunc,sparse", "status=none"], path);
    ok(&["mkdir", "whole:/one"], path);
    ok(&["rm", "--partition", "2", "whole:/link"], path);
    refused(&vbd(&["mkdir", "--partition", "1", "whole:/x"], path), 1, &["whole, partition 1"]);
    run(
        "dd",
        &["if=whole", "of=disk", "bs=512", "skip=20480", "count=131072", "conv=sparse", "status=none"],
        path,
    );
    check(path);
    assert!(ok(&["ls", "disk:/"], path).contains("one\n"));
    run("sfdisk", &["--verify", "-q", "whole"], path);
}
