//! A source larger than the filesystem: what is missing is said, and what would do does.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use vbd_fs::{Error, ImageSize, Progress, Shortage, Step};

use super::image;
use super::sample::noise;
use super::setting::{MIB, Scratch, as_ordinary_user, build, build_with, options, with_own_mounts};

/// Remembers which steps were taken.
#[derive(Default)]
struct Steps(Vec<Step>);

impl Progress for Steps {
    fn step(&mut self, step: Step, _total: Option<u64>) {
        self.0.push(step);
    }
}

fn shortage(result: Result<vbd_fs::Report, Error>) -> Shortage {
    match result {
        Err(Error::NoRoom(shortage)) => shortage,
        other => panic!("{other:?}"),
    }
}

fn fill(tree: &Path, files: usize, size: usize) {
    std::fs::create_dir(tree).unwrap();
    for i in 0..files {
        std::fs::write(tree.join(i.to_string()), noise(size)).unwrap();
    }
}

fn too_much_of_a_directory() {
    let scratch = Scratch::new();
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    fill(&tree, 20, 1 << 20);
    let mut steps = Steps::default();
    let shortage = shortage(build_with(&file, &options(8 * MIB, &tree), &mut steps));
    assert!(shortage.needed_bytes >= 20 * MIB && shortage.free_bytes < 8 * MIB, "{shortage:?}");
    assert!(shortage.to_string().contains("are missing; a size of "), "{shortage}");
    // It was known before anything was read.
    assert_eq!(steps.0, [Step::Measure, Step::Tailor]);
    assert_eq!(scratch.names(), ["tree"]);
    let enough = shortage.enough.unwrap();
    build(&file, &options(enough, &tree)).unwrap();
    image::check(&file);
    // And it is no exaggeration.
    assert!(enough < 30 * MIB, "{enough}");
}

#[test]
fn a_directory_that_is_too_large_is_measured_first() {
    too_much_of_a_directory();
}

#[test]
fn an_ordinary_users_directory_that_is_too_large_is_measured_first() {
    let name = "room::an_ordinary_users_directory_that_is_too_large_is_measured_first";
    as_ordinary_user(name, too_much_of_a_directory);
}

#[test]
fn an_archive_that_is_too_large_is_counted_to_its_end() {
    let scratch = Scratch::new();
    let (tree, file, archive) = (scratch.path("tree"), scratch.path("disk"), scratch.path("a.tar"));
    fill(&tree, 30, 1 << 20);
    let status = Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&tree).arg(".").status();
    assert!(status.unwrap().success());
    let shortage = shortage(build(&file, &options(12 * MIB, &archive)));
    assert!(shortage.needed_bytes >= 30 * MIB, "{shortage:?}");
    build(&file, &options(shortage.enough.unwrap(), &archive)).unwrap();
    assert_eq!(scratch.names(), ["a.tar", "disk", "tree"]);
}

#[test]
fn too_many_files_want_inodes() {
    let scratch = Scratch::new();
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    fill(&tree, 500, 0);
    let mut options = options(16 * MIB, &tree);
    options.spec.inodes = Some(256);
    let shortage = shortage(build(&file, &options));
    assert_eq!(shortage.needed_inodes, 500);
    assert!(shortage.to_string().contains("inodes and the source needs 500"), "{shortage}");
    options.spec.inodes = None;
    build(&file, &options).unwrap();
}

/// The sizes that are named must do for trees of every kind, to the last block.
#[test]
fn what_is_said_to_do_does() {
    for (files, size, filesystem) in [(3000, 10, "ext4"), (60, 100_000, "ext2"), (5, 5_000_000, "ext3")] {
        let scratch = Scratch::new();
        let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
        fill(&tree, files, size);
        let mut options = options(MIB, &tree);
        options.spec.filesystem = filesystem.parse().unwrap();
        options.size = ImageSize::Fixed(shortage(build(&file, &options)).enough.unwrap());
        let report = build(&file, &options).unwrap();
        assert_eq!(report.counts.files, u64::try_from(files).unwrap());
        image::check(&file);
    }
}

#[test]
fn zeros_take_no_room() {
    let scratch = Scratch::new();
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    std::fs::create_dir(&tree).unwrap();
    let mut zeros = std::fs::File::create(tree.join("zeros")).unwrap();
    zeros.write_all(&vec![0; 30 << 20]).unwrap();
    zeros.sync_all().unwrap();
    build(&file, &options(8 * MIB, &tree)).unwrap();
    assert_eq!(image::entry(&file, "/zeros").blocks, [0; 0]);
}

#[test]
fn a_full_host_is_said_to_be_full() {
    with_own_mounts("room::a_full_host_is_said_to_be_full", || {
        let scratch = Scratch::new();
        let (tree, small) = (scratch.path("tree"), scratch.path("small"));
        fill(&tree, 8, 1 << 20);
        std::fs::create_dir(&small).unwrap();
        let _mounted = vbd_testing::Mounted::in_memory(&small, "size=6m");
        let error = build(&small.join("disk"), &options(64 * MIB, &tree)).unwrap_err();
        assert!(error.to_string().contains("No space left on device"), "{error}");
        assert_eq!(super::setting::names(&small), Vec::<String>::new());
    });
}
