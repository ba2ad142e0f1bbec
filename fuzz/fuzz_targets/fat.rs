//! A FAT that a guest wrote, such as an EFI system partition.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vbd_fs::vfat::fuzz(bytes));
