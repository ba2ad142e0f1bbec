//! Which chunks of an image that is being restored are its own, so that an interrupted restore goes on.
//!
//! A file beside the draft: a line of JSON in the first 4096 bytes that says of what, then a bit for each chunk. Bits are
//! only ever set, and in place: a write that is torn leaves some of them for the next time.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use vbd_core::bitmap::Bitmap;

use crate::backup::{Hash, Manifest};
use crate::journal::sync_directory;
use crate::{Error, Result};

const VERSION: u32 = 1;
/// Bytes before the bits.
const HEADER: usize = 4096;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct What {
    version: u32,
    disk: String,
    backup: String,
    /// The hash of the manifest, which names all of the content.
    manifest: String,
}

impl What {
    fn of(manifest: &Manifest) -> Result<What> {
        let bytes = manifest.encode().map_err(|error| Error::Refused(format!("the backup: {error}")))?;
        Ok(What {
            version: VERSION,
            disk: manifest.about.disk.clone(),
            backup: manifest.about.name.clone(),
            manifest: Hash::of(&bytes).hex(),
        })
    }
}

/// The file.
pub(super) struct Journal(File);

impl Journal {
    /// Makes one without a bit set, durably.
    pub(super) fn create(path: &Path, manifest: &Manifest) -> Result<Journal> {
        let what = serde_json::to_vec(&What::of(manifest)?).unwrap_or_default();
        if what.len() >= HEADER {
            return Err(Error::Refused("the backup's name is too long".into()));
        }
        let mut bytes = vec![0; HEADER + manifest.chunks.len().div_ceil(8)];
        bytes[..what.len()].copy_from_slice(&what);
        bytes[what.len()..HEADER].fill(b' ');
        bytes[HEADER - 1] = b'\n';
        let make = || {
            let file = File::options().read(true).write(true).create_new(true).open(path)?;
            file.write_all_at(&bytes, 0)?;
            file.sync_all()?;
            sync_directory(path)?;
            Ok(file)
        };
        make().map(Journal).map_err(Error::io(path, "make the journal"))
    }

    /// Opens one that was left of restoring the same backup, and marks the chunks whose bits are set in `done`.
    pub(super) fn open(path: &Path, manifest: &Manifest, done: &Bitmap) -> Result<Journal> {
        let refused = |what: &str| {
            let advice = "begin anew with --restart, which loses what guests have written";
            Error::Refused(format!("{}: {what}: {advice}", path.display()))
        };
        let open = || {
            let file = File::options().read(true).write(true).open(path)?;
            let mut bytes = Vec::new();
            // No longer than it may be.
            let most = HEADER + manifest.chunks.len().div_ceil(8) + 1;
            (&file).take(most as u64).read_to_end(&mut bytes)?;
            Ok((file, bytes))
        };
        let (file, bytes) = open().map_err(Error::io(path, "read the journal"))?;
        if bytes.len() != HEADER + manifest.chunks.len().div_ceil(8) {
            return Err(refused("is no journal of this restore"));
        }
        let (what, bits) = bytes.split_at(HEADER);
        let what: What = serde_json::from_slice(what).map_err(|_| refused("is no journal"))?;
        if what != What::of(manifest)? {
            return Err(refused(&format!(
                "is of the backup `{}` of `{}`, or of another store",
                what.backup, what.disk
            )));
        }
        done.load_bytes(0, bits);
        Ok(Journal(file))
    }

    /// Sets the bits of chunks that are durable, and makes that durable. Blocks.
    pub(super) fn record(&self, done: &Bitmap, chunks: &[u64]) -> std::io::Result<()> {
        for chunk in chunks {
            done.mark(chunk * done.granularity(), 1);
        }
        // One sector has the bits of 4096 chunks.
        let mut sectors: Vec<u64> = chunks.iter().map(|chunk| chunk / 4096).collect();
        sectors.sort_unstable();
        sectors.dedup();
        for sector in sectors {
            let len = done.byte_len().saturating_sub(sector * 512).min(512);
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(512)];
            done.read_bytes(sector * 512, &mut bytes);
            self.0.write_all_at(&bytes, HEADER as u64 + sector * 512)?;
        }
        self.0.sync_data()
    }
}
