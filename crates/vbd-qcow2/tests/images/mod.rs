//! Images to be loaded, and what is below them.
#![allow(
    dead_code,
    clippy::cast_possible_truncation,
    reason = "images of tests are small, and each test uses a part"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vbd_core::{Disk, Session};
use vbd_image::raw::{Raw, RawOptions};
use vbd_qcow2::{Qcow2, Qcow2Options};
use vbd_testing::Random;
use vbd_testing::power::{FileRecorder, SECTOR, Stamp, fill};
use vbd_testing::qcow2::Image;
use vbd_testing::qemu::Shape;

/// The content of what is below, by name.
pub(crate) const BELOW: Stamp = 0x1be1;

pub(crate) struct Files {
    pub(crate) image: PathBuf,
    pub(crate) data: PathBuf,
    pub(crate) backing: PathBuf,
    pub(crate) below: Option<Vec<u8>>,
    pub(crate) shape: Shape,
    _dir: tempfile::TempDir,
}

impl Files {
    pub(crate) fn new(shape: Shape, backed: bool, random: &mut Random) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let (image, backing) = (dir.path().join("disk.qcow2"), dir.path().join("backing.raw"));
        let sectors = shape.size / 512;
        let below = backed.then(|| {
            let mut below = vec![0; (sectors / 2 + random.below(sectors)) as usize * SECTOR];
            fill(BELOW, 0, &mut below);
            std::fs::write(&backing, &below).expect("room");
            below
        });
        shape.create(&image, backed.then_some((&backing, "raw")));
        Files { data: image.with_extension("data"), image, backing, below, shape, _dir: dir }
    }

    pub(crate) fn open(
        &self,
        image: Option<Arc<FileRecorder>>,
        data: Option<Arc<FileRecorder>>,
    ) -> Arc<dyn Session> {
        self.open_at(&self.image, &self.data, image, data)
    }

    /// Opens an image and data file with what this has below.
    pub(crate) fn open_at(
        &self,
        image: &Path,
        data: &Path,
        image_faults: Option<Arc<FileRecorder>>,
        data_faults: Option<Arc<FileRecorder>>,
    ) -> Arc<dyn Session> {
        let mut options = Qcow2Options::new(image);
        options.faults = image_faults.map(|recorder| recorder as _);
        if self.below.is_some() {
            let raw = RawOptions { read_only: true, ..RawOptions::new(&self.backing) };
            options.backing = Some(Raw::new(raw));
        }
        if self.shape.data_file {
            let faults = data_faults.map(|recorder| recorder as _);
            options.data_file = Some(Raw::new(RawOptions { faults, ..RawOptions::new(data) }));
        }
        Qcow2::new(options).open().expect("openable")
    }

    pub(crate) fn bytes(&self) -> Vec<Vec<u8>> {
        let mut files = vec![std::fs::read(&self.image).expect("there")];
        if self.shape.data_file {
            files.push(std::fs::read(&self.data).expect("there"));
        }
        files
    }

    pub(crate) fn content(&self, image: &Image<'_>, data: Option<&[u8]>) -> Result<Vec<u8>, String> {
        image.content(&|offset, buffer| self.read_below(offset, buffer), data)
    }

    pub(crate) fn read_below(&self, offset: u64, buffer: &mut [u8]) {
        let below = self.below.as_deref().unwrap_or(&[]);
        let start = (offset as usize).min(below.len());
        let len = buffer.len().min(below.len() - start);
        buffer[..len].copy_from_slice(&below[start..start + len]);
        buffer[len..].fill(0);
    }

    /// The names of what the disk holds at first.
    pub(crate) fn first(&self) -> Vec<Stamp> {
        let under = self.below.as_ref().map_or(0, Vec::len) / SECTOR;
        let sectors = self.shape.size as usize / SECTOR;
        (0..sectors).map(|sector| if sector < under { BELOW } else { 0 }).collect()
    }
}
