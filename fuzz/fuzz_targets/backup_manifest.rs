//! The manifest of a backup in a store.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_jobs::backup::fuzz_manifest(bytes));
