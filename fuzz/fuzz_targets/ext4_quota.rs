//! A quota file that somebody else made.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_ext4::format::quota::fuzz(bytes));
