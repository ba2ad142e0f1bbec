//! The in-flight region that a front-end gives back.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_vhost_user::fuzz_inflight(bytes));
