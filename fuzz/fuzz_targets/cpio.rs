//! A cpio archive that an image is filled from, or several, compressed or not.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // An archive that is refused is as good an answer as one that is counted.
    let _ = vbd_fs::cpio::check(bytes);
});
