//! Backups: a disk as it was at one instant, in a store that many backups share, or compared with the one before.

mod chain;
mod instant;
mod manifest;
mod reading;
mod restore;
mod restoring;
mod run;
mod store;

pub use chain::{Chain, backup_to_chain};
pub use manifest::{About, Hash, Manifest, ManifestError, StoredImage, fuzz as fuzz_manifest};
pub use restore::{Checked, restore, verify};
pub use restoring::{Restored, Restoring};
pub use run::{Backup, Cost, Done, Since, backup};
pub use store::{Adding, Listed, Store, Use};
