//! The target of a Xen device (`params` in xenstore).
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_daemon::config::fuzz::xen_target(bytes));
