//! Layers of a container image, one on the other.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_fs::oci::fuzz_layers(bytes));
