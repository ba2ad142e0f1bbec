//! A filesystem of the ext family that somebody else made, checked.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_ext4::check::fuzz::check(bytes));
