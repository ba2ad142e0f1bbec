//! What a client says while it is negotiated with.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_nbd::fuzz::negotiation(bytes));
