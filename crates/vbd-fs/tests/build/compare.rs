//! Every entry of an image beside the tree it came from: type, mode, owner, time, size, content, attributes, ACLs,
//! capabilities, links and holes.

use std::path::Path;
use std::process::Command;

use vbd_fs::{BuildOptions, Filesystem};

use super::sample::{self, Tree};
use super::setting::{MIB, Scratch, as_ordinary_user, build, is_root, options};
use super::{image, setting};

/// Names the entries that differ, for a whole tree is too long to look at.
pub(crate) fn assert_same(tree: &Tree, image: &Tree) {
    let names =
        |tree: &Tree| tree.keys().map(|k| String::from_utf8_lossy(k).into_owned()).collect::<Vec<_>>();
    assert_eq!(names(tree), names(image));
    for (path, entry) in tree {
        let found = &image[path];
        let shown = String::from_utf8_lossy(path);
        assert!(entry.content == found.content, "{shown}: the content differs");
        let brief = |e: &sample::Entry| sample::Entry { content: Vec::new(), ..copy(e) };
        assert_eq!(brief(entry), brief(found), "{shown}");
    }
}

fn copy(e: &sample::Entry) -> sample::Entry {
    let (xattrs, blocks) = (e.xattrs.clone(), e.blocks.clone());
    sample::Entry { content: Vec::new(), xattrs, blocks, ..*e }
}

fn from_directory(filesystem: Filesystem) {
    let scratch = Scratch::new();
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    std::fs::create_dir(&tree).unwrap();
    sample::make(&tree);
    if filesystem == Filesystem::Ext4 {
        // The first and the last second that an inode can say, and one after 2038.
        for (name, seconds) in
            [("dir/empty", -(1 << 31)), ("sparse", (1 << 34) - (1 << 31) - 1), ("hole", 1 << 32)]
        {
            sample::set_time(&tree.join(name), seconds);
        }
    }
    let mut options = options(64 * MIB, &tree);
    options.spec.filesystem = filesystem;
    options.verify = filesystem == Filesystem::Ext4;
    let report = build(&file, &options).unwrap();
    image::check(&file);
    let mut expected = sample::read(&tree);
    if filesystem != Filesystem::Ext4 {
        // mke2fs keeps whole seconds.
        expected.values_mut().for_each(|entry| entry.mtime.1 = 0);
    }
    if !is_root() {
        // An ordinary user's files are root's in the image.
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        for entry in expected.values_mut() {
            entry.uid = if entry.uid == uid { 0 } else { entry.uid };
            entry.gid = if entry.gid == gid { 0 } else { entry.gid };
        }
    }
    assert_same(&expected, &image::read(&file));
    assert_eq!(report.warnings, Vec::<String>::new());
    assert_eq!(scratch.names(), ["disk", "tree"]);
}

#[test]
fn a_directory_becomes_ext4() {
    from_directory(Filesystem::Ext4);
}

#[test]
fn a_directory_becomes_ext3() {
    from_directory(Filesystem::Ext3);
}

#[test]
fn a_directory_becomes_ext2() {
    from_directory(Filesystem::Ext2);
}

#[test]
fn an_ordinary_users_directory_becomes_ext4() {
    as_ordinary_user("compare::an_ordinary_users_directory_becomes_ext4", || {
        from_directory(Filesystem::Ext4)
    });
}

/// Packs a tree that has one of everything, as root of all of it where this user is.
fn pack(tree: &Path, archive: &Path, arguments: &[&str]) -> Tree {
    std::fs::create_dir(tree).unwrap();
    sample::make(tree);
    // tar has no sockets.
    std::fs::remove_file(tree.join("socket")).unwrap();
    sample::set_time(tree, 1_234_567_890);
    let mut tar = Command::new("tar");
    tar.args(["--create", "--sparse", "--numeric-owner"]).args(arguments).arg("--file").arg(archive);
    let status = tar.arg("-C").arg(tree).arg(".").status().unwrap();
    assert!(status.success());
    sample::read(tree)
}

fn from_tar(arguments: &[&str], adapt: impl Fn(&mut sample::Entry)) {
    let scratch = Scratch::new();
    let (archive, file) = (scratch.path("a.tar"), scratch.path("disk"));
    let mut expected = pack(&scratch.path("tree"), &archive, arguments);
    expected.values_mut().for_each(adapt);
    build(&file, &BuildOptions { verify: true, ..options(64 * MIB, &archive) }).unwrap();
    image::check(&file);
    assert_same(&expected, &image::read(&file));
}

const PAX: [&str; 4] = ["--format=pax", "--xattrs", "--xattrs-include=*", "--acls"];

#[test]
fn a_pax_archive_keeps_everything() {
    from_tar(&PAX, |_| {});
}

#[test]
fn an_ordinary_user_unpacks_a_pax_archive() {
    as_ordinary_user("compare::an_ordinary_user_unpacks_a_pax_archive", || from_tar(&PAX, |_| {}));
}

/// Owners, devices and capabilities that only root can make come out of an archive that root packed.
#[test]
fn an_ordinary_user_unpacks_roots_archive() {
    const ARCHIVE: &str = "VBD_TEST_ARCHIVE";
    const NAME: &str = "compare::an_ordinary_user_unpacks_roots_archive";
    if let Some(archive) = std::env::var_os(ARCHIVE) {
        let scratch = Scratch::new();
        let file = scratch.path("disk");
        build(&file, &options(64 * MIB, Path::new(&archive))).unwrap();
        image::check(&file);
        std::fs::copy(&file, Path::new(&archive).with_file_name("disk")).unwrap();
        return;
    }
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let archive = scratch.path("a.tar.gz");
    let expected = pack(&scratch.path("tree"), &archive, &[&PAX[..], &["--gzip"]].concat());
    setting::as_nobody(NAME, &[(ARCHIVE, &archive)]);
    assert_same(&expected, &image::read(&scratch.path("disk")));
}

#[test]
fn all_sparse_formats_and_the_gnu_format_are_read() {
    for arguments in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0", "--zstd"],
        &["--format=gnu", "--xz"],
    ] {
        from_tar(arguments, |entry| {
            entry.xattrs.clear();
            if arguments[0] == "--format=gnu" {
                entry.mtime.1 = 0;
            }
        });
    }
}

/// GNU tar writes the names that the packing machine has for an ACL's users; the archive's own files say who they are.
#[test]
fn acls_for_names_are_the_archives_own_users() {
    let scratch = Scratch::new();
    let (tree, archive, file) = (scratch.path("tree"), scratch.path("a.tar"), scratch.path("disk"));
    std::fs::create_dir_all(tree.join("bin/inner")).unwrap();
    std::fs::create_dir(tree.join("etc")).unwrap();
    let host = std::fs::read_to_string("/etc/passwd").unwrap();
    let daemon = host.lines().find(|line| line.starts_with("daemon:")).unwrap().split(':').nth(2).unwrap();
    let daemon = daemon.parse().unwrap();
    let acl = |id| {
        sample::acl(&[(1, 7, u32::MAX), (2, 5, id), (4, 5, u32::MAX), (16, 5, u32::MAX), (32, 0, u32::MAX)])
    };
    let names = ["system.posix_acl_access", "system.posix_acl_default"];
    sample::set_xattr(&tree.join("bin/inner"), names[1], &acl(daemon)).unwrap();
    std::fs::write(tree.join("bin/tool"), b"x").unwrap();
    sample::set_xattr(&tree.join("bin/tool"), names[0], &acl(daemon)).unwrap();
    let pack = || {
        let mut tar = Command::new("tar");
        tar.args(["--format=pax", "--acls", "-cf"]).arg(&archive).arg("-C").arg(&tree).arg(".");
        assert!(tar.status().unwrap().success());
    };
    pack();
    let error = build(&file, &options(16 * MIB, &archive)).unwrap_err().to_string();
    assert!(error.contains("has an ACL for \"daemon\", who is not known in the archive"), "{error}");
    std::fs::write(tree.join("etc/passwd"), b"root:x:0:0::/:/bin/sh\ndaemon:x:777:777::/:/bin/sh\n").unwrap();
    pack();
    build(&file, &options(16 * MIB, &archive)).unwrap();
    image::check(&file);
    assert_eq!(image::entry(&file, "/bin/tool").xattrs[names[0]], acl(777));
    assert_eq!(image::entry(&file, "/bin/inner").xattrs[names[1]], acl(777));
}

#[test]
fn what_is_mounted_in_a_tree_and_the_image_in_it_are_left_out() {
    setting::with_own_mounts("compare::what_is_mounted_in_a_tree_and_the_image_in_it_are_left_out", || {
        let scratch = Scratch::new();
        let tree = scratch.path("tree");
        std::fs::create_dir_all(tree.join("mounted")).unwrap();
        std::fs::create_dir_all(tree.join("var/cache/x")).unwrap();
        std::fs::write(tree.join("var/keep"), b"kept").unwrap();
        let _mounted = vbd_testing::Mounted::in_memory(&tree.join("mounted"), "size=1m");
        std::fs::write(tree.join("mounted/inside"), b"not on this filesystem").unwrap();
        let file = tree.join("disk");
        std::fs::write(&file, b"old").unwrap();
        let mut options = options(16 * MIB, &tree);
        options.force = true;
        options.spec.exclude = vec!["/var/cache/*".to_owned()];
        let report = build(&file, &options).unwrap();
        let entries = image::read(&file);
        let names: Vec<_> = entries.keys().map(|k| String::from_utf8_lossy(k)).collect();
        assert_eq!(names, ["", "mounted", "var", "var/cache", "var/keep"]);
        assert_eq!((report.counts.files, report.counts.directories), (1, 4));
        assert_eq!(std::fs::metadata(&file).unwrap().len(), 16 * MIB);
    });
}

#[test]
fn the_running_system_is_copied_without_what_is_not_its_own() {
    let scratch = Scratch::new();
    let file = scratch.path("disk");
    let mut options = options(64 * MIB, Path::new("/"));
    // All of it takes too long for a test, and much of it not every user may read: names will do.
    let small = ["etc", "proc", "sys", "tmp", "home", "dev", "run"];
    let others = setting::names(Path::new("/")).into_iter().filter(|name| !small.contains(&name.as_str()));
    options.spec.exclude = others.collect();
    options.spec.exclude.extend(["etc/*", "dev/*", "run/*"].map(str::to_owned));
    build(&file, &options).unwrap();
    let entries = image::read(&file);
    let top: Vec<_> =
        entries.keys().filter(|k| !k.contains(&b'/')).map(|k| String::from_utf8_lossy(k)).collect();
    assert!(
        ["etc", "home", "proc", "sys", "tmp"].iter().all(|name| top.contains(&(*name).into())),
        "{top:?}"
    );
    let inside = |name: &str| entries.keys().filter(|k| k.starts_with(format!("{name}/").as_bytes())).count();
    assert_eq!(["proc", "sys", "tmp", "home"].map(inside), [0; 4]);
}
