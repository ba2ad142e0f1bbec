//! A whole disk, from the table to its name.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vbd_image::create::Draft;
use vbd_image::partition::Partition;

use super::boot::{self, Booted};
use super::plan::{Content, Plan, Uefi};
use super::spec::{DiskSpec, PartitionSpec};
use super::tree::Tree;
use super::{place, swap};
use crate::error::Context;
use crate::staging::Staging;
use crate::vfat::{Name, Volume};
use crate::{
    BuildOptions, BuildSpec, Error, Progress, Report, Result, Source, Step, Tailor, Time, source_date_epoch,
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
/// As [`build`](crate::build); and sizes that do not fit, a tree that nothing can start.
pub(crate) fn build(
    path: &Path,
    options: &BuildOptions,
    disk: &DiskSpec,
    progress: &mut dyn Progress,
) -> Result<Report> {
    let plan = Plan::new(options, disk)?;
    let time = source_date_epoch()?.unwrap_or_default();
    let image = Draft::new(path, options.force)?;
    image.file().set_len(options.size).at(&format!("give {} bytes to", options.size), path)?;
    plan.table.write(image.file(), options.size).at("write the partition table of", path)?;
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Beside the image, so that the blocks of what is made there can be shared with it.
    let work = Work { staging: Staging::new(directory)?, image: image.file(), options, time };

    let root = work.filesystem("root", plan.root()?, root_options(options, &plan), progress)?;
    let Report { counts, mut warnings, uuid, label, free_bytes, free_inodes, .. } = root.report;
    progress.step(Step::Write, None);
    work.place(&root.path, plan.root()?, progress)?;
    let mut partitions = Vec::new();
    for (partition, content) in plan.table.partitions.iter().zip(&plan.contents) {
        let (filesystem, id) = match content {
            Content::Root => (Some(options.spec.filesystem.name()), Some(uuid.clone())),
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
                let name = format!("partition{}", partition.number);
                let options = work.options_of(spec)?;
                let made = work.filesystem(&name, partition, options, progress)?;
                work.place(&made.path, partition, progress)?;
                warnings.extend(made.report.warnings);
                (Some(spec.filesystem.name()), Some(made.report.uuid))
            }
            Content::Vfat(spec, name) => {
                work.vfat(plan.table.sector, partition, name, spec.from.as_deref())?;
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

    progress.step(Step::Sync, None);
    image.file().sync_all().at("make durable", path)?;
    let allocated = image.file().metadata().at("look at", path)?.blocks() * 512;
    if progress.cancelled() {
        return Err(Error::Interrupted);
    }
    image.publish()?;
    File::open(directory).and_then(|d| d.sync_all()).at("make durable the directory of", path)?;
    Ok(Report {
        path: path.to_owned(),
        size: options.size,
        allocated,
        filesystem: options.spec.filesystem,
        uuid,
        label,
        free_bytes,
        free_inodes,
        counts,
        warnings,
        partitions,
    })
}

/// The root filesystem's build.
fn root_options(options: &BuildOptions, plan: &Plan) -> BuildOptions {
    BuildOptions {
        spec: BuildSpec { disk: None, ..options.spec.clone() },
        tailor: plan.tailor.clone(),
        force: false,
        ..options.clone()
    }
}

/// A filesystem that was made in a file of its own.
struct Made {
    path: PathBuf,
    report: Report,
}

struct Work<'a> {
    staging: Staging,
    image: &'a File,
    options: &'a BuildOptions,
    time: Time,
}

impl Work<'_> {
    /// Makes a filesystem of a partition's size in a file beside the image.
    fn filesystem(
        &self,
        name: &str,
        partition: &Partition,
        options: BuildOptions,
        progress: &mut dyn Progress,
    ) -> Result<Made> {
        let path = self.staging.path().join(name);
        let report = crate::build(&path, &BuildOptions { size: partition.size, ..options }, progress)?;
        Ok(Made { path, report })
    }

    /// Moves one to its partition.
    fn place(&self, made: &Path, partition: &Partition, progress: &mut dyn Progress) -> Result<()> {
        let from = File::open(made).at("open", made)?;
        place::copy(&from, self.image, partition.start, progress)?;
        std::fs::remove_file(made).at("remove", made)
    }

    /// The build of a further filesystem.
    fn options_of(&self, partition: &PartitionSpec) -> Result<BuildOptions> {
        let from = match &partition.from {
            Some(path) => path.clone(),
            None => self.empty()?,
        };
        let spec = BuildSpec {
            filesystem: partition.filesystem.ext().unwrap_or_default(),
            label: partition.label.clone(),
            ..BuildSpec::new(Source::Path(from))
        };
        Ok(BuildOptions { spec, tailor: Tailor::default(), ..self.options.clone() })
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

    /// Makes a FAT with a directory's files.
    fn vfat(&self, sector: u64, partition: &Partition, name: &Name, from: Option<&Path>) -> Result<()> {
        let failed =
            |e| Error::io(format!("cannot make the filesystem of partition {}", partition.number), e);
        let (start, size) = (partition.start, partition.size);
        let mut volume = Volume::format(self.image, start, size, sector, name, self.time).map_err(failed)?;
        if let Some(from) = from {
            copy_tree(&mut volume, from, "")?;
        }
        volume.finish().map_err(failed)
    }
}

/// Copies the files below a directory; a FAT has neither links nor devices, nor owners and modes.
fn copy_tree(volume: &mut Volume<'_>, directory: &Path, below: &str) -> Result<()> {
    let entries = std::fs::read_dir(directory).at("list", directory)?;
    let mut entries: Vec<_> = entries.collect::<std::io::Result<_>>().at("list", directory)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let source = |reason: &str| Error::Source { path: path.clone(), reason: reason.to_owned() };
        let name =
            entry.file_name().into_string().map_err(|_| source("has a name that a FAT cannot have"))?;
        let inside = if below.is_empty() { name } else { format!("{below}/{name}") };
        let kind = entry.file_type().at("look at", &path)?;
        if kind.is_dir() {
            volume.make_directories(&inside).at("make in the FAT", &path)?;
            copy_tree(volume, &path, &inside)?;
        } else if kind.is_file() {
            let mut file = File::open(&path).at("open", &path)?;
            volume.add(&inside, &mut file).at("copy into the FAT", &path)?;
        } else {
            return Err(source("is neither a file nor a directory, and a FAT holds nothing else"));
        }
    }
    Ok(())
}
