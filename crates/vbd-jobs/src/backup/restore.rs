//! Bringing a backup back, and making sure that it can be.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use vbd_core::client::Buffer;
use vbd_formats::{ImageSpec, NewImage};
use vbd_image::create;

use super::manifest::{Hash, Manifest};
use super::store::Store;
use crate::ranges::lock;
use crate::{Error, Image, Progress, Result};

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Checked {
    /// Backups.
    pub backups: usize,
    /// Chunks, each counted once.
    pub chunks: u64,
    /// Their bytes, unpacked.
    pub bytes: u64,
}

/// Has threads work on numbers below `count` until one fails.
fn in_parallel(
    count: usize,
    threads: usize,
    progress: &dyn Progress,
    work: impl Fn(usize) -> Result<()> + Sync,
) -> Result<()> {
    let (next, ended, failed) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
    let fail = |error: Error| {
        lock(&failed).get_or_insert(error);
        ended.store(true, Ordering::SeqCst);
    };
    let thread = || {
        while !ended.load(Ordering::SeqCst) {
            if progress.is_cancelled() {
                return fail(Error::Cancelled);
            }
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            if let Err(error) = work(index) {
                return fail(error);
            }
        }
    };
    std::thread::scope(|scope| {
        (1..threads.max(1)).for_each(|_| {
            scope.spawn(thread);
        });
        thread();
    });
    failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Makes an image of a backup. Every chunk is compared with its name on the way; the image has its own name when it is
/// whole. Gives the bytes that were written.
///
/// # Errors
/// The backup is damaged, or the image cannot be made; nothing is left of it then.
pub fn restore(
    store: &Store,
    manifest: &Manifest,
    target: &Path,
    image: &NewImage,
    threads: usize,
    progress: &dyn Progress,
) -> Result<u64> {
    create::may_publish(target, image.replace)?;
    let mut name = std::ffi::OsString::from(".vbd-");
    name.push(target.file_name().unwrap_or_default());
    name.push(".restore");
    let draft = target.with_file_name(name);
    let written = fill(store, manifest, &draft, image, threads, progress);
    let finish = |written| {
        fs::File::open(&draft)
            .and_then(|file| file.sync_all())
            .map_err(Error::io(target, "make it durable"))?;
        create::publish(&draft, target, image.replace)?;
        crate::journal::sync_directory(target).map_err(Error::io(target, "make its name durable"))?;
        Ok(written)
    };
    written.and_then(finish).inspect_err(|_| {
        let _ = fs::remove_file(&draft);
    })
}

fn fill(
    store: &Store,
    manifest: &Manifest,
    draft: &Path,
    image: &NewImage,
    threads: usize,
    progress: &dyn Progress,
) -> Result<u64> {
    vbd_formats::create(draft, &NewImage { size: manifest.size, replace: true, ..image.clone() })?;
    let disk = Image::open(&ImageSpec::new(draft, image.format()))?;
    progress.step("restoring", manifest.size);
    let written = AtomicU64::new(0);
    in_parallel(manifest.chunks.len(), threads, progress, |index| {
        let (hash, len) = (manifest.chunks[index], manifest.len(index));
        if hash != Hash::ZEROES {
            let mut buffer = Buffer::new(len);
            buffer.copy_from_slice(&store.get(&hash, len)?);
            disk.write(index as u64 * u64::from(manifest.chunk), &mut buffer, len)?;
            written.fetch_add(len as u64, Ordering::Relaxed);
        }
        progress.advance(len as u64);
        Ok(())
    })?;
    progress.step("flushing", 0);
    disk.flush()?;
    Ok(written.into_inner())
}

/// Reads every chunk of backups and compares it with its name.
///
/// # Errors
/// The first that is missing or damaged.
pub fn verify(
    store: &Store,
    backups: &[Manifest],
    threads: usize,
    progress: &dyn Progress,
) -> Result<Checked> {
    let mut seen = HashSet::new();
    let mut all = Vec::new();
    for manifest in backups {
        for (index, hash) in manifest.chunks.iter().enumerate() {
            let len = manifest.len(index);
            if *hash != Hash::ZEROES && seen.insert((*hash, len)) {
                all.push((*hash, len));
            }
        }
    }
    let bytes = all.iter().map(|(_, len)| *len as u64).sum();
    progress.step("verifying", bytes);
    in_parallel(all.len(), threads, progress, |index| {
        let (hash, len) = &all[index];
        store.get(hash, *len)?;
        progress.advance(*len as u64);
        Ok(())
    })?;
    Ok(Checked { backups: backups.len(), chunks: all.len() as u64, bytes })
}
