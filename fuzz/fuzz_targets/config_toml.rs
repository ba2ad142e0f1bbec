//! The configuration in TOML.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_daemon::config::fuzz::toml(bytes));
