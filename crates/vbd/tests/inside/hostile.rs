//! Disks made to break out of the directory that they are copied to, or to never end.

use std::fs;
use std::path::Path;

use crate::common::names;
use crate::support::{run, vbd};

/// A disk without checksums, so that its bytes can be changed, of a tree that `fill` made.
fn without_sums(directory: &Path, fill: impl Fn(&Path)) {
    let tree = directory.join("tree");
    fs::create_dir(&tree).unwrap();
    fill(&tree);
    let features = "^metadata_csum,^has_journal,^dir_index";
    run("mke2fs", &["-q", "-t", "ext4", "-O", features, "-N", "2048", "-d", "tree", "disk", "4M"], directory);
}

/// Puts other bytes in the place of some, wherever they are; they must be there.
fn replace(disk: &Path, from: &[u8], to: &[u8]) {
    let mut bytes = fs::read(disk).unwrap();
    let places: Vec<_> = bytes.windows(from.len()).enumerate().filter(|(_, part)| *part == from).collect();
    let places: Vec<usize> = places.into_iter().map(|(at, _)| at).collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    fs::write(disk, bytes).unwrap();
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    for name in [&b"../escape"[..], b"/tmp/evil", b"..\0\0\0\0\0\0\0", b"a\0b/c/d/e"] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        without_sums(path, |tree| {
            fs::create_dir(tree.join("sub")).unwrap();
            fs::write(tree.join("sub/XXXXXXXXX"), "evil").unwrap();
            fs::write(tree.join("good"), "good").unwrap();
        });
        replace(&path.join("disk"), b"XXXXXXXXX", name);
        fs::create_dir(path.join("in")).unwrap();
        let output = vbd(&["cp", "disk:/", "in/out"], path);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("has a name that no file can have"), "{said}");
        assert_eq!(names(&path.join("in")), ["out"]);
        assert_eq!(names(&path.join("in/out")), ["good", "lost+found", "sub"]);
        assert!(names(&path.join("in/out/sub")).is_empty());
        assert_eq!(vbd(&["tar", "disk"], path).status.code(), Some(1));
        assert_eq!(vbd(&["ls", "disk:/sub"], path).status.code(), Some(1));
    }
}

/// A directory and a link of one name: what is in the directory must not go through the link.
#[test]
fn a_link_and_a_directory_of_one_name() {
    for (link, other) in [("evil1", "evil2"), ("evil2", "evil1")] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::create_dir(path.join("outside")).unwrap();
        without_sums(path, |tree| {
            std::os::unix::fs::symlink(path.join("outside"), tree.join(link)).unwrap();
            fs::create_dir(tree.join(other)).unwrap();
            fs::write(tree.join(other).join("payload"), "evil").unwrap();
        });
        replace(&path.join("disk"), b"evil2", b"evil1");
        let output = vbd(&["cp", "disk:/", "out"], path);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("evil1: there is "), "{said}");
        assert!(names(&path.join("outside")).is_empty());
    }
}

/// What was in the destination before is not followed, either.
#[test]
fn links_that_were_there_are_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    without_sums(path, |tree| {
        fs::create_dir(tree.join("sub")).unwrap();
        fs::write(tree.join("sub/file"), "new").unwrap();
        fs::write(tree.join("file"), "new").unwrap();
    });
    fs::create_dir_all(path.join("out")).unwrap();
    fs::create_dir_all(path.join("outside")).unwrap();
    fs::write(path.join("kept"), "kept").unwrap();
    std::os::unix::fs::symlink(path.join("outside"), path.join("out/sub")).unwrap();
    std::os::unix::fs::symlink(path.join("kept"), path.join("out/file")).unwrap();
    let output = vbd(&["cp", "disk:/", "out"], path);
    assert_eq!(output.status.code(), Some(1));
    assert!(names(&path.join("outside")).is_empty());
    assert_eq!(fs::read_to_string(path.join("kept")).unwrap(), "kept");
    assert_eq!(fs::read_to_string(path.join("out/file")).unwrap(), "new");
}

/// A directory that is in itself has no end.
#[test]
fn a_directory_in_itself() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    without_sums(path, |tree| {
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        fs::write(tree.join("good"), "good").unwrap();
    });
    run("debugfs", &["-w", "-R", "ln a a/b/c/again", "disk"], path);
    for arguments in [
        &["cp", "disk:/", "out"][..],
        &["ls", "-R", "disk"],
        &["du", "disk"],
        &["find", "disk"],
        &["tar", "disk"],
    ] {
        let output = vbd(arguments, path);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("in the tree more than once"), "{arguments:?}: {said}");
    }
    let output = vbd(&["diff", "disk", "disk"], path);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(fs::read_to_string(path.join("out/good")).unwrap(), "good");
}

/// More levels than a process may have files open, and a path longer than the kernel takes.
#[test]
fn a_tree_that_is_very_deep() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    const DEPTH: usize = 1500;
    without_sums(path, |_| {});
    // By debugfs, a step at a time: mke2fs cannot take a path that long.
    fs::write(path.join("steps"), "mkdir directory\ncd directory\n".repeat(DEPTH)).unwrap();
    run("debugfs", &["-w", "-f", "steps", "disk"], path);
    let output = vbd(&["cp", "disk:/", "out"], path);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = vbd(&["find", "disk:/", "-name", "directory"], path);
    assert_eq!(output.stdout.iter().filter(|byte| **byte == b'\n').count(), DEPTH);
}
