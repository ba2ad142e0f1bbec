//! What a client asks of an export.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_nbd::fuzz::commands(bytes));
