//! `vbd check` and `vbd compact`: images of mke2fs, raw and in partitions.

mod common;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Output};

use common::refused;
use vbd_image::partition::{Format, Guid, Kind, Partition, Table, kind};

const MIB: u64 = 1 << 20;

fn vbd(arguments: &[&str], image: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vbd")).args(arguments).arg(image).output().unwrap()
}

/// What a verb prints that has to succeed.
#[track_caller]
fn done(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A program that has to succeed.
#[track_caller]
fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}

/// An ext4 of that size at an offset of a file, with a tree in it.
fn ext4(image: &Path, offset: u64, size: u64, tree: &Path) {
    let file = File::options().create(true).truncate(false).write(true).open(image).unwrap();
    file.set_len(file.metadata().unwrap().len().max(offset + size)).unwrap();
    let (offset, blocks) = (format!("offset={offset}"), format!("{}k", size / 1024));
    let (tree, image) = (tree.to_str().unwrap(), image.to_str().unwrap());
    run("mke2fs", &["-qF", "-t", "ext4", "-E", &offset, "-d", tree, image, &blocks]);
}

/// A whole disk: an ext4 of 32 MiB in its second partition.
fn disk(image: &Path, tree: &Path) {
    let size = 48 * MIB;
    File::create(image).unwrap().set_len(size).unwrap();
    let mut table = Table::new(Format::Gpt(Guid(7)), 512);
    for (number, start, length, kind) in [(1, MIB, MIB, kind::ESP), (2, 4 * MIB, 32 * MIB, kind::LINUX)] {
        table.partitions.push(Partition {
            number,
            start,
            size: length,
            kind: Kind::Gpt(kind),
            uuid: Some(Guid(u128::from(number))),
            name: String::new(),
            attributes: 0,
        });
    }
    ext4(image, 4 * MIB, 32 * MIB, tree);
    table.write(&File::options().write(true).read(true).open(image).unwrap(), size).unwrap();
}

fn tree(directory: &Path) -> std::path::PathBuf {
    let tree = directory.join("tree");
    std::fs::create_dir_all(tree.join("sub")).unwrap();
    std::fs::write(tree.join("file"), vec![b'f'; 3 << 20]).unwrap();
    std::fs::write(tree.join("sub/small"), "small").unwrap();
    tree
}

#[test]
fn a_clean_image_and_a_damaged_one() {
    let directory = tempfile::tempdir().unwrap();
    let (raw, whole) = (directory.path().join("raw"), directory.path().join("whole"));
    let tree = tree(directory.path());
    ext4(&raw, 0, 32 * MIB, &tree);
    disk(&whole, &tree);
    for image in [&raw, &whole] {
        let text = done(vbd(&["check"], image));
        assert!(text.contains("clean: "), "{text}");
        let json: serde_json::Value = serde_json::from_str(&done(vbd(&["check", "--json"], image))).unwrap();
        assert_eq!(json["clean"], true);
        assert_eq!(json["filesystems"].as_array().unwrap().len(), 1);
    }

    let start = 4 * MIB;
    // The free blocks that the superblock tells, its checksum left alone, and the table's backup.
    let file = File::options().write(true).open(&whole).unwrap();
    file.write_all_at(&[1, 2], start + 1024 + 12).unwrap();
    file.write_all_at(&[0; 512], 48 * MIB - 512).unwrap();
    let output = vbd(&["check"], &whole);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    assert!(text.contains("the partition table has no valid backup"), "{text}");
    assert!(text.contains("partition 2: the superblock: the checksum is wrong"), "{text}");

    let json = vbd(&["check", "--json", "--repair"], &whole);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["filesystems"][0]["clean"], true, "{json}");
    assert_eq!(json["clean"], false, "the table is not repaired: {json}");
}

#[test]
fn what_cannot_be_checked_is_no_damage() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    refused(&vbd(&["check"], &missing), 2, &["missing", "no such file"]);
    let empty = directory.path().join("empty");
    File::create(&empty).unwrap().set_len(MIB).unwrap();
    let output = vbd(&["check"], &empty);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("no partition table"), "{output:?}");
    refused(&vbd(&["compact"], &empty), 1, &["no ext2, ext3 or ext4"]);
}

#[test]
fn free_blocks_become_holes() {
    let directory = tempfile::tempdir().unwrap();
    let tree = tree(directory.path());
    for whole in [false, true] {
        let image = directory.path().join("image");
        let _ = std::fs::remove_file(&image);
        if whole {
            disk(&image, &tree)
        } else {
            ext4(&image, 0, 32 * MIB, &tree)
        };
        let offset = if whole { 4 * MIB } else { 0 };
        // What nothing uses any more: a file of 8 MiB that was there.
        let name = format!("{}?offset={offset}", image.display());
        let garbage = directory.path().join("garbage");
        std::fs::write(&garbage, vec![0xaa; 8 << 20]).unwrap();
        let garbage = garbage.to_str().unwrap();
        run("debugfs", &["-w", "-R", &format!("write {garbage} garbage"), &name]);
        run("debugfs", &["-w", "-R", "rm garbage", &name]);
        let before = (image.metadata().unwrap(), content(&image));
        assert!(before.0.blocks() * 512 > 11 * MIB);

        let json: serde_json::Value =
            serde_json::from_str(&done(vbd(&["compact", "--json"], &image))).unwrap();
        assert!(json["punched"].as_u64().unwrap() >= 7 * MIB, "{json}");
        let after = image.metadata().unwrap();
        assert!(after.blocks() * 512 <= before.0.blocks() * 512 - 7 * MIB, "{json}");
        assert_eq!((after.len(), content(&image)), (before.0.len(), before.1));
        run("e2fsck", &["-fn", &name]);
        done(vbd(&["check"], &image));
        // There is nothing left to do.
        let again: serde_json::Value =
            serde_json::from_str(&done(vbd(&["compact", "--json"], &image))).unwrap();
        assert_eq!(again["punched"], 0);

        // Where free blocks cannot be known, nothing is touched.
        File::options().write(true).open(&image).unwrap().write_all_at(b"x", offset + 1024 + 12).unwrap();
        refused(&vbd(&["compact"], &image), 1, &["damaged", "vbd check"]);
    }
}

/// Everything in the filesystem as a tar.
fn content(image: &Path) -> Vec<u8> {
    let output = vbd(&["tar"], image);
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

/// The size of the filesystem, in bytes.
fn size(image: &Path) -> u64 {
    let json: serde_json::Value = serde_json::from_str(&done(vbd(&["df", "--json"], image))).unwrap();
    let found = if json.is_array() { &json[0] } else { &json };
    found["size"].as_u64().unwrap()
}

#[test]
fn images_grow_and_shrink() {
    let directory = tempfile::tempdir().unwrap();
    let tree = tree(directory.path());
    for whole in [false, true] {
        let image = directory.path().join("image");
        let _ = std::fs::remove_file(&image);
        if whole {
            disk(&image, &tree)
        } else {
            ext4(&image, 0, 32 * MIB, &tree)
        };
        let (start, before) = (if whole { 4 * MIB } else { 0 }, content(&image));
        let fsck = format!("{}?offset={start}", image.display());

        done(vbd(&["grow", "--size", "200M"], &image));
        assert_eq!(image.metadata().unwrap().len(), 200 * MIB);
        assert!(size(&image) >= 200 * MIB - start - 2 * MIB);
        run("e2fsck", &["-fn", &fsck]);
        done(vbd(&["check"], &image));
        assert_eq!(content(&image), before);
        // Only the file; then the rest, by the same command as it would be after a cut.
        done(vbd(&["grow", "--size", "250M", "--file-only"], &image));
        assert!(size(&image) <= 200 * MIB);
        done(vbd(&["grow", "--size", "250M"], &image));
        assert!(size(&image) >= 250 * MIB - start - 2 * MIB);
        done(vbd(&["check"], &image));
        refused(&vbd(&["grow", "--size", "100M"], &image), 1, &["vbd shrink"]);

        done(vbd(&["shrink", "--to", "64M"], &image));
        assert_eq!(image.metadata().unwrap().len(), 64 * MIB);
        assert!(size(&image) <= 64 * MIB - start);
        run("e2fsck", &["-fn", &fsck]);
        done(vbd(&["check"], &image));
        assert_eq!(content(&image), before);
        let bytes = std::fs::read(&image).unwrap();
        refused(&vbd(&["shrink", "--to", "6M"], &image), 1, &["image"]);
        refused(&vbd(&["shrink", "--to", "64M"], &image), 1, &["vbd grow"]);
        assert!(std::fs::read(&image).unwrap() == bytes, "what fails changes nothing");
        assert_eq!(common::names(directory.path()).len(), 2, "{:?}", common::names(directory.path()));
    }
}

#[test]
fn what_cannot_grow_is_refused_before_the_first_write() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    File::create(&image).unwrap().set_len(16 * MIB).unwrap();
    run("mke2fs", &["-qF", "-t", "ext2", image.to_str().unwrap()]);
    refused(&vbd(&["grow", "--size", "64M"], &image), 1, &["no journal", "--file-only"]);
    assert_eq!(image.metadata().unwrap().len(), 16 * MIB);
    done(vbd(&["grow", "--size", "64M", "--file-only"], &image));
    assert_eq!(image.metadata().unwrap().len(), 64 * MIB);
}
