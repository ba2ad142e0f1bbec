//! A domain's ring, with everything that it points at.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_xen::fuzz_ring(bytes));
