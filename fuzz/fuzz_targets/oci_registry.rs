//! What leads to a registry, what it asks for, and who we are to it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_fs::oci::fuzz_registry(bytes));
