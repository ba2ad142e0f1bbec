//! A whole disk, from the table to its name.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vbd_image::partition::Partition;

use super::boot::{self, Booted};
use super::plan::{Content, Plan, Uefi};
use super::spec::{DiskSpec, PartitionSpec};
use super::tree::Tree;
use super::{fat, swap};
use crate::build::{self, Key, Made, Place};
use crate::error::Context;
use crate::staging::Staging;
use crate::upkeep::copy;
use crate::vfat::{Name, Volume};
use crate::{
    BuildOptions, BuildSpec, Error, Filesystem, ImageSize, Progress, Report, Result, Source, Tailor, Time,
};

/// A partition that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionReport {
    /// Its number, from 1.
    pub number: u32,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Its size in bytes.
    pub size: u64,
    /// What it is for.
    #[serde(rename = "type")]
    pub kind: String,
    /// What `PARTUUID=` calls it.
    pub partuuid: Option<String>,
    /// What is in it: a filesystem's type, or `swap`.
    pub filesystem: Option<String>,
    /// Its filesystem's UUID.
    pub uuid: Option<String>,
}

/// Makes a whole disk as `options.spec.disk` says, at `path`. The report is the root filesystem's, with the partitions.
///
/// # Errors
///
/// As [`build()`](crate::build()); and sizes that do not fit, a tree that nothing can start.
pub(crate) fn build(
    path: &Path,
    options: &BuildOptions,
    disk: &DiskSpec,
    progress: &mut dyn Progress,
) -> Result<Report> {
    let mut plan = Plan::new(options, disk)?;
    let time = options.time.unwrap_or_default();
    let (image, skip) = build::begin(path, options.force)?;
    if let ImageSize::Fixed(size) = options.size {
        image.file().set_len(size).at(&format!("give {size} bytes to"), path)?;
    }
    let directory = build::directory_of(path);
    let staging = Staging::new(directory)?;
    let work = Work { staging, directory, image: image.file(), skip, options, time };

    let made = work.filesystem(plan.root()?.start, &plan.root_options(options)?, progress)?;
    let size = plan.settle(options, image.file().metadata().at("look at", path)?.len())?;
    image.file().set_len(size).at(&format!("give {size} bytes to"), path)?;
    plan.table.write(image.file(), size).at("write the partition table of", path)?;
    let mut warnings = Vec::new();
    let mut partitions = Vec::new();
    for (partition, content) in plan.table.partitions.iter().zip(&plan.contents) {
        let (filesystem, id) = match content {
            Content::Root => (Some(options.spec.filesystem.name()), Some(made.superblock.uuid.clone())),
            Content::Esp(name) => {
                work.esp(&plan, partition, name, &mut warnings, progress)?;
                (Some("vfat"), Some(name.uuid()))
            }
            Content::Swap { uuid, label } => {
                let written =
                    swap::write(work.image, partition.start, partition.size, *uuid, label.as_deref());
                written.at("write swap space to", path)?;
                (Some("swap"), Some(uuid.to_string()))
            }
            Content::Filesystem(spec) => {
                let options = work.options_of(spec, partition.size)?;
                let made = work.filesystem(partition.start, &options, progress)?;
                warnings.extend(made.done.warnings);
                (Some(spec.filesystem.name()), Some(made.superblock.uuid))
            }
            Content::Vfat(spec, name) => {
                work.vfat(plan.table.sector, partition, name, spec.from.as_deref(), progress)?;
                (Some("vfat"), Some(name.uuid()))
            }
            Content::Nothing => (None, None),
        };
        partitions.push(PartitionReport {
            number: partition.number,
            start: partition.start,
            size: partition.size,
            kind: partition.kind.to_string(),
            partuuid: plan.table.partuuid(partition),
            filesystem: filesystem.map(str::to_owned),
            uuid: id,
        });
    }
    drop(work);
    let mut report = build::finish(path, image, options, made, progress)?;
    report.warnings.append(&mut warnings);
    Ok(Report { partitions, ..report })
}

struct Work<'a> {
    /// Beside the image, so that the blocks of what is made there can be shared with it.
    staging: Staging,
    directory: &'a Path,
    image: &'a File,
    skip: Vec<Key>,
    options: &'a BuildOptions,
    time: Time,
}

impl Work<'_> {
    /// Makes a filesystem that begins at `start`: ext4 in its place, others in a file of their own that is moved there.
    fn filesystem(&self, start: u64, options: &BuildOptions, progress: &mut dyn Progress) -> Result<Made> {
        let place = |file, offset| Place { file, offset, directory: self.directory, skip: self.skip.clone() };
        if options.spec.filesystem == Filesystem::Ext4 {
            return build::make(options, &place(self.image, start), progress);
        }
        let file = tempfile::tempfile_in(self.staging.path()).at("make a file in", self.staging.path())?;
        if let ImageSize::Fixed(size) = options.size {
            file.set_len(size).at("give its size to a file in", self.staging.path())?;
        }
        let made = build::make(options, &place(&file, 0), progress)?;
        let length = file.metadata().at("look at a file in", self.staging.path())?.len();
        if !copy::range(&file, (0, length), self.image, start, progress)? {
            return Err(Error::Interrupted);
        }
        Ok(made)
    }

    /// The build of a further filesystem.
    fn options_of(&self, partition: &PartitionSpec, size: u64) -> Result<BuildOptions> {
        let from = match &partition.from {
            Some(path) => path.clone(),
            None => self.empty()?,
        };
        let spec = BuildSpec {
            filesystem: partition.filesystem.ext().unwrap_or_default(),
            label: partition.label.clone(),
            ..BuildSpec::new(Source::Path(from))
        };
        let size = ImageSize::Fixed(size);
        Ok(BuildOptions { size, spec, tailor: Tailor::default(), ..self.options.clone() })
    }

    /// An empty directory, as the root of a filesystem is.
    fn empty(&self) -> Result<PathBuf> {
        let path = self.staging.path().join("empty");
        if !path.exists() {
            std::fs::create_dir(&path).at("make", &path)?;
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).at("set the mode of", &path)?;
            let time =
                std::time::UNIX_EPOCH + std::time::Duration::from_secs(self.time.seconds.unsigned_abs());
            File::open(&path).and_then(|d| d.set_modified(time)).at("set the time of", &path)?;
        }
        Ok(path)
    }

    /// Makes the EFI system partition, and fills it with what starts the system, which is in the root's
    /// filesystem.
    fn esp(
        &self,
        plan: &Plan,
        partition: &Partition,
        name: &Name,
        warnings: &mut Vec<String>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let failed = |e| Error::io("cannot make the EFI system partition", e);
        let (start, size) = (partition.start, partition.size);
        let mut esp =
            Volume::format(self.image, start, size, plan.table.sector, name, self.time).map_err(failed)?;
        if plan.uefi != Uefi::Not {
            let root = plan.root()?;
            let tree = Tree::open(self.image, root.start, root.size)?;
            let booted = boot::fill(&mut esp, &tree, plan.architecture, &plan.command_line, progress)?;
            if booted == Booted::Nothing {
                let nothing = "the tree has no kernel in /boot: the disk does not start by itself";
                if plan.uefi == Uefi::Asked {
                    return Err(Error::tailor(
                        "boot",
                        format!("{nothing}; add a kernel, or build with --boot none"),
                    ));
                }
                warnings.push(nothing.to_owned());
            }
        }
        esp.finish().map_err(failed)
    }

    /// Makes a FAT with the files of a directory or an archive.
    fn vfat(
        &self,
        sector: u64,
        partition: &Partition,
        name: &Name,
        from: Option<&Path>,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let failed =
            |e| Error::io(format!("cannot make the filesystem of partition {}", partition.number), e);
        let (start, size) = (partition.start, partition.size);
        let mut volume = Volume::format(self.image, start, size, sector, name, self.time).map_err(failed)?;
        if let Some(from) = from {
            fat::fill(&mut volume, from, self.staging.path(), progress)?;
        }
        volume.finish().map_err(failed)
    }
}
