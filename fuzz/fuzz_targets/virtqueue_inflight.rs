//! The region that tells what was in flight before a restart.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_vhost_user::fuzz_inflight(bytes));
