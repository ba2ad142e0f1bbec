//! The same input gives the same bytes, however it is read; and what differs shows in the UUID.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use vbd_fs::{BuildOptions, ImageSize, Report, Spare, Time};

use super::setting::{MIB, Scratch, build, options};
use super::{image, sample};

const TIME: Time = Time { seconds: 1_700_000_000, nanoseconds: 0 };

/// Fails where two files differ, with the place.
fn assert_same_bytes(one: &Path, other: &Path) {
    let files = [one, other].map(|path| File::open(path).unwrap());
    let length = files[0].metadata().unwrap().len();
    assert_eq!(length, files[1].metadata().unwrap().len());
    let mut pieces = [vec![0; 1 << 20], vec![0; 1 << 20]];
    for at in (0..length).step_by(1 << 20) {
        let room = usize::try_from((length - at).min(1 << 20)).unwrap();
        for (file, piece) in files.iter().zip(&mut pieces) {
            file.read_exact_at(&mut piece[..room], at).unwrap();
        }
        let differs = (0..room).find(|&i| pieces[0][i] != pieces[1][i]);
        assert!(
            differs.is_none(),
            "byte {} of {} and {}",
            at + differs.unwrap_or(0) as u64,
            one.display(),
            other.display()
        );
    }
}

fn reproducible(from: &Path) -> BuildOptions {
    let mut options = options(64 * MIB, from);
    options.time = Some(TIME);
    options
}

/// A copy of a tree whose entries were made in another order.
fn copy(from: &Path, to: &Path) {
    let order = |flag: &str| {
        let script = format!("cd \"$1\" && find . -print0 | LC_ALL=C sort -z {flag} >\"$2\"");
        let list = to.with_extension("list");
        let ran = Command::new("sh").args(["-c", &script, "sh"]).arg(from).arg(&list).status().unwrap();
        assert!(ran.success());
        list
    };
    std::fs::create_dir(to).unwrap();
    let list = order("-r");
    let mut pack = Command::new("tar");
    pack.args([
        "--create",
        "--format=pax",
        "--xattrs",
        "--xattrs-include=*",
        "--acls",
        "--numeric-owner",
        "--null",
    ]);
    pack.args(["--no-recursion", "--sparse", "-C"]).arg(from).arg("--files-from").arg(&list);
    let archive = to.with_extension("tar");
    assert!(pack.arg("--file").arg(&archive).status().unwrap().success());
    let mut unpack = Command::new("tar");
    unpack.args([
        "--extract",
        "--xattrs",
        "--xattrs-include=*",
        "--acls",
        "--numeric-owner",
        "--same-permissions",
    ]);
    assert!(unpack.arg("--file").arg(&archive).arg("-C").arg(to).status().unwrap().success());
}

#[test]
fn a_directory_gives_the_same_bytes_whatever_the_threads_and_the_order() {
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    std::fs::create_dir(&tree).unwrap();
    sample::make(&tree);
    // tar has no sockets.
    std::fs::remove_file(tree.join("socket")).unwrap();
    sample::set_time(&tree, 1_234_567_890);
    // More than one thread takes at once.
    std::fs::create_dir(tree.join("many")).unwrap();
    for i in 0..3000 {
        std::fs::write(tree.join(format!("many/{i}")), format!("{i}").repeat(i % 700)).unwrap();
    }
    for i in 0..3000 {
        sample::set_time(&tree.join(format!("many/{i}")), 1_600_000_000 + i);
    }
    sample::set_time(&tree.join("many"), 1_600_000_000);
    let other = scratch.path("other");
    copy(&tree, &other);
    let first = scratch.path("first");
    let report = build(&first, &reproducible(&tree)).unwrap();
    image::check(&first);
    for (from, threads) in [(&tree, 1), (&tree, 7), (&other, 3)] {
        let file = scratch.path("again");
        let again = BuildOptions { threads: Some(threads), force: true, ..reproducible(from) };
        assert_eq!(build(&file, &again).unwrap().uuid, report.uuid);
        assert_same_bytes(&first, &file);
    }
}

#[test]
fn an_archive_gives_the_same_bytes_and_the_directory_the_same_tree() {
    let scratch = Scratch::new();
    let (tree, archive) = (scratch.path("tree"), scratch.path("a.tar"));
    std::fs::create_dir(&tree).unwrap();
    sample::make(&tree);
    std::fs::remove_file(tree.join("socket")).unwrap();
    let mut tar = Command::new("tar");
    tar.args([
        "--create",
        "--format=pax",
        "--xattrs",
        "--xattrs-include=*",
        "--acls",
        "--numeric-owner",
        "--sparse",
    ]);
    assert!(tar.arg("--file").arg(&archive).arg("-C").arg(&tree).arg(".").status().unwrap().success());
    let [one, two, direct, found] = ["one", "two", "direct", "found"].map(|name| scratch.path(name));
    build(&one, &reproducible(&archive)).unwrap();
    build(&two, &reproducible(&archive)).unwrap();
    assert_same_bytes(&one, &two);
    build(&direct, &reproducible(&tree)).unwrap();
    let auto = ImageSize::Auto { spare: Spare::Bytes(0), minimum: None, maximum: None };
    build(&found, &BuildOptions { size: auto, ..reproducible(&archive) }).unwrap();
    image::check(&found);
    // Without owners: an ordinary user's files are root's when they come from a directory alone.
    let bare = |file: &Path| {
        let mut tree = image::read(file);
        tree.values_mut().for_each(|entry| (entry.uid, entry.gid) = (0, 0));
        tree
    };
    let expected = bare(&direct);
    for file in [&one, &found] {
        let tree = bare(file);
        assert_eq!(expected.keys().collect::<Vec<_>>(), tree.keys().collect::<Vec<_>>());
        let differs = expected.iter().find(|(path, entry)| tree[*path] != **entry);
        assert!(differs.is_none(), "{:?}", differs.map(|(path, _)| String::from_utf8_lossy(path)));
    }
}

#[test]
fn the_uuid_is_the_contents_and_times_have_a_limit() {
    let scratch = Scratch::new();
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("a"), b"one").unwrap();
    std::fs::write(tree.join("new"), b"x").unwrap();
    sample::set_time(&tree.join("a"), 1_000_000_000);
    let make = |options: &BuildOptions| -> Report {
        build(&file, &BuildOptions { force: true, ..options.clone() }).unwrap()
    };
    let first = make(&reproducible(&tree));
    assert_eq!(image::entry(&file, "/a").mtime, (1_000_000_000, 123_456_789));
    // Made now, which is later.
    assert_eq!(image::entry(&file, "/new").mtime, (TIME.seconds, 0));
    assert_eq!(image::entry(&file, "/").mtime, (TIME.seconds, 0));
    assert_eq!(make(&reproducible(&tree)).uuid, first.uuid);
    // A change of the content alone.
    std::fs::write(tree.join("a"), b"two").unwrap();
    sample::set_time(&tree.join("a"), 1_000_000_000);
    assert_ne!(make(&reproducible(&tree)).uuid, first.uuid);
    std::fs::write(tree.join("a"), b"one").unwrap();
    sample::set_time(&tree.join("a"), 1_000_000_000);
    assert_eq!(make(&reproducible(&tree)).uuid, first.uuid);
    let mut labelled = reproducible(&tree);
    labelled.spec.label = Some("other".to_owned());
    assert_ne!(make(&labelled).uuid, first.uuid);
    let mut given = reproducible(&tree);
    given.spec.uuid = Some("01234567-89AB-cdef-0123-456789abcdef".to_owned());
    assert_eq!(make(&given).uuid, "01234567-89ab-cdef-0123-456789abcdef");
    image::check(&file);
    // Without a time no two images are the same.
    let plain = options(64 * MIB, &tree);
    assert_ne!(make(&plain).uuid, make(&plain).uuid);
}
