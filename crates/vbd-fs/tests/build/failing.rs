//! Storage that fails in the middle: nothing is left of what is being made, and what was there stays.

use std::path::{Path, PathBuf};
use std::process::Command;

use vbd_fs::upkeep::{self, CloneOptions, Disk};
use vbd_fs::{Silent, Tailor, Time};
use vbd_image::lease::Mode;
use vbd_testing::{Failing, with_failing};

use super::image;
use super::sample::noise;
use super::setting::{MIB, Scratch, build, options};

const NOW: Time = Time { seconds: 1_700_000_000, nanoseconds: 0 };
/// Bytes of the images.
const SIZE: u64 = 64 * MIB;

/// A tree with large and small files, and a directory of several blocks.
fn tree(scratch: &Scratch) -> PathBuf {
    let tree = scratch.path("tree");
    std::fs::create_dir_all(tree.join("etc")).unwrap();
    std::fs::write(tree.join("etc/hostname"), "base\n").unwrap();
    std::fs::write(tree.join("large"), noise(3 << 20)).unwrap();
    for number in 0..40 {
        std::fs::write(tree.join(format!("etc/{number:0200}")), noise(2000)).unwrap();
    }
    tree
}

fn open(path: &Path) -> Disk {
    Disk::open(path, Mode::Write).unwrap()
}

/// All bytes of a file.
fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

fn is_eio(error: &vbd_fs::Error) -> bool {
    error.to_string().contains("Input/output error")
}

#[test]
fn a_build_whose_writes_fail_leaves_nothing() {
    let scratch = Scratch::new();
    let (tree, disk) = (tree(&scratch), scratch.path("disk"));
    let mut failed = Vec::new();
    // The superblock comes last, tables and bitmaps are at the beginning, then come journal and content.
    let windows = (0..64).map(|at| at * 4096..(at + 1) * 4096);
    let windows = windows.chain((1..16).map(|at| at * MIB..(at + 1) * MIB));
    for window in windows {
        let calls = [Failing::writes(window.clone(), libc::EIO)];
        match with_failing(&calls, || build(&disk, &options(SIZE, &tree))) {
            Ok(_) => {
                image::check(&disk);
                std::fs::remove_file(&disk).unwrap();
            }
            Err(error) => {
                assert!(is_eio(&error) && error.to_string().contains("write to the image"), "{error}");
                assert_eq!(scratch.names(), ["tree"], "{window:?}");
                failed.push(window.start);
            }
        }
    }
    // The superblock, and at least tables, the journal and content.
    assert!(failed.contains(&0) && failed.len() >= 6, "{failed:?}");
    assert!(failed.iter().any(|&start| start >= 4 * MIB), "{failed:?}");
}

#[test]
fn a_build_that_cannot_be_made_durable_has_no_name() {
    let scratch = Scratch::new();
    let tree = tree(&scratch);
    let built = || build(&scratch.path("disk"), &options(SIZE, &tree));
    let error = with_failing(&Failing::flushes(libc::EIO), built).unwrap_err();
    assert!(is_eio(&error) && error.to_string().contains("make durable"), "{error}");
    assert_eq!(scratch.names(), ["tree"]);
}

#[test]
fn a_hole_that_cannot_be_made_changes_nothing() {
    let scratch = Scratch::new();
    let (tree, disk) = (tree(&scratch), scratch.path("disk"));
    build(&disk, &options(SIZE, &tree)).unwrap();
    // Something that nothing uses: the last group's blocks.
    let garbage = noise(1 << 20);
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::File::options().write(true).open(&disk).unwrap(),
        &garbage,
        SIZE - 8 * MIB,
    )
    .unwrap();
    let before = bytes(&disk);
    let calls = [Failing::every(libc::SYS_fallocate, libc::EIO)];
    let error = with_failing(&calls, || upkeep::compact(&open(&disk), &mut Silent)).unwrap_err();
    assert!(is_eio(&error) && error.to_string().contains("make a hole in"), "{error}");
    assert!(bytes(&disk) == before);
    let calls = [Failing::every(libc::SYS_fallocate, libc::EOPNOTSUPP)];
    let error = with_failing(&calls, || upkeep::compact(&open(&disk), &mut Silent)).unwrap_err();
    assert!(error.to_string().contains("knows no holes"), "{error}");
    assert!(bytes(&disk) == before);
    assert!(upkeep::compact(&open(&disk), &mut Silent).unwrap().punched >= MIB);
    image::check(&disk);
}

#[test]
fn growing_on_storage_that_cannot_flush_goes_on_later() {
    let scratch = Scratch::new();
    let (tree, disk) = (tree(&scratch), scratch.path("disk"));
    build(&disk, &options(SIZE, &tree)).unwrap();
    let whole = image::read(&disk);
    let grown = || upkeep::grow(&open(&disk), 4 * SIZE, NOW);
    let error = with_failing(&Failing::flushes(libc::EIO), grown).unwrap_err();
    assert!(is_eio(&error), "{error}");
    // A larger file, with the filesystem that was in it.
    image::check(&disk);
    assert!(image::read(&disk) == whole);
    let done = grown().unwrap();
    assert_eq!(done.filesystem.map(|(_, before, after)| (before, after)), Some((SIZE, 4 * SIZE)));
    image::check(&disk);
    assert!(image::read(&disk) == whole);
}

#[test]
fn a_clone_on_failing_storage_has_no_name() {
    let scratch = Scratch::new();
    let (tree, base, new) = (tree(&scratch), scratch.path("base"), scratch.path("new"));
    build(&base, &options(SIZE, &tree)).unwrap();
    let before = bytes(&base);
    let tailor = Tailor { hostname: Some("vm2".to_owned()), ..Tailor::default() };
    let options = CloneOptions { tailor, ..CloneOptions::default() };
    let cloned = || upkeep::clone(&base, &new, &options, NOW, &mut Silent);
    // All but the record of the base's lease, which is a small file beside it.
    let writes = [Failing::writes(512..u64::MAX, libc::EIO)];
    for calls in [&Failing::flushes(libc::EIO)[..], &writes] {
        let error = with_failing(calls, cloned).unwrap_err();
        assert!(is_eio(&error), "{error}");
        assert_eq!(scratch.names(), ["base", "tree"]);
        assert!(bytes(&base) == before);
    }
    cloned().unwrap();
    image::check(&new);
}

/// Takes the journal away, without which nothing is made smaller in place.
fn without_journal(image: &Path) {
    let mut tune2fs = Command::new("tune2fs");
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let done = tune2fs.args(["-O", "^has_journal"]).arg(image).env("PATH", path).output().unwrap();
    assert!(done.status.success(), "{done:?}");
}

#[test]
fn a_shrink_in_place_on_failing_storage_can_be_done_again() {
    let scratch = Scratch::new();
    let (tree, disk) = (tree(&scratch), scratch.path("disk"));
    build(&disk, &options(2 * SIZE, &tree)).unwrap();
    let whole = image::read(&disk);
    let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&path.metadata().unwrap());
    let before = inode(&disk);
    let shrunk = || upkeep::shrink(open(&disk), SIZE, NOW, &mut Silent);
    let writes = [Failing::writes(512..u64::MAX, libc::EIO)];
    for calls in [&Failing::flushes(libc::EIO)[..], &writes] {
        let error = with_failing(calls, shrunk).unwrap_err();
        assert!(is_eio(&error) || error.to_string().contains("flush"), "{error}");
        assert_eq!(
            (scratch.names(), disk.metadata().unwrap().len()),
            (vec!["disk".to_owned(), "tree".to_owned()], 2 * SIZE)
        );
        assert!(image::read(&disk) == whole);
    }
    let done = shrunk().unwrap();
    assert_eq!((done.before, done.size, inode(&disk)), (2 * SIZE, SIZE, before));
    assert_eq!(disk.metadata().unwrap().len(), SIZE);
    image::check(&disk);
    assert!(image::read(&disk) == whole);
}

#[test]
fn a_shrink_that_fails_or_was_killed_leaves_the_image() {
    let scratch = Scratch::new();
    let (tree, disk) = (tree(&scratch), scratch.path("disk"));
    build(&disk, &options(2 * SIZE, &tree)).unwrap();
    without_journal(&disk);
    let (before, whole) = (bytes(&disk), image::read(&disk));
    let shrunk = || upkeep::shrink(open(&disk), SIZE, NOW, &mut Silent);
    // The programs that are started have none of it to flush with, either.
    let error = with_failing(&Failing::flushes(libc::EIO), shrunk).unwrap_err();
    assert!(error.to_string().contains("flush") || error.to_string().contains("e2fs"), "{error}");
    assert_eq!(scratch.names(), ["disk", "tree"]);
    assert!(bytes(&disk) == before);

    // What one that was killed leaves; a link would be taken for it, and leads nowhere.
    std::fs::write(scratch.path(".vbd-disk.shrunk"), "half").unwrap();
    std::os::unix::fs::symlink(scratch.path("tree/large"), scratch.path(".vbd-disk.part.shrunk")).unwrap();
    let done = shrunk().unwrap();
    assert_eq!((done.before, done.size), (2 * SIZE, SIZE));
    assert_eq!(scratch.names(), ["disk", "tree"]);
    assert_eq!(tree.join("large").metadata().unwrap().len(), 3 << 20);
    image::check(&disk);
    assert!(image::read(&disk) == whole);
}

#[test]
fn a_killed_shrink_is_cleaned_up_by_the_next() {
    let scratch = Scratch::new();
    let (tree, disk) = (tree(&scratch), scratch.path("disk"));
    build(&disk, &options(2 * SIZE, &tree)).unwrap();
    without_journal(&disk);
    let before = bytes(&disk);
    // Killed when the copy is made.
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "failing::shrink_elsewhere", "--nocapture"])
        .env("VBD_TEST_FILE", &disk)
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(!status.success());
    assert_eq!(scratch.names(), [".disk.lease", ".vbd-disk.shrunk", "disk", "tree"]);
    assert!(bytes(&disk) == before);
    upkeep::shrink(open(&disk), SIZE, NOW, &mut Silent).unwrap();
    assert_eq!(scratch.names(), ["disk", "tree"]);
    image::check(&disk);
}

/// Kills the process when a step is told that comes after the copy.
struct Deadly;

impl vbd_fs::Progress for Deadly {
    fn step(&mut self, step: vbd_fs::Step, total: Option<u64>) {
        if (step, total) == (vbd_fs::Step::Write, None) {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
        }
    }
}

/// Not a test: a shrink in a process of its own.
#[test]
fn shrink_elsewhere() {
    if let Some(file) = std::env::var_os("VBD_TEST_FILE") {
        upkeep::shrink(open(Path::new(&file)), SIZE, NOW, &mut Deadly).unwrap();
    }
}
