//! The header, snapshot table and bitmaps of a qcow2 image that somebody else made.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_qcow2::format::fuzz::structures(bytes));
