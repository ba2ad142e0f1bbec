//! What the fuzz target calls.

use super::{Class, Options, Repair, check, repair};
use crate::storage::Memory;

/// What a repair may make an image grow to, in bytes.
const ROOM: usize = 64 << 20;

/// Checks an image whose bytes these are, with little memory and with much, repairs it, and checks that: it must end
/// without a panic, tell the same, and mend what it says it mends.
///
/// # Panics
///
/// When it does not.
pub fn check_and_repair(bytes: &[u8]) {
    let options = Options { memory: 64 << 10, kept: 20 };
    let Ok(report) = check(bytes, &options) else { return };
    let again = check(bytes, &Options { kept: 20, ..Options::default() }).expect("as before");
    assert_eq!((again.errors, again.leaks), (report.errors, report.leaks));
    let storage = Memory::new(bytes.to_vec(), ROOM);
    if let Ok(repaired) = repair(&storage, Repair::Leaks, &options) {
        assert!(repaired.after.errors <= report.errors, "{repaired:?}");
        // What is damaged otherwise is left alone.
        assert!(repaired.after.leaks == 0 || report.errors > 0, "{repaired:?}");
    }
    let storage = Memory::new(bytes.to_vec(), ROOM);
    let Ok(repaired) = repair(&storage, Repair::All, &options) else { return };
    if report.is_clean() {
        assert!(repaired.after.is_clean() && repaired.before == report, "{repaired:?}");
    }
    let after = &repaired.after;
    // Flags in a table that something else lies over stay as they are.
    if !after.has(Class::Overlap) && !after.has(Class::BeyondEnd) && !after.has(Class::Snapshot) {
        assert!(!after.has(Class::Refcount) && !after.has(Class::Copied), "{repaired:?}");
        assert!(after.leaks == 0 || report.incomplete || after.incomplete, "{repaired:?}");
    }
}
