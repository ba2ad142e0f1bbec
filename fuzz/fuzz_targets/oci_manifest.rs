//! What describes a container image.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_fs::oci::fuzz(bytes));
