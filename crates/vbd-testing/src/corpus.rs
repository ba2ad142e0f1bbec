//! The fuzzers' corpora (`fuzz/corpus`), which keep what was found.

use std::fs;
use std::path::{Path, PathBuf};

/// The directory of the fuzzers.
pub fn fuzz_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz")
}

/// The files and directories in a directory, by their names.
///
/// # Panics
/// It cannot be read.
pub fn entries(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("a readable entry").path()).collect();
    paths.sort();
    paths
}

/// Gives every input that is kept for a fuzz target to what it calls. Each is named in the output, which a test that
/// fails shows.
///
/// # Panics
/// There is none, or one of them makes the call panic.
pub fn replay(target: &str, call: fn(&[u8])) {
    let inputs = entries(&fuzz_dir().join("corpus").join(target));
    assert!(!inputs.is_empty(), "{target} has no inputs");
    for input in inputs {
        println!("{}", input.display());
        call(&fs::read(&input).expect("a readable input"));
    }
}
