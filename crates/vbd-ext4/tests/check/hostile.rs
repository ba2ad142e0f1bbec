//! Images with damage of every kind: looking at them ends, and without a panic.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use vbd_ext4::check::{check, fuzz};
use vbd_ext4::read::Padded;

/// What the fuzzers begin with.
fn corpus() -> Vec<Vec<u8>> {
    let mut paths = Vec::new();
    for target in ["ext4_read", "ext4_check"] {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
        paths.extend(fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()));
    }
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

#[test]
fn the_corpus_is_looked_at_to_the_end() {
    for bytes in corpus() {
        let report = check(Padded::new(bytes, 16 << 20), &mut |_, _| {}).unwrap();
        assert!(!report.incomplete && report.inodes > 10, "{report:#?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_does_no_harm(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..5usize), 1..12),
    ) {
        let corpus = corpus();
        let mut bytes = which.get(&corpus).clone();
        for (place, value, kind) in changes {
            let length = bytes.len();
            // Most of the structures are at the beginning.
            let at = place.index(if kind < 3 { length.min(24 << 10) } else { length });
            match kind {
                0 | 3 => bytes[at] = value,
                1 | 4 => bytes[at] ^= 1 << (value % 8),
                _ => {
                    let end = (at + 4).min(length);
                    bytes[at..end].fill(value);
                }
            }
        }
        fuzz::check(&bytes);
    }
}
