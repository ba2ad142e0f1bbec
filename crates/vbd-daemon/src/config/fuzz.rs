//! What fuzzers call: any bytes are answered, and what was understood keeps its promises.

use std::path::Path;

use super::{Config, ConfigError, DiskConfig, toml, xl, xl_disk};

/// The TOML reader.
///
/// # Panics
/// If it breaks a promise.
pub fn toml(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        promises(text, toml::parse(text, Path::new("fuzz.toml")));
    }
}

/// The reader of Xen domain files.
///
/// # Panics
/// If it breaks a promise.
pub fn xl(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        promises(text, xl::parse(text, Path::new("fuzz")));
    }
}

/// The reader of disk specifications: what it prints, it reads as the same disk.
///
/// # Panics
/// If it breaks a promise.
pub fn xl_disk(bytes: &[u8]) {
    let Ok(spec) = std::str::from_utf8(bytes) else { return };
    match xl_disk::parse(spec) {
        Ok(disk) => {
            let printed = disk.to_string();
            let again =
                xl_disk::parse(&printed).unwrap_or_else(|e| panic!("{printed:?} does not read back: {e}"));
            assert_eq!(xl_disk::DiskSpec { places: disk.places, ..again }, disk);
        }
        Err(error) => assert!(spec.is_char_boundary(error.offset), "{error:?} is not in {spec:?}"),
    }
}

fn promises(text: &str, read: Result<Config, ConfigError>) {
    match read {
        Ok(config) => {
            for disk in &config.disks {
                assert_eq!(DiskConfig::check_name(&disk.name), Ok(()));
                assert_eq!(DiskConfig::check_serial(&disk.serial), Ok(()));
                assert!(disk.vhost_user.is_some() || disk.nbd.is_some() || disk.ublk.is_some());
            }
        }
        Err(error) => {
            let lines = text.split('\n').count();
            let outside = error.position.filter(|place| place.line > lines || place.column > text.len() + 1);
            assert_eq!(outside, None, "{error} is not in the text");
            assert!(!error.message.is_empty());
        }
    }
}
