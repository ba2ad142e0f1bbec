//! Images with damage of every kind: whatever they are, reading them ends, and without a panic.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use vbd_ext4::read::{Filesystem, Links, Options, Padded, fuzz};

use crate::sample;
use crate::support::{image, run, text};

/// What the fuzzer begins with.
fn corpus() -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/ext4_read");
    let mut paths: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

#[test]
fn the_corpus_is_of_filesystems() {
    for bytes in corpus() {
        let filesystem = Filesystem::open(Padded::new(bytes, 16 << 20), Options::default()).unwrap();
        assert!(fuzz::look_through(&filesystem) > 10);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_is_an_error(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..5usize), 1..12),
    ) {
        let corpus = corpus();
        let mut bytes = which.get(&corpus).clone();
        for (place, value, kind) in changes {
            let length = bytes.len();
            let at = match kind {
                // Where most of the structures are.
                0..=2 => place.index(length.min(24 << 10)),
                _ => place.index(length),
            };
            match kind {
                0 | 3 => bytes[at] = value,
                1 | 4 => bytes[at] ^= 1 << (value % 8),
                _ => {
                    let end = (at + 4).min(length);
                    bytes[at..end].fill(value);
                }
            }
        }
        fuzz::read(&bytes);
    }
}

/// A file of any ranges, through the map of blocks and through extents.
#[test]
fn every_range_of_a_sparse_file() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir(&tree).unwrap();
    sample::fill(&tree);
    let host = fs::read(tree.join("sparse")).unwrap();
    for kind in ["ext2", "ext4"] {
        let image = image(directory.path(), Some(&tree), "40M", &["-t", kind, "-b", "1024"]);
        let filesystem = crate::support::open(&image).unwrap();
        let inode = filesystem.lookup(b"sparse", vbd_ext4::read::Links::Keep).unwrap();
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
            cases: 300,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let ranges = (0..host.len() as u64 + 5000, 0..100_000usize);
        runner
            .run(&ranges, |(offset, length)| {
                let mut buffer = vec![0xAA; length];
                let read = filesystem.read_at(&inode, offset, &mut buffer).unwrap();
                let start = usize::try_from(offset).unwrap().min(host.len());
                let expected = &host[start..host.len().min(start + length)];
                prop_assert_eq!(read, expected.len());
                prop_assert!(buffer[..read] == *expected);
                prop_assert!(buffer[read..].iter().all(|byte| *byte == 0xAA));
                Ok(())
            })
            .unwrap();
    }
}

/// Writes a word of the block map of an inode, or of a block.
fn word(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// An indirect block that is named again and again would make a small image say anything about billions of blocks.
#[test]
fn blocks_that_are_named_many_times() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir_all(tree.join("directory")).unwrap();
    fs::write(tree.join("directory/entry"), "x").unwrap();
    fs::write(tree.join("file"), sample::noise(400_000, 1)).unwrap();
    let image = image(directory.path(), Some(&tree), "4M", &["-t", "ext2", "-b", "1024"]);
    let place = |path: &str| {
        let said = run("debugfs", &["-R", &format!("imap {path}"), text(&image)]);
        let (at, offset) = said.split_once("located at block ").unwrap().1.split_once(", offset ").unwrap();
        let offset = usize::from_str_radix(offset.trim().trim_start_matches("0x"), 16).unwrap();
        at.parse::<usize>().unwrap() * 1024 + offset
    };
    let block = |path: &str, number: u64| -> u32 {
        run("debugfs", &["-R", &format!("bmap {path} {number}"), text(&image)]).trim().parse().unwrap()
    };
    let (file, listing) = (place("/file"), place("/directory"));
    let whole = fs::read(&image).unwrap();
    let looked_at = |change: &dyn Fn(&mut Vec<u8>), path: &str| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        let filesystem = Filesystem::open(Padded::new(bytes, 0), Options::default()).unwrap();
        let inode = filesystem.lookup(path.as_bytes(), Links::Keep).unwrap();
        if path == "file" {
            let ranges = filesystem.data(&inode, 0).unwrap();
            ranges.collect::<Result<Vec<_>, _>>().unwrap_err().to_string()
        } else {
            filesystem.entries(&inode).unwrap().collect::<Result<Vec<_>, _>>().unwrap_err().to_string()
        }
    };
    // The double indirect block of the file, its 13th pointer after 12 direct ones, names one block of holes throughout.
    let double = u32::from_le_bytes(whole[file + 40 + 13 * 4..][..4].try_into().unwrap());
    let hole = block("/file", 300);
    let said = looked_at(
        &|bytes| {
            word(bytes, file + 4, u32::MAX);
            bytes[hole as usize * 1024..][..1024].fill(0);
            (0..256).for_each(|entry| word(bytes, double as usize * 1024 + entry * 4, hole));
        },
        "file",
    );
    assert!(said.contains(&format!("the indirect block {hole}")) && said.contains("has it twice"), "{said}");
    // A directory of twelve times the same block.
    let first = block("/directory", 0);
    let said = looked_at(
        &|bytes| {
            word(bytes, listing + 4, 12 * 1024);
            (0..12).for_each(|entry| word(bytes, listing + 40 + entry * 4, first));
        },
        "directory",
    );
    assert!(said.contains("was there before"), "{said}");
}
