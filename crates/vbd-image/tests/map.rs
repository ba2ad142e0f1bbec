//! The map of a file, on whatever filesystem the tests run, which has holes and preallocation as a rule.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;
use rustix::fs::{FallocateFlags, fallocate};
use vbd_image::map::{Extent, Map, State};
use vbd_image::open::open;

const MIB: u64 = 1 << 20;

fn map(path: &Path) -> Map {
    let map = Map::of(&open(path).unwrap()).unwrap();
    let mut end = 0;
    for extent in &map.extents {
        assert!(extent.start == end && extent.length > 0, "{map:?}");
        end = extent.end();
    }
    assert_eq!(end, map.size);
    let same = |pair: &[Extent]| pair[0].state == pair[1].state && pair[0].shared == pair[1].shared;
    assert!(!map.extents.windows(2).any(same), "{map:?}");
    map
}

fn file(directory: &Path, size: u64) -> (std::path::PathBuf, File) {
    let path = directory.join("disk");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    file.set_len(size).unwrap();
    (path, file)
}

fn states(map: &Map) -> Vec<(u64, u64, State)> {
    map.extents.iter().map(|extent| (extent.start, extent.length, extent.state)).collect()
}

#[test]
fn holes_and_data() {
    let directory = tempfile::tempdir().unwrap();
    let (path, file) = file(directory.path(), 2_147_484_672);
    assert_eq!(states(&map(&path)), [(0, 2_147_484_672, State::Hole)]);
    assert_eq!(map(&path).allocated, 0);

    file.write_all_at(&[1; 65_536], MIB).unwrap();
    file.write_all_at(b"the odd tail", 2_147_484_672 - 12).unwrap();
    file.sync_all().unwrap();
    let found = map(&path);
    assert_eq!(
        states(&found),
        [
            (0, MIB, State::Hole),
            (MIB, 65_536, State::Data),
            (MIB + 65_536, (1 << 31) - MIB - 65_536, State::Hole),
            (1 << 31, 1024, State::Data),
        ]
    );
    assert_eq!(found.total(State::Data), 65_536 + 1024);
    assert_eq!(found.total(State::Hole), found.size - 65_536 - 1024);
    assert!(found.allocated >= 65_536 + 1024 && found.allocated < MIB);
    assert_eq!(found.shared(), 0);
}

#[test]
fn preallocated_space() {
    let directory = tempfile::tempdir().unwrap();
    let (path, file) = file(directory.path(), 8 * MIB);
    fallocate(&file, FallocateFlags::empty(), MIB, 2 * MIB).unwrap();
    file.write_all_at(&[1; 4096], 2 * MIB).unwrap();
    file.sync_all().unwrap();
    let found = map(&path);
    assert!(found.allocated >= 2 * MIB);
    if rustix::fs::statfs(directory.path()).unwrap().f_type != 0xEF53 {
        eprintln!("skipped: whether preallocated space is told apart is up to the filesystem; ext4 does");
        return;
    }
    assert_eq!(
        states(&found),
        [
            (0, MIB, State::Hole),
            (MIB, MIB, State::Preallocated),
            (2 * MIB, 4096, State::Data),
            (2 * MIB + 4096, MIB - 4096, State::Preallocated),
            (3 * MIB, 5 * MIB, State::Hole),
        ]
    );
}

#[test]
fn an_empty_file_has_no_extents() {
    let directory = tempfile::tempdir().unwrap();
    let (path, _file) = file(directory.path(), 0);
    let found = map(&path);
    assert_eq!((found.size, found.extents.len()), (0, 0));
}

#[test]
fn blocks_shared_with_a_clone() {
    let directory = tempfile::tempdir().unwrap();
    let (path, file) = file(directory.path(), MIB);
    file.write_all_at(&[1; 65_536], 0).unwrap();
    file.sync_all().unwrap();
    let clone = File::create(directory.path().join("clone")).unwrap();
    if rustix::fs::ioctl_ficlone(&clone, &file).is_err() {
        eprintln!("skipped: the filesystem here has no clones");
        return;
    }
    assert_eq!(map(&path).shared(), 65_536);
    fs::remove_file(directory.path().join("clone")).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// What was written is data, at the granularity of pages; what was not is none.
    #[test]
    fn data_is_where_it_was_written(writes in prop::collection::vec((0u64..512, 1u64..16), 0..24)) {
        let directory = tempfile::tempdir().unwrap();
        let (path, file) = file(directory.path(), 512 * 4096);
        let mut expected = vec![false; 512];
        for (start, length) in writes {
            let length = length.min(512 - start);
            let bytes = vec![7; usize::try_from(length * 4096).unwrap()];
            file.write_all_at(&bytes, start * 4096).unwrap();
            for page in start..start + length {
                expected[usize::try_from(page).unwrap()] = true;
            }
        }
        let found = map(&path);
        for (page, expected) in (0u64..).zip(expected) {
            let extent = found.extents.iter().find(|extent| extent.end() > page * 4096).unwrap();
            prop_assert_eq!(extent.state == State::Data, expected, "page {} of {:?}", page, found);
        }
    }
}
