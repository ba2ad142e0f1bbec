//! Images with damage of every kind: whatever they are, reading them ends, and without a panic.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use vbd_ext4::read::{Filesystem, Options, Padded, fuzz};

use crate::sample;
use crate::support::image;

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
