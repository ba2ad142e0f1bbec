//! Cpio archives and squashfs images, made by those who make them, beside the tree they came from.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vbd_fs::BuildOptions;
use vbd_fs::Filesystem;

use super::compare::assert_same;
use super::sample::{self, Tree};
use super::setting::{MIB, Scratch, as_ordinary_user, build, options};
use super::{image, setting};

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A shell's command, in a directory.
fn shell(directory: &Path, command: &str) {
    run(Command::new("sh").args(["-c", &format!("set -e; {command}")]).current_dir(directory));
}

/// A tree with one of everything in `tree`, and what it is.
fn tree(scratch: &Scratch, without: &[&str]) -> (PathBuf, Tree) {
    let tree = scratch.path("tree");
    std::fs::create_dir(&tree).unwrap();
    sample::make(&tree);
    for name in without.iter().filter(|name| tree.join(name).symlink_metadata().is_ok()) {
        std::fs::remove_file(tree.join(name)).unwrap();
    }
    if let Ok(hole) = File::options().write(true).open(tree.join("hole")) {
        // Packers read all of it.
        hole.set_len(100 << 20).unwrap();
    }
    for directory in ["dir/deep", "dir", ""] {
        sample::set_time(&tree.join(directory), 1_234_567_890);
    }
    let mut expected = sample::read(&tree);
    expected.values_mut().for_each(|entry| entry.mtime.1 = 0);
    (tree, expected)
}

/// Builds from an archive and compares.
fn compare(scratch: &Scratch, archive: &Path, expected: &Tree) {
    let file = scratch.path("disk");
    let options = BuildOptions { verify: true, force: true, ..options(64 * MIB, archive) };
    build(&file, &options).unwrap_or_else(|e| panic!("{}: {e}", archive.display()));
    image::check(&file);
    assert_same(expected, &image::read(&file));
}

fn squashfs(tree: &Path, archive: &Path, arguments: &[&str]) {
    let mut command = Command::new("mksquashfs");
    command.arg(tree).arg(archive).args(["-noappend", "-no-progress", "-quiet", "-no-exports"]);
    run(command.args(["-processors", "2"]).args(arguments));
}

/// The kernel's squashfs has no ACLs, nor does mksquashfs keep them.
fn without_acls(tree: &mut Tree) {
    for entry in tree.values_mut() {
        entry.xattrs.retain(|name, _| !name.starts_with("system."));
    }
}

#[test]
fn every_compression_of_squashfs_keeps_everything() {
    let scratch = Scratch::new();
    // A hole of this size costs mksquashfs more than all the rest.
    let (tree, mut expected) = tree(&scratch, &["hole"]);
    without_acls(&mut expected);
    for compression in ["gzip", "lzma", "lzo", "xz", "lz4", "zstd"] {
        let archive = scratch.path(compression);
        squashfs(&tree, &archive, &["-comp", compression]);
        compare(&scratch, &archive, &expected);
    }
}

#[test]
fn every_layout_of_squashfs_is_read() {
    let scratch = Scratch::new();
    let (tree, mut expected) = tree(&scratch, &["dir/large", "also large", "dir/deep/large too"]);
    without_acls(&mut expected);
    for arguments in [
        &["-b", "4096"][..],
        &["-b", "1M", "-always-use-fragments"],
        &["-no-fragments", "-noI", "-noD"],
        &["-noF", "-noX", "-noId", "-exports"],
        &["-Xcompression-level", "1", "-comp", "zstd", "-no-duplicates"],
    ] {
        let archive = scratch.path("a.squashfs");
        squashfs(&tree, &archive, arguments);
        compare(&scratch, &archive, &expected);
    }
    // Without attributes there is no table of them.
    let archive = scratch.path("a.squashfs");
    squashfs(&tree, &archive, &["-no-xattrs"]);
    expected.values_mut().for_each(|entry| entry.xattrs.clear());
    compare(&scratch, &archive, &expected);
}

#[test]
fn squashfs_comes_through_a_pipe_and_compressed() {
    let scratch = Scratch::new();
    let (tree, mut expected) = tree(&scratch, &["hole"]);
    without_acls(&mut expected);
    let archive = scratch.path("a.squashfs");
    squashfs(&tree, &archive, &["-comp", "lz4"]);
    let pipe = scratch.path("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| std::io::copy(&mut File::open(&archive).unwrap(), &mut File::create(&pipe).unwrap()));
        compare(&scratch, &pipe, &expected);
    });
    run(Command::new("zstd").arg("-q").arg(&archive));
    compare(&scratch, &scratch.path("a.squashfs.zst"), &expected);
}

#[test]
fn an_ordinary_user_unpacks_squashfs_and_cpio_to_ext3() {
    as_ordinary_user("packed::an_ordinary_user_unpacks_squashfs_and_cpio_to_ext3", || {
        let scratch = Scratch::new();
        let (tree, mut expected) = tree(&scratch, &["hole", "socket"]);
        without_acls(&mut expected);
        let archive = scratch.path("archive");
        squashfs(&tree, &archive, &[]);
        let mut options = options(64 * MIB, &archive);
        options.spec.filesystem = Filesystem::Ext3;
        options.force = true;
        let file = scratch.path("disk");
        build(&file, &options).unwrap();
        image::check(&file);
        assert_same(&expected, &image::read(&file));
        shell(&tree, "find . -print0 | cpio --quiet --null -o -H newc >../archive");
        build(&file, &options).unwrap();
        image::check(&file);
        expected.values_mut().for_each(|entry| entry.xattrs.clear());
        assert_same(&expected, &image::read(&file));
    });
}

#[test]
fn cpio_archives_keep_what_their_format_can() {
    let scratch = Scratch::new();
    // A hole becomes zeros, of which there would be too many.
    let (tree, mut expected) = tree(&scratch, &["hole"]);
    expected.values_mut().for_each(|entry| entry.xattrs.clear());
    let archive = scratch.path("archive");
    for command in [
        "find . -print0 | cpio --quiet --null -o -H newc >../archive",
        "find . -print0 | cpio --quiet --null -o -H crc | gzip >../archive",
        "find . -depth -print0 | cpio --quiet --null -o -H newc | xz -1 >../archive",
        "find . -print0 | cpio --quiet --null -o --reproducible -H newc | zstd -q >../archive",
    ] {
        shell(&tree, command);
        compare(&scratch, &archive, &expected);
    }
    shell(&tree, "bsdtar --format newc -cf ../archive .");
    compare(&scratch, &archive, &expected);
}

#[test]
fn the_old_format_has_each_name_of_a_file_with_its_data() {
    let scratch = Scratch::new();
    let (tree, mut expected) = tree(&scratch, &["hole", "disk"]);
    let archive = scratch.path("archive");
    if setting::is_root() {
        // A group has 18 bits.
        run(Command::new("chgrp").arg("200000").arg(tree.join("dir/deep")));
        expected.get_mut(&b"dir/deep"[..]).unwrap().gid = 200_000;
    }
    expected.values_mut().for_each(|entry| entry.xattrs.clear());
    for packer in
        ["find . -print0 | cpio --quiet --null -o -H odc >../archive", "bsdtar --format odc -cf ../archive ."]
    {
        shell(&tree, packer);
        compare(&scratch, &archive, &expected);
    }
}

/// As an initramfs is: microcode that is not compressed, then parts that are, with zeros between them.
#[test]
fn archives_that_follow_each_other_are_one_tree() {
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    std::fs::create_dir(&tree).unwrap();
    shell(
        &tree,
        "pack() { cpio --quiet -o -H newc; }
         mkdir -p a/kernel b/etc b/bin c/etc
         echo code >a/kernel/microcode; echo one >b/etc/kept; echo old >b/etc/changed; ln b/etc/kept b/bin/other
         echo new >c/etc/changed; ln -s kept c/etc/link
         (cd a; find . | pack) >../archive
         (cd b; find . | pack | zstd -q) >>../archive; head -c 1000 /dev/zero >>../archive
         (cd c; find . | pack | gzip) >>../archive; (cd a; echo kernel | pack | xz) >>../archive",
    );
    let file = scratch.path("disk");
    build(&file, &options(16 * MIB, &scratch.path("archive"))).unwrap();
    image::check(&file);
    let entries = image::read(&file);
    let names: Vec<_> = entries.keys().map(|name| String::from_utf8_lossy(name)).collect();
    assert_eq!(
        names,
        ["", "bin", "bin/other", "etc", "etc/changed", "etc/kept", "etc/link", "kernel", "kernel/microcode"]
    );
    let read = |path| image::cat(&file, path);
    assert_eq!(
        [read("/etc/changed"), read("/bin/other"), read("/kernel/microcode")],
        ["new\n", "one\n", "code\n"]
    );
    assert_eq!(image::entry(&file, "/etc/kept").links, 2);
}

/// An entry of a "newc" archive: number of its inode and names, mode, name and data.
fn entry((inode, links): (u32, u32), mode: u32, name: &str, data: &[u8]) -> Vec<u8> {
    let numbers = [inode, mode, 7, 8, links, 1_600_000_000, u32::try_from(data.len()).unwrap(), 0, 0, 0, 0];
    let mut bytes = b"070701".to_vec();
    for number in numbers.into_iter().chain([u32::try_from(name.len()).unwrap() + 1, 0]) {
        bytes.extend(format!("{number:08x}").bytes());
    }
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn trailer() -> Vec<u8> {
    entry((0, 1), 0, "TRAILER!!!", b"")
}

fn from_bytes(bytes: &[u8]) -> Result<(Scratch, PathBuf), String> {
    let scratch = Scratch::new();
    let archive = scratch.path("archive");
    std::fs::write(&archive, bytes).unwrap();
    let file = scratch.path("disk");
    build(&file, &options(16 * MIB, &archive)).map_err(|e| e.to_string())?;
    image::check(&file);
    Ok((scratch, file))
}

#[test]
fn the_data_of_a_file_comes_with_any_of_its_names() {
    const FILE: u32 = 0o100_644;
    for with in 0..3 {
        let mut bytes: Vec<u8> = Vec::new();
        for (number, name) in ["a", "b", "d/c"].iter().enumerate() {
            bytes.extend(entry((5, 3), FILE, name, if number == with { b"data" } else { b"" }));
        }
        bytes.extend(trailer());
        let (_scratch, file) = from_bytes(&bytes).unwrap();
        for name in ["/a", "/b", "/d/c"] {
            assert_eq!(image::cat(&file, name), "data", "with {with}: {name}");
            assert_eq!(image::entry(&file, name).links, 3);
        }
    }
    // A name that another entry took is not given back to the file.
    let bytes = [
        entry((5, 3), FILE, "a", b""),
        entry((6, 1), FILE, "a", b"other"),
        entry((5, 3), FILE, "b", b"data"),
        trailer(),
    ];
    let (_scratch, file) = from_bytes(&bytes.concat()).unwrap();
    assert_eq!([image::cat(&file, "/a"), image::cat(&file, "/b")], ["other", "data"]);
    // The same number, but not the same file.
    let bytes = [entry((5, 2), FILE, "a", b"one"), entry((5, 2), FILE, "b", b"other"), trailer()];
    let (_scratch, file) = from_bytes(&bytes.concat()).unwrap();
    assert_eq!([image::cat(&file, "/a"), image::cat(&file, "/b")], ["one", "other"]);
}

#[test]
fn damaged_and_hostile_cpio_archives_are_refused() {
    let file = |name: &str| entry((1, 1), 0o100_644, name, b"text");
    for (bytes, reason) in [
        ([file("/etc/passwd"), trailer()].concat(), "is absolute"),
        ([file("a/../../b"), trailer()].concat(), "leads out of the tree by '..'"),
        (file("a"), "is truncated"),
        (file("a")[..100].to_vec(), "is truncated"),
        ([file("a"), trailer(), b"more".to_vec()].concat(), "goes on after its end"),
        ([file("a"), b"070701 what is this".repeat(20)].concat(), "a header has a number that is none"),
        ([file("a"), b"x".repeat(200)].concat(), "where a header must be there is none"),
        ([entry((1, 1), 0o040_755, "d", b"data"), trailer()].concat(), "which its type cannot have"),
        ([entry((1, 1), 0o150_644, "x", b""), trailer()].concat(), "has the unknown type 150000"),
        ([entry((1, 1), 0o100_644, ".", b""), trailer()].concat(), "is the root, but no directory"),
        ([entry((1, 1), 0o120_777, "l", &[b'x'; 5000]), trailer()].concat(), "one too long"),
        ([file("a"), file("a/b"), trailer()].concat(), "leads through a, which is no directory"),
        (b"\xc7\x71\0\0\0\0\0\0".to_vec(), "old binary format"),
        (b"BZh91AY&SY".to_vec(), "bzip2"),
    ] {
        let refused = from_bytes(&bytes).err().unwrap_or_else(|| panic!("not refused: {reason}"));
        assert!(refused.contains(reason), "{refused}, not {reason}");
    }
    // A sum that does not match, and one that does.
    let mut sums = [file("a"), trailer()].concat();
    sums[5] = b'2';
    sums[file("a").len() + 5] = b'2';
    assert!(from_bytes(&sums).err().unwrap().contains("the sum of its bytes is 453 and must be 0"));
    sums[102..110].copy_from_slice(b"000001c5");
    from_bytes(&sums).unwrap();
}

#[test]
fn damaged_squashfs_images_are_refused() {
    let scratch = Scratch::new();
    let (tree, archive) = (scratch.path("tree"), scratch.path("a.squashfs"));
    std::fs::create_dir_all(tree.join("dir")).unwrap();
    std::fs::write(tree.join("dir/file"), b"some text ".repeat(30_000)).unwrap();
    squashfs(&tree, &archive, &[]);
    let good = std::fs::read(&archive).unwrap();
    let change = |at: usize, bytes: &[u8]| {
        let mut damaged = good.clone();
        damaged[at..at + bytes.len()].copy_from_slice(bytes);
        from_bytes(&damaged).err().unwrap_or_else(|| panic!("not refused: {at}"))
    };
    for (at, bytes, reason) in [
        (0, &b"sqsh"[..], "big-endian"),
        (28, &[3, 0], "version 3.0"),
        (20, &[9, 0], "compressed in the unknown way 9"),
        (12, &[0, 0, 0, 1], "blocks of"),
        (40, &[0xff; 7], "is cut off"),
        (64, &[0xff; 8], "its tables are not where they can be"),
        (32, &[0xff; 8], "leads out of a table"),
        (48, &[0xff; 7], "no room for its tables"),
        // The first block of the file.
        (96, &[0; 100], "damaged block"),
    ] {
        let refused = change(at, bytes);
        assert!(refused.contains(reason), "{at}: {refused}, not {reason}");
    }
    // Behind what it says of its length there is padding.
    let used = usize::from(good[40]) | usize::from(good[41]) << 8;
    from_bytes(&good[..used]).unwrap();
    let refused = from_bytes(&good[..used - 1]).err().unwrap();
    assert!(refused.contains("is cut off"), "{refused}");
}
