//! A file of bitmaps beside an image.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_image::sidecar::fuzz(bytes));
