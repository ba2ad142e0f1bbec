//! An image file that somebody has the lease of, and where the filesystems in it are.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vbd_ext4::format::superblock;
use vbd_ext4::read::Part;
use vbd_image::ReadAt;
use vbd_image::lease::{self, Lease, Mode};
use vbd_image::partition::{self, Table};

use crate::error::Context;
use crate::{Error, Result};

/// How long a lease that somebody else has is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// An image file, with its lease.
#[derive(Debug)]
pub struct Disk {
    /// The file.
    pub file: File,
    /// Its name.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// Its partition table, if it is a whole disk.
    pub table: Option<Table>,
    /// The filesystems of the ext family in it.
    pub volumes: Vec<Volume>,
    /// Ends with the disk.
    _lease: Option<Lease>,
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
    /// Opens an image: a regular file, or a block device where it is only looked at.
    ///
    /// # Errors
    ///
    /// It cannot be opened or read, or somebody else uses it.
    pub fn open(path: &Path, mode: Mode) -> Result<Disk> {
        // For what it says of things that are no disks.
        let looked_at = vbd_image::open::open(path).map_err(|error| Error::Invalid(error.to_string()))?;
        let file = match mode {
            Mode::Read => looked_at.file,
            Mode::Write => File::options().read(true).write(true).open(path).at("open for writing", path)?,
        };
        let options = lease::Options { wait: PATIENCE, ..lease::Options::default() };
        let lease = Lease::acquire(file.as_fd(), path, mode, options)
            .map_err(|error| Error::Invalid(error.to_string()))?;
        // Under the lease: it may have changed until now.
        let size = match looked_at.kind {
            vbd_image::open::Kind::File => file.metadata().at("look at", path)?.len(),
            vbd_image::open::Kind::Block => looked_at.size,
        };
        let (table, volumes) = Disk::look(&file, size).at("read", path)?;
        Ok(Disk { file, path: path.to_owned(), size, table, volumes, _lease: Some(lease) })
    }

    /// The partition table and the filesystems of a file.
    fn look(file: &File, size: u64) -> std::io::Result<(Option<Table>, Vec<Volume>)> {
        // A boot sector of a filesystem can look like a table.
        if begins(file, 0, size)? {
            return Ok((None, vec![Volume { partition: None, start: 0, size }]));
        }
        let table = partition::read(file, size)?;
        let mut volumes = Vec::new();
        for partition in table.iter().flat_map(|table| &table.partitions) {
            if partition.kind.is_extended() || partition.start >= size {
                continue;
            }
            let volume = Volume {
                partition: Some(partition.number),
                start: partition.start,
                size: partition.size.min(size - partition.start),
            };
            if begins(file, volume.start, volume.size)? {
                volumes.push(volume);
            }
        }
        Ok((table, volumes))
    }

    /// The bytes of a filesystem.
    ///
    /// # Errors
    ///
    /// Those of the system.
    pub fn part(&self, volume: &Volume) -> Result<Part> {
        let file = self.file.try_clone().at("open once more", &self.path)?;
        Ok(Part::new(file, volume.start, volume.size))
    }

    /// What a filesystem of it is called in messages.
    pub fn name(&self, volume: &Volume) -> String {
        match volume.partition {
            Some(number) => format!("{}, partition {number}", self.path.display()),
            None => self.path.display().to_string(),
        }
    }

    /// How programs of e2fsprogs are told where a filesystem is.
    pub(super) fn argument(&self, volume: &Volume) -> std::ffi::OsString {
        argument(&self.path, volume)
    }

    /// A file without a name, which nobody else can have a lease of.
    pub(super) fn draft(file: &File, path: PathBuf) -> Result<Disk> {
        let file = file.try_clone().at("open once more", &path)?;
        let size = file.metadata().at("look at", &path)?.len();
        let (table, volumes) = Disk::look(&file, size).at("read", &path)?;
        Ok(Disk { file, path, size, table, volumes, _lease: None })
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
fn begins(file: &File, start: u64, size: u64) -> std::io::Result<bool> {
    if size < superblock::OFFSET + superblock::SIZE as u64 {
        return Ok(false);
    }
    let mut magic = [0; 2];
    // Where the documentation has the number, behind the boot block.
    let at = start + superblock::OFFSET + std::mem::offset_of!(superblock::Superblock, magic) as u64;
    Ok(file.fill_at(at, &mut magic)? == 2 && u16::from_le_bytes(magic) == superblock::MAGIC)
}
