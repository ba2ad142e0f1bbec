//! What can be asked of the filesystem and its size, as dumpe2fs sees it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use vbd_fs::{BuildOptions, Error, Filesystem, ImageSize, JournalSize, Owner, Report, Spare, Time};

use super::image;
use super::sample::noise;
use super::setting::{MIB, Scratch, as_ordinary_user, build, options};

fn superblock(file: &Path) -> String {
    let ran = Command::new("/sbin/dumpe2fs").env("LC_ALL", "C").arg("-h").arg(file).output().unwrap();
    assert!(ran.status.success());
    String::from_utf8(ran.stdout).unwrap()
}

fn field(superblock: &str, name: &str) -> String {
    let line = superblock.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {superblock}")).trim().to_owned()
}

fn tree(scratch: &Scratch) -> std::path::PathBuf {
    let tree = scratch.path("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("file"), noise(10_000)).unwrap();
    tree
}

#[test]
fn settings_are_the_filesystems() {
    let scratch = Scratch::new();
    let (tree, file) = (tree(&scratch), scratch.path("disk"));
    let mut options = options(256 * MIB, &tree);
    options.spec.bytes_per_inode = Some(65_536);
    options.spec.journal = JournalSize::Bytes(8 << 20);
    options.spec.mount_options = Some("discard,commit=60".to_owned());
    options.spec.root_mode = Some(0o1750);
    options.spec.root_owner = Some(Owner { uid: 70_000, gid: 5 });
    options.spec.orphan_file = true;
    options.spec.for_old_grub = true;
    options.spec.reserved_percent = Some(1);
    build(&file, &options).unwrap();
    image::check(&file);
    let said = superblock(&file);
    assert_eq!(field(&said, "Inode count"), "4096");
    assert_eq!(field(&said, "Mount options"), "discard,commit=60");
    assert_eq!(field(&said, "Reserved block count"), "655");
    let features = field(&said, "Filesystem features");
    let has = |feature| features.split_whitespace().any(|f| f == feature);
    assert!(has("metadata_csum") && has("orphan_file") && !has("metadata_csum_seed"), "{features}");
    assert_eq!(field(&said, "Total journal blocks"), "2048");
    let root = image::entry(&file, "/");
    assert_eq!((root.mode, root.uid, root.gid), (0o1750, 70_000, 5));

    let mut plain = super::setting::options(256 * MIB, &tree);
    plain.spec.journal = JournalSize::None;
    plain.force = true;
    build(&file, &plain).unwrap();
    image::check(&file);
    let features = field(&superblock(&file), "Filesystem features");
    assert!(features.contains("metadata_csum_seed") && !features.contains("has_journal"), "{features}");
}

#[test]
fn what_another_filesystem_has_is_refused() {
    let scratch = Scratch::new();
    let tree = tree(&scratch);
    type Change = fn(&mut BuildOptions);
    let cases: [(Filesystem, Change, &str); 7] = [
        (Filesystem::Ext4, |o| o.spec.mkfs_args = vec!["-v".to_owned()], "no mke2fs makes ext4"),
        (Filesystem::Ext2, |o| o.spec.orphan_file = true, "orphan-file is for ext4, not for ext2"),
        (Filesystem::Ext3, |o| o.spec.skip_unreadable = true, "skip-unreadable is for ext4"),
        (Filesystem::Ext3, |o| o.size = auto(Spare::Bytes(0)), "ext3 needs a size"),
        (Filesystem::Ext2, |o| o.spec.swap_file = Some("1M".parse().unwrap()), "swap-file is for ext4"),
        (Filesystem::Ext4, |o| o.spec.swap_file = Some("36K".parse().unwrap()), "a swap file has"),
        (Filesystem::Ext4, |o| o.spec.root_mode = Some(0o10000), "permission bits"),
    ];
    for (filesystem, change, expected) in cases {
        let mut options = options(16 * MIB, &tree);
        options.spec.filesystem = filesystem;
        change(&mut options);
        let error = build(&scratch.path("disk"), &options).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

fn auto(spare: Spare) -> ImageSize {
    ImageSize::Auto { spare, minimum: None, maximum: None }
}

#[test]
fn a_size_is_found_for_the_content() {
    let scratch = Scratch::new();
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    std::fs::create_dir(&tree).unwrap();
    for i in 0..30 {
        std::fs::write(tree.join(i.to_string()), noise(1 << 20)).unwrap();
    }
    let make = |size| -> Result<Report, Error> {
        let report = build(&file, &BuildOptions { size, force: true, ..options(0, &tree) });
        if report.is_ok() {
            image::check(&file);
        }
        report
    };
    let smallest = make(auto(Spare::Bytes(0))).unwrap();
    assert!(smallest.free_bytes < 2 * MIB && smallest.size < 45 * MIB, "{smallest:?}");
    assert_eq!(smallest.size, std::fs::metadata(&file).unwrap().len());
    let more = make(auto(Spare::Bytes(50 * MIB))).unwrap();
    assert!((50 * MIB..52 * MIB).contains(&more.free_bytes), "{more:?}");
    let part = make(auto(Spare::Percent(100))).unwrap();
    assert!((30 * MIB..33 * MIB).contains(&part.free_bytes), "{part:?}");
    let (minimum, maximum) = (Some(100 * MIB), Some(200 * MIB));
    let bounded = |spare| ImageSize::Auto { spare, minimum, maximum };
    assert_eq!(make(bounded(Spare::Bytes(0))).unwrap().size, 100 * MIB);
    let error = make(bounded(Spare::Bytes(300 * MIB))).unwrap_err();
    assert!(matches!(&error, Error::NoRoom(shortage) if shortage.size == 200 * MIB), "{error}");
}

#[test]
fn many_small_files_have_their_inodes() {
    let scratch = Scratch::new();
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    std::fs::create_dir(&tree).unwrap();
    for i in 0..3000 {
        std::fs::File::create(tree.join(i.to_string())).unwrap();
    }
    let options = BuildOptions { size: auto(Spare::Bytes(0)), ..options(0, &tree) };
    let report = build(&file, &options).unwrap();
    image::check(&file);
    assert!(report.size < 10 * MIB, "{report:?}");
}

#[test]
fn what_cannot_be_read_is_listed_whole_or_left_out() {
    as_ordinary_user("settings::what_cannot_be_read_is_listed_whole_or_left_out", || {
        let scratch = Scratch::new();
        let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
        std::fs::create_dir_all(tree.join("closed/inside")).unwrap();
        std::fs::create_dir_all(tree.join("open")).unwrap();
        for name in ["open/a", "open/b", "open/c", "closed/d"] {
            std::fs::write(tree.join(name), b"x").unwrap();
        }
        let mode = |name: &str, mode| {
            std::fs::set_permissions(tree.join(name), PermissionsExt::from_mode(mode)).unwrap();
        };
        for name in ["open/a", "open/c", "closed"] {
            mode(name, 0);
        }
        let mut options = options(16 * MIB, &tree);
        let error = build(&file, &options).unwrap_err();
        let Error::Unreadable(entries) = &error else { panic!("{error}") };
        let names: Vec<_> = entries.iter().map(|(path, _)| path.strip_prefix(&tree).unwrap()).collect();
        assert_eq!(names, ["closed", "open/a", "open/c"].map(Path::new));
        assert!(error.to_string().contains("--skip-unreadable"), "{error}");
        assert_eq!(scratch.names(), ["tree"]);
        options.spec.skip_unreadable = true;
        let report = build(&file, &options).unwrap();
        assert_eq!(report.warnings.len(), 3, "{:?}", report.warnings);
        let found: Vec<_> =
            image::read(&file).into_keys().map(|key| String::from_utf8(key).unwrap()).collect();
        assert_eq!(found, ["", "open", "open/b"]);
        mode("closed", 0o700);
    });
}

#[test]
fn what_no_inode_can_say_is_named() {
    let scratch = Scratch::new();
    let (tree, file) = (tree(&scratch), scratch.path("disk"));
    super::sample::set_time(&tree.join("file"), 1 << 34);
    let found = super::sample::read(&tree)[&b"file"[..]].mtime.0;
    let error = build(&file, &options(16 * MIB, &tree));
    if found == 1 << 34 {
        let error = error.unwrap_err().to_string();
        assert!(error.contains("/file") && error.contains("2446"), "{error}");
        // But a build has a latest time.
        let time = Some(Time { seconds: 1_000_000_000, nanoseconds: 0 });
        build(&file, &BuildOptions { time, ..options(16 * MIB, &tree) }).unwrap();
    } else {
        // The host's filesystem cannot say it either.
        error.unwrap();
    }
}

/// Holes of an archive's file cost nothing, however large they are, while it waits for the image's size.
#[test]
fn a_file_that_is_mostly_hole_waits_for_its_size() {
    let scratch = Scratch::new();
    let (tree, archive, file) = (scratch.path("tree"), scratch.path("a.tar"), scratch.path("disk"));
    std::fs::create_dir(&tree).unwrap();
    let sparse = std::fs::File::create(tree.join("sparse")).unwrap();
    for at in [0, 1 << 40, 5 << 40] {
        std::os::unix::fs::FileExt::write_all_at(&sparse, &noise(5000), at).unwrap();
    }
    sparse.set_len((8 << 40) + 1).unwrap();
    let mut tar = Command::new("tar");
    tar.args(["--create", "--sparse", "--format=pax", "--file"]).arg(&archive).arg("-C").arg(&tree).arg(".");
    assert!(tar.status().unwrap().success());
    let options = BuildOptions { size: auto(Spare::Bytes(0)), verify: true, ..options(0, &archive) };
    let report = build(&file, &options).unwrap();
    image::check(&file);
    assert_eq!(report.counts.bytes, 6 * 4096);
}
