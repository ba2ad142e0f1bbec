//! Filesystems that the kernel wrote to, mounted through a loop device: needs root.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vbd_ext4::read::{Error, Filesystem, Links, Options, Part};
use vbd_testing::Mounted;

use crate::sample::{self, same};
use crate::support::{image, open, run, text};

/// Compares an image with what the kernel shows of it.
#[track_caller]
fn compare(filesystem: &Filesystem, image: &Path) {
    let mounted = Mounted::new(image, "ro");
    same(sample::of_host(mounted.path()), sample::of_image(filesystem), |_, _| {});
}

#[test]
fn all_that_the_kernel_writes() {
    for arguments in [
        &["-t", "ext4", "-b", "4096"][..],
        &["-t", "ext4", "-b", "4096", "-O", "inline_data,ea_inode,large_dir", "-I", "256"],
        &["-t", "ext4", "-b", "1024", "-O", "^metadata_csum"],
        &["-t", "ext3", "-b", "4096"],
        &["-t", "ext2", "-b", "1024"],
    ] {
        let directory = tempfile::tempdir().unwrap();
        let image = image(directory.path(), None, "80M", arguments);
        {
            let mounted = Mounted::new(&image, "user_xattr,acl");
            let tree = mounted.path().join("tree");
            fs::create_dir(&tree).unwrap();
            sample::fill(&tree);
            sample::decorate(&tree);
            if arguments.iter().any(|argument| argument.contains("ea_inode")) {
                let value = sample::noise(40_000, 9);
                rustix::fs::setxattr(tree.join("hard"), "user.huge", &value, rustix::fs::XattrFlags::empty())
                    .unwrap();
                // Names and content that begin in the inode and go on in its attribute.
                fs::create_dir(tree.join("small")).unwrap();
                for name in ["one", "two", "a somewhat longer name", "more"] {
                    fs::write(tree.join("small").join(name), name).unwrap();
                }
            }
            let file = File::create(tree.join("reserved")).unwrap();
            file.write_all_at(b"written", 100_000).unwrap();
            let _ = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 300_000);
            // Extents without end, so that the tree has levels.
            let pieces = File::create(tree.join("pieces")).unwrap();
            for piece in 0..600 {
                pieces.write_all_at(b"piece", piece * 8192).unwrap();
                if piece % 50 == 0 {
                    pieces.sync_all().unwrap();
                }
            }
        }
        let filesystem = open(&image).unwrap();
        assert_eq!((filesystem.replayed(), filesystem.notes()), (0, &[][..]));
        compare(&filesystem, &image);
    }
}

/// The image as it is while it is mounted, which is what a machine that lost its power leaves.
fn cut(mounted: &Mounted, image: &Path, name: &str) -> PathBuf {
    let copy = image.with_file_name(name);
    // What is committed is in the journal; nothing is asked to be in its place.
    File::open(mounted.path().join("marker")).unwrap().sync_all().unwrap();
    run("cp", &["--sparse=always", text(image), text(&copy)]);
    copy
}

fn changes(root: &Path) {
    let tree = root.join("tree");
    fs::create_dir(&tree).unwrap();
    sample::fill(&tree);
    sample::decorate(&tree);
    File::create(root.join("marker")).unwrap().sync_all().unwrap();
    // Blocks of metadata that are freed, and used for data: the journal has to revoke them.
    for round in 0..3 {
        for number in 0..300 {
            fs::create_dir(root.join(format!("directory {round} {number}"))).unwrap();
        }
        File::open(root.join("marker")).unwrap().sync_all().unwrap();
        for number in 0..300 {
            fs::remove_dir(root.join(format!("directory {round} {number}"))).unwrap();
        }
        File::open(root.join("marker")).unwrap().sync_all().unwrap();
        let data = sample::noise(3 << 20, round);
        let file = File::create(root.join(format!("data {round}"))).unwrap();
        file.write_all_at(&data, 0).unwrap();
        file.sync_all().unwrap();
    }
    // Data that looks like a block of the journal, which has to be escaped where data is in the journal.
    let magic = [0xC0, 0x3B, 0x39, 0x98, 0, 0, 0, 1, 0, 0, 0, 2];
    let file = File::create(root.join("magic")).unwrap();
    file.write_all_at(&magic.repeat(4096), 0).unwrap();
    file.sync_all().unwrap();
    fs::rename(root.join("tree/a"), root.join("renamed")).unwrap();
}

#[test]
fn a_journal_that_was_not_replayed() {
    for (arguments, options) in [
        (&["-t", "ext4", "-b", "4096"][..], "commit=300"),
        (&["-t", "ext4", "-b", "1024", "-J", "size=16"], "data=journal"),
        (&["-t", "ext4", "-b", "4096", "-O", "^metadata_csum,^64bit"], "commit=300,data=journal"),
        (&["-t", "ext4", "-b", "1024", "-O", "^metadata_csum,64bit"], "journal_checksum,commit=300"),
        (&["-t", "ext3", "-b", "1024"], "commit=300"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let image = image(directory.path(), None, "120M", arguments);
        let copy = {
            let mounted = Mounted::new(&image, options);
            changes(mounted.path());
            cut(&mounted, &image, "copy")
        };
        let filesystem = open(&copy).unwrap_or_else(|error| panic!("{arguments:?} {options}: {error}"));
        assert!(filesystem.replayed() > 0, "{arguments:?} {options}");
        assert_eq!(filesystem.notes(), &[] as &[String]);
        // Without its journal it is not the same.
        let size = copy.metadata().unwrap().len();
        let part = Part::new(File::open(&copy).unwrap(), 0, size);
        let old = Filesystem::open(part, Options { replay: false, ..Options::default() });
        let there = |filesystem: Filesystem| filesystem.lookup(b"renamed/tiny", Links::Keep).is_ok();
        assert!(!old.is_ok_and(there), "{arguments:?} {options}");

        let before = fs::read(&copy).unwrap();
        let ours = sample::of_image(&filesystem);
        assert!(fs::read(&copy).unwrap() == before, "the image was written to");
        // Mounting it replays the journal.
        let mounted = Mounted::new(&copy, "rw");
        same(sample::of_host(mounted.path()), ours, |_, _| {});
    }
}

#[test]
fn fast_commits_are_refused_or_nothing_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let image = image(directory.path(), None, "80M", &["-t", "ext4", "-b", "4096", "-O", "fast_commit"]);
    let copy = {
        let mounted = Mounted::new(&image, "commit=300");
        File::create(mounted.path().join("marker")).unwrap().sync_all().unwrap();
        for number in 0..20 {
            let file = File::create(mounted.path().join(format!("file {number}"))).unwrap();
            file.write_all_at(b"content", 0).unwrap();
            file.sync_all().unwrap();
        }
        cut(&mounted, &image, "copy")
    };
    match open(&copy) {
        // Which of the two it is, the kernel decides; this one makes fast commits here.
        Err(error @ Error::Unsupported { .. }) => {
            assert!(error.to_string().contains("fast commits"), "{error}")
        }
        Err(error) => panic!("{error}"),
        Ok(filesystem) => {
            let ours = sample::of_image(&filesystem);
            let mounted = Mounted::new(&copy, "rw");
            same(sample::of_host(mounted.path()), ours, |_, _| {});
        }
    }
}

/// What is damaged at the end of a journal is as if it had never been there; before the end it is an error.
#[test]
fn a_damaged_journal() {
    let directory = tempfile::tempdir().unwrap();
    let image = image(directory.path(), None, "80M", &["-t", "ext4", "-b", "4096"]);
    let copy = {
        let mounted = Mounted::new(&image, "commit=300");
        File::create(mounted.path().join("marker")).unwrap().sync_all().unwrap();
        for number in 0..20 {
            let file = File::create(mounted.path().join(format!("file {number}"))).unwrap();
            file.write_all_at(b"content", 0).unwrap();
            file.sync_all().unwrap();
        }
        cut(&mounted, &image, "copy")
    };
    let whole = fs::read(&copy).unwrap();
    let replayed = open(&copy).unwrap().replayed();
    assert!(replayed > 10);
    // Every block of the journal that is a commit (type 2) or a descriptor (type 1), in the order of their numbers.
    let mut blocks: Vec<(u32, u32, usize)> = Vec::new();
    for (number, block) in whole.chunks_exact(4096).enumerate() {
        let word = |at: usize| u32::from_be_bytes(block[at..at + 4].try_into().unwrap());
        if word(0) == 0xC03B_3998 && [1, 2].contains(&word(4)) {
            blocks.push((word(8), word(4), number * 4096));
        }
    }
    blocks.sort_unstable();
    let damage = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&copy, bytes).unwrap();
        open(&copy)
    };
    let last_commit = blocks.iter().rev().find(|block| block.1 == 2).unwrap();
    let filesystem = damage(last_commit.2 + 100).unwrap();
    assert_eq!(filesystem.replayed(), replayed - 1);
    assert!(
        filesystem.notes()[0].contains(&format!("transaction {}", last_commit.0)),
        "{:?}",
        filesystem.notes()
    );
    assert!(
        filesystem.lookup(b"file 18", Links::Keep).is_ok()
            && filesystem.lookup(b"file 19", Links::Keep).is_err()
    );

    let first_descriptor = blocks.iter().find(|block| block.1 == 1).unwrap();
    let error = damage(first_descriptor.2 + 100).err().unwrap().to_string();
    assert!(error.contains("of the journal: the checksum is wrong"), "{error}");
    // A block of data is noticed when it is looked at.
    let filesystem = damage(first_descriptor.2 + 4096 + 100);
    assert!(filesystem.is_ok());
}
