//! Random trees: what mke2fs put into an image is what is read out of it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use crate::sample::{self, same};
use crate::support::{command, image, open, text};

/// Something that is made in a directory, by a number one of those that are there already.
#[derive(Debug, Clone)]
enum Step {
    Directory,
    File { pieces: Vec<(u32, u16)> },
    Link { target: Vec<u8> },
    Another,
    Many { count: u16 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Directory),
        5 => prop::collection::vec((0..2_000_000u32, 1..20_000u16), 0..6).prop_map(|pieces| Step::File { pieces }),
        2 => prop::collection::vec(33..127u8, 1..900).prop_map(|target| Step::Link { target }),
        1 => Just(Step::Another),
        1 => (1..400u16).prop_map(|count| Step::Many { count }),
    ]
}

/// Names of any bytes that a name may have, as far as the tests' own paths allow.
fn name() -> impl Strategy<Value = String> {
    "[^/\u{0}]{1,60}".prop_filter("directories have these", |name| name != "." && name != "..")
}

fn make(root: &Path, steps: &[(prop::sample::Index, String, u16, Step)]) {
    let mut directories = vec![root.to_owned()];
    let mut files: Vec<PathBuf> = Vec::new();
    for (place, name, mode, step) in steps {
        let parent = place.get(&directories).clone();
        let path = parent.join(name);
        if path.symlink_metadata().is_ok() || text(&path).len() > 3000 {
            continue;
        }
        match step {
            Step::Directory => {
                fs::create_dir(&path).unwrap();
                directories.push(path.clone());
            }
            Step::File { pieces } => {
                let file = File::create(&path).unwrap();
                for (at, length) in pieces {
                    file.write_all_at(&sample::noise((*length).into(), (*at).into()), (*at).into()).unwrap();
                }
                files.push(path.clone());
            }
            Step::Link { target } => symlink(std::str::from_utf8(target).unwrap(), &path).unwrap(),
            Step::Another if files.is_empty() => continue,
            Step::Another => fs::hard_link(place.get(&files), &path).unwrap(),
            Step::Many { count } => {
                for number in 0..*count {
                    let _ = File::create_new(parent.join(format!("{number} of {count}")));
                }
            }
        }
        if matches!(step, Step::Directory | Step::File { .. }) {
            // Readable for those who are not root, so that all can compare.
            fs::set_permissions(&path, fs::Permissions::from_mode(u32::from(*mode) | 0o700)).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, max_shrink_iters: 60, ..ProptestConfig::default() })]

    #[test]
    fn what_is_put_in_is_read_out(
        steps in prop::collection::vec((any::<prop::sample::Index>(), name(), 0..0o10000u16, step()), 1..60),
        kind in prop::sample::select(vec![
            &["-t", "ext4", "-b", "4096"][..],
            &["-t", "ext4", "-b", "1024", "-O", "inline_data"],
            &["-t", "ext4", "-b", "1024", "-O", "^extent,^64bit"],
            &["-t", "ext3", "-b", "1024"],
        ]),
        index in any::<bool>(),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir(&tree).unwrap();
        make(&tree, &steps);
        let image = image(directory.path(), Some(&tree), "48M", &[kind, &["-N", "26000"]].concat());
        if index {
            let status = command("e2fsck", &["-fyD", text(&image)]).status().unwrap();
            prop_assert!(matches!(status.code(), Some(0 | 1)));
        }
        let filesystem = open(&image).unwrap();
        same(sample::of_host(&tree), sample::of_image(&filesystem), |path, entry| entry.as_filled(path));
    }
}
