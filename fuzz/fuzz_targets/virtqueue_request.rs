//! A guest's ring, with everything that it points at.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_vhost_user::fuzz_virtqueue(bytes));
