//! What a guest wrote at the start of its disk.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = vbd_image::probe::filesystem_bytes(bytes);
});
