//! A squashfs that an image is filled from.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_fs::squashfs::fuzz(bytes));
