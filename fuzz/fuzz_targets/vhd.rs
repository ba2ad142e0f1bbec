//! A VHD file that anybody may have made.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_vhd::fuzz(bytes));
