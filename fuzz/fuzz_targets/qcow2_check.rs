//! A qcow2 image that somebody else made, checked and repaired.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_qcow2::check::fuzz::check_and_repair(bytes));
