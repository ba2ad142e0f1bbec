//! A POSIX ACL as an archive or an image has it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_ext4::format::acl::fuzz(bytes));
