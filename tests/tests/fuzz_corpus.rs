//! What fuzzers found and what they start from, through the same functions, on every run of the tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use vbd_daemon::config;

/// A fuzz target and what it calls.
type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 12] = [
    ("config_toml", config::fuzz::toml),
    ("config_xl", config::fuzz::xl),
    ("nbd_commands", vbd_nbd::fuzz::commands),
    ("nbd_negotiation", vbd_nbd::fuzz::negotiation),
    ("probe", |bytes| drop(vbd_image::probe::filesystem_bytes(bytes))),
    ("tar", |bytes| drop(vbd_fs::tar::check(bytes))),
    ("virtqueue_inflight", vbd_vhost_user::fuzz_inflight),
    ("virtqueue_request", vbd_vhost_user::fuzz_virtqueue),
    ("xen_ring", vbd_xen::fuzz_ring),
    ("xen_store", vbd_xen::fuzz_store),
    ("xen_target", config::fuzz::xen_target),
    ("xl_disk", config::fuzz::xl_disk),
];

fn fuzz_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz")
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn every_kept_input_is_answered() {
    for (target, call) in TARGETS {
        let inputs = files(&fuzz_dir().join("corpus").join(target));
        assert!(!inputs.is_empty(), "{target} has no inputs");
        for input in inputs {
            // Captured by the test harness, shown with a failure.
            println!("{}", input.display());
            call(&fs::read(&input).unwrap());
        }
    }
}

#[test]
fn every_target_is_here() {
    let names = |dir: &str| -> BTreeSet<String> {
        let stem = |path: &PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
        files(&fuzz_dir().join(dir)).iter().map(stem).collect()
    };
    let here = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names("fuzz_targets"), here);
    assert_eq!(names("corpus"), here);
}
