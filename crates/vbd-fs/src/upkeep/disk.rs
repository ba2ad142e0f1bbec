//! A disk that somebody has the lease of, and where the filesystems in it are.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vbd_ext4::format::superblock;
use vbd_ext4::read::Window;
use vbd_image::ReadAt;
use vbd_image::lease::{self, Lease, Mode};
use vbd_image::partition::{self, Table};

use super::device::{Bytes, Device, Plain};
use crate::error::Context;
use crate::{Error, Result};

/// How long a lease that somebody else has is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// A disk, with its lease: a plain file, or one in a format that a caller knows.
pub struct Disk {
    /// What holds its bytes.
    pub device: Arc<dyn Device>,
    /// The name of its file.
    pub path: PathBuf,
    /// Its size in bytes, as it was when it was opened.
    pub size: u64,
    /// Its partition table, if it is a whole disk.
    pub table: Option<Table>,
    /// The filesystems of the ext family in it.
    pub volumes: Vec<Volume>,
}

/// A filesystem in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Volume {
    /// The number of its partition, if it is in one.
    pub partition: Option<u32>,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Bytes that it may take.
    pub size: u64,
}

impl Disk {
    /// Opens a file whose bytes are the disk's: a regular one, or a block device.
    ///
    /// # Errors
    ///
    /// It cannot be opened or read, or somebody else uses it.
    pub fn open(path: &Path, mode: Mode) -> Result<Disk> {
        Disk::open_with(path, mode, lease::Options { wait: PATIENCE, ..lease::Options::default() })
    }

    /// The same, with a lease that is asked for like this.
    ///
    /// # Errors
    ///
    /// As [`Disk::open`].
    pub fn open_with(path: &Path, mode: Mode, options: lease::Options) -> Result<Disk> {
        let opened = match mode {
            Mode::Read => vbd_image::open::open(path),
            Mode::Write => vbd_image::open::open_to_write(path),
        };
        // For what it says of things that are no disks.
        let image = opened.map_err(|error| Error::Invalid(error.to_string()))?;
        let lease = Lease::acquire(image.file.as_fd(), path, mode, options)?;
        // Under the lease: it may have changed until now.
        let size = match image.kind {
            vbd_image::open::Kind::File => image.file.metadata().at("look at", path)?.len(),
            vbd_image::open::Kind::Block => image.size,
        };
        Disk::plain_file(image.file, size, Some(lease), path)
    }

    /// A file of `size` bytes, which are the disk's, that the caller has opened; `path` is what it is called. The lease
    /// ends with the disk.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn plain_file(file: File, size: u64, lease: Option<Lease>, path: &Path) -> Result<Disk> {
        Disk::of(Arc::new(Plain::new(file, size, lease)), path)
    }

    /// A disk that the caller has opened, and whose lease it has; `path` is what it is called.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn of(device: Arc<dyn Device>, path: &Path) -> Result<Disk> {
        let size = device.size();
        let (table, volumes) = Disk::look(&Bytes(&*device), size).at("read", path)?;
        Ok(Disk { device, path: path.to_owned(), size, table, volumes })
    }

    /// The partition table and the filesystems of a disk.
    fn look(bytes: &Bytes<'_>, size: u64) -> std::io::Result<(Option<Table>, Vec<Volume>)> {
        // A boot sector of a filesystem can look like a table.
        if begins(bytes, 0, size)? {
            return Ok((None, vec![Volume { partition: None, start: 0, size }]));
        }
        let table = partition::read(bytes, size)?;
        let mut volumes = Vec::new();
        for partition in table.iter().flat_map(|table| &table.partitions) {
            if let Some(volume) = Volume::of(partition, size)
                && begins(bytes, volume.start, volume.size)?
            {
                volumes.push(volume);
            }
        }
        Ok((table, volumes))
    }

    /// The bytes of a filesystem.
    pub fn part(&self, volume: &Volume) -> Window<Arc<dyn Device>> {
        Window::new(self.device.clone(), volume.start, volume.size)
    }

    /// What is in it, for people.
    ///
    /// # Errors
    ///
    /// Those of reading.
    pub fn contents(&self) -> std::io::Result<vbd_image::probe::Contents> {
        vbd_image::probe::contents(&Bytes(&*self.device), self.size)
    }

    /// What a filesystem of it is called in messages.
    pub fn name(&self, volume: &Volume) -> String {
        match volume.partition {
            Some(number) => format!("{}, partition {number}", self.path.display()),
            None => self.path.display().to_string(),
        }
    }

    /// The file, whose bytes have to be those of the disk.
    pub(super) fn plain(&self) -> Result<&File> {
        self.device.plain().ok_or_else(|| {
            let what = "this is done in raw images alone; `vbd convert` makes one of it";
            Error::Inside(format!("{}: {what}", self.path.display()))
        })
    }

    /// How programs of e2fsprogs are told where a filesystem is.
    pub(super) fn argument(&self, volume: &Volume) -> Result<std::ffi::OsString> {
        self.plain().map(|_| argument(&self.path, volume))
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Disk { path, size, table, volumes, .. } = self;
        let mut shown = f.debug_struct("Disk");
        shown.field("path", path).field("size", size).field("table", table).field("volumes", volumes);
        shown.finish_non_exhaustive()
    }
}

impl Volume {
    /// What of a partition is on a disk of `size` bytes, if there can be a filesystem in it. Of one that ends beyond the
    /// disk it is what is there, and the filesystem says whether that is enough.
    pub fn of(partition: &partition::Partition, size: u64) -> Option<Volume> {
        let fits = !partition.kind.is_extended() && partition.start < size;
        fits.then(|| Volume {
            partition: Some(partition.number),
            start: partition.start,
            size: partition.size.min(size - partition.start),
        })
    }
}

/// How programs of e2fsprogs are told where in a file a filesystem is.
pub(super) fn argument(path: &Path, volume: &Volume) -> std::ffi::OsString {
    let mut argument = std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).into_os_string();
    if volume.start > 0 {
        argument.push(format!("?offset={}", volume.start));
    }
    argument
}

/// Whether a filesystem of the ext family begins there.
fn begins(bytes: &Bytes<'_>, start: u64, size: u64) -> std::io::Result<bool> {
    if size < superblock::OFFSET + superblock::SIZE as u64 {
        return Ok(false);
    }
    let mut magic = [0; 2];
    // Where the documentation has the number, behind the boot block.
    let at = start + superblock::OFFSET + std::mem::offset_of!(superblock::Superblock, magic) as u64;
    Ok(bytes.fill_at(at, &mut magic)? == 2 && u16::from_le_bytes(magic) == superblock::MAGIC)
}
