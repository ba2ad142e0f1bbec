//! A partition table that a guest wrote.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_image::partition::fuzz(bytes));
