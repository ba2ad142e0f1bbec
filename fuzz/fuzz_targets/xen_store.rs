//! What a domain writes into xenstore, and messages of xenstored.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_xen::fuzz_store(bytes));
