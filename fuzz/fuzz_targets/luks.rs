//! A LUKS header that anybody may have made.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_luks::fuzz(bytes));
