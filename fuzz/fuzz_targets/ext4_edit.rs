//! A filesystem of the ext family that somebody else made, changed.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_ext4::edit::fuzz::edit(bytes));
