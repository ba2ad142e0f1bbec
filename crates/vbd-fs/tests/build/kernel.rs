//! What the kernel finds in an image: random trees, and blocks shared with the source. These need root and loop devices.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::fs::{CWD, FileType, Mode};
use vbd_fs::BuildOptions;
use vbd_testing::Mounted;

use super::compare::assert_same;
use super::sample::{self, noise};
use super::setting::{MIB, Scratch, build, is_root, options, with_own_mounts};
use super::{image, setting};

/// Fails unless the kernel finds in the image what is in the tree.
fn assert_kernel_finds(tree: &Path, file: &Path, at: PathBuf) {
    let mounted = Mounted::at(file, &at, "ro");
    let mut found = sample::read(mounted.path());
    assert!(found.remove(&b"lost+found"[..]).is_some());
    assert_same(&sample::read(tree), &found);
}

#[derive(Debug, Clone)]
enum Kind {
    Directory,
    /// Pieces of data after gaps, and a gap at the end.
    File(Vec<(u64, usize)>, u64),
    Symlink(usize),
    Link(prop::sample::Index),
    Device(u32, u32),
}

#[derive(Debug, Clone)]
struct Entry {
    kind: Kind,
    parent: prop::sample::Index,
    name: Vec<u8>,
    mode: u32,
    owner: (u32, u32),
    time: (i64, u32),
    xattr: Option<(u8, usize)>,
}

fn entries() -> impl Strategy<Value = Entry> {
    let piece =
        (prop_oneof![Just(0u64), 1..20_000u64, Just(5 << 20)], prop_oneof![0..100usize, 4000..9000usize]);
    let kind = prop_oneof![
        2 => Just(Kind::Directory),
        6 => (prop::collection::vec(piece, 0..6), 0..9000u64).prop_map(|(pieces, end)| Kind::File(pieces, end)),
        1 => (1..4000usize).prop_map(Kind::Symlink),
        1 => any::<prop::sample::Index>().prop_map(Kind::Link),
        1 => (0..4096u32, 0..1u32 << 20).prop_map(|(major, minor)| Kind::Device(major, minor)),
    ];
    let byte = any::<u8>().prop_map(|b| if matches!(b, 0 | b'/') { b'_' } else { b });
    let name = prop_oneof![3 => prop::collection::vec(byte.clone(), 1..20), 1 => prop::collection::vec(byte, 200..250)];
    let time = (-(1i64 << 31)..(1i64 << 34) - (1 << 31), 0..1_000_000_000u32);
    let xattr = prop::option::weighted(0.3, (0..4u8, 0..3000usize));
    (kind, any::<prop::sample::Index>(), name, 0..0o10000u32, any::<(u32, u32)>(), time, xattr).prop_map(
        |(kind, parent, name, mode, owner, time, xattr)| {
            // The highest number means "leave it" to chown.
            let owner = (owner.0.min(u32::MAX - 1), owner.1.min(u32::MAX - 1));
            Entry { kind, parent, name, mode, owner, time, xattr }
        },
    )
}

/// Makes a tree of these; what cannot be is left out.
fn make(root: &Path, entries: &[Entry]) {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let (mut directories, mut files) = (vec![root.to_owned()], Vec::new());
    let mut made: Vec<(PathBuf, &Entry)> = Vec::new();
    for (number, entry) in entries.iter().enumerate() {
        let mut name = format!("{number}-").into_bytes();
        name.extend_from_slice(&entry.name);
        let path = entry.parent.get(&directories).join(OsStr::from_bytes(&name));
        match &entry.kind {
            Kind::Directory => {
                // Deeper paths than calls take are for another test.
                if path.as_os_str().len() > 2500 {
                    continue;
                }
                fs::create_dir(&path).unwrap();
                directories.push(path.clone());
            }
            Kind::File(pieces, end) => {
                let file = fs::File::create(&path).unwrap();
                let mut at = 0;
                for &(gap, length) in pieces {
                    at += gap;
                    file.write_all_at(&noise(length), at).unwrap();
                    at += length as u64;
                }
                file.set_len(at + end).unwrap();
                files.push(path.clone());
            }
            Kind::Symlink(length) => symlink("t".repeat(*length), &path).unwrap(),
            Kind::Link(to) => {
                if !files.is_empty() {
                    fs::hard_link(to.get(&files), &path).unwrap();
                }
                continue;
            }
            Kind::Device(major, minor) => {
                let device = rustix::fs::makedev(*major, *minor);
                rustix::fs::mknodat(CWD, &path, FileType::BlockDevice, Mode::empty(), device).unwrap();
            }
        }
        made.push((path, entry));
    }
    for (path, entry) in made.iter().rev() {
        std::os::unix::fs::lchown(path, Some(entry.owner.0), Some(entry.owner.1)).unwrap();
        if !matches!(entry.kind, Kind::Symlink(_)) {
            fs::set_permissions(path, PermissionsExt::from_mode(entry.mode)).unwrap();
        }
        if let Some((name, length)) = entry.xattr {
            sample::set_xattr(path, &format!("trusted.x{name}"), &noise(length)).unwrap();
        }
        sample::set_precise_time(path, entry.time);
    }
}

#[test]
fn the_kernel_finds_every_random_tree() {
    if !is_root() {
        return;
    }
    with_own_mounts("kernel::the_kernel_finds_every_random_tree", || {
        let config = Config { cases: 12, failure_persistence: None, ..Config::default() };
        let trees = prop::collection::vec(entries(), 0..60);
        let run = TestRunner::new(config).run(&trees, |entries| {
            let scratch = Scratch::new();
            let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
            fs::create_dir(&tree).unwrap();
            make(&tree, &entries);
            build(&file, &BuildOptions { verify: true, ..options(64 * MIB, &tree) }).unwrap();
            image::check(&file);
            assert_kernel_finds(&tree, &file, scratch.path("mounted"));
            Ok(())
        });
        run.unwrap();
    });
}

#[test]
fn the_kernel_finds_the_sample_and_a_large_directory() {
    if !is_root() {
        return;
    }
    with_own_mounts("kernel::the_kernel_finds_the_sample_and_a_large_directory", || {
        let scratch = Scratch::new();
        let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
        fs::create_dir(&tree).unwrap();
        sample::make(&tree);
        let many = tree.join("many");
        fs::create_dir(&many).unwrap();
        for i in 0..20_000 {
            fs::File::create(many.join(format!("a name of some length, number {i}"))).unwrap();
        }
        build(&file, &options(512 * MIB, &tree)).unwrap();
        image::check(&file);
        assert_kernel_finds(&tree, &file, scratch.path("mounted"));
        // Each is found by its name, which is the index's work.
        let mounted = Mounted::at(&file, &scratch.path("mounted"), "ro");
        let found = |i| mounted.path().join(format!("many/a name of some length, number {i}")).exists();
        assert!((0..20_000).all(found));
    });
}

/// A filesystem that can share blocks, in a file.
fn sharing(scratch: &Scratch, make: &[&str]) -> Mounted {
    let file = scratch.path("host");
    fs::File::create(&file).unwrap().set_len(2 << 30).unwrap();
    let made = Command::new(make[0]).args(&make[1..]).arg(&file).output().unwrap();
    assert!(made.status.success(), "{make:?}: {}", String::from_utf8_lossy(&made.stderr));
    Mounted::at(&file, &scratch.path("hosted"), "rw")
}

fn used(at: &Path) -> u64 {
    rustix::fs::sync();
    let stat = rustix::fs::statvfs(at).unwrap();
    (stat.f_blocks - stat.f_bfree) * stat.f_frsize
}

fn shares(name: &str, mkfs: &[&str]) {
    if !is_root() {
        return;
    }
    with_own_mounts(name, || {
        let scratch = Scratch::new();
        let host = sharing(&scratch, mkfs);
        let tree = host.path().join("tree");
        fs::create_dir(&tree).unwrap();
        sample::make(&tree);
        // Whole blocks, a tail, and holes.
        fs::write(tree.join("large"), noise((40 << 20) + 1234)).unwrap();
        fs::write(tree.join("whole"), noise(1 << 20)).unwrap();
        let file = host.path().join("disk");
        let before = used(host.path());
        let report = build(&file, &BuildOptions { verify: true, ..options(256 * MIB, &tree) }).unwrap();
        let taken = used(host.path()) - before;
        assert!(fs::metadata(&file).unwrap().blocks() * 512 > 40 * MIB);
        assert!(taken < 20 * MIB, "{taken} bytes were taken");
        assert!(report.counts.bytes > 40 * MIB);
        image::check(&file);
        assert_kernel_finds(&tree, &file, scratch.path("mounted"));
        // And a copy takes as much as it holds.
        let mut copied = options(256 * MIB, &tree);
        copied.spec.reflink = vbd_fs::Sharing::Never;
        let before = used(host.path());
        build(&host.path().join("copy"), &copied).unwrap();
        assert!(used(host.path()) - before > 40 * MIB);
        assert_eq!(setting::names(host.path()).iter().filter(|name| name.starts_with('.')).count(), 0);
    });
}

#[test]
fn blocks_are_shared_on_xfs() {
    shares("kernel::blocks_are_shared_on_xfs", &["mkfs.xfs", "-q"]);
}

#[test]
fn blocks_are_shared_on_btrfs() {
    shares("kernel::blocks_are_shared_on_btrfs", &["mkfs.btrfs", "-q"]);
}

/// A build with a file of 48 MiB for swapping, checked, for which blocks were to be given out in several groups.
fn with_swap_file(scratch: &Scratch, change: impl Fn(&mut BuildOptions)) -> PathBuf {
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    if !tree.exists() {
        fs::create_dir_all(tree.join("etc")).unwrap();
        fs::write(tree.join("etc/fstab"), "LABEL=root / ext4 defaults 0 1").unwrap();
        // That of the machine that the tree comes from, with holes.
        fs::File::create(tree.join("swapfile")).unwrap().set_len(1 << 40).unwrap();
    }
    let mut options = BuildOptions { verify: true, force: true, ..options(256 * MIB, &tree) };
    options.spec.swap_file = Some("49155K".parse().unwrap());
    change(&mut options);
    build(&file, &options).unwrap();
    image::check(&file);
    let entry = image::entry(&file, "/swapfile");
    assert_eq!((entry.kind, entry.mode), ('f', 0o600));
    let size = String::from_utf8(image::debugfs(&file, "stat /swapfile")).unwrap();
    assert!(size.contains("Size: 50331648"), "{size}");
    // Every block is there, and written.
    assert!(size.contains("Blockcount: 98304") && !size.contains("[u]"), "{size}");
    let fstab = "LABEL=root / ext4 defaults 0 1\n/swapfile\tnone\tswap\tsw\t0\t0\n";
    assert_eq!(image::cat(&file, "/etc/fstab"), fstab);
    // In the image they are holes.
    assert!(fs::metadata(&file).unwrap().blocks() * 512 < 30 * MIB);
    file
}

#[test]
fn the_kernel_swaps_to_the_file_that_was_made_for_it() {
    use vbd_fs::{ImageSize, Spare};

    let scratch = Scratch::new();
    with_swap_file(&scratch, |options| {
        options.time = Some(vbd_fs::Time { seconds: 1_600_000_000, nanoseconds: 0 })
    });
    let auto = ImageSize::Auto { spare: Spare::Bytes(0), minimum: None, maximum: None };
    let smallest = with_swap_file(&scratch, |options| options.size = auto);
    let length = fs::metadata(&smallest).unwrap().len();
    assert!((49 * MIB..58 * MIB).contains(&length), "{length}");
    let mut options = options(32 * MIB, &scratch.path("tree"));
    options.spec.swap_file = Some("49152K".parse().unwrap());
    let error = build(&scratch.path("small"), &options).unwrap_err().to_string();
    assert!(error.contains("not enough room") && error.contains("would do"), "{error}");
    if !is_root() {
        return;
    }
    with_own_mounts("kernel::the_kernel_swaps_to_the_file_that_was_made_for_it", || {
        let scratch = Scratch::new();
        let file = with_swap_file(&scratch, |_| {});
        let mounted = Mounted::at(&file, &scratch.path("mounted"), "rw");
        let swap = mounted.path().join("swapfile");
        let on = Command::new("swapon").arg(&swap).output().unwrap();
        let listed = fs::read_to_string("/proc/swaps").unwrap();
        if on.status.success() {
            assert!(Command::new("swapoff").arg(&swap).status().unwrap().success());
        }
        assert!(on.status.success(), "{}", String::from_utf8_lossy(&on.stderr));
        let line = listed.lines().find(|line| line.contains("swapfile")).unwrap();
        // In KiB, without the header's page.
        assert_eq!(line.split_whitespace().nth(2), Some("49148"), "{line}");
    });
}
