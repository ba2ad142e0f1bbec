//! Opening a disk to look into it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use vbd_ext4::read::{self, Filesystem, Inode, Links};
use vbd_formats::Format;
use vbd_fs::upkeep::{Disk, Volume};
use vbd_image::lease::Mode;
use vbd_image::size::Human;

use super::Target;
use super::change::Changing;
use crate::verbs::device::{self, Opening};
use crate::verbs::image::ImageArgs;

/// How a disk is looked into.
#[derive(clap::Args, Clone)]
pub(super) struct Access {
    /// The partition, where the file is a whole disk; not needed where one alone has a filesystem that can be read
    #[arg(long, value_name = "N")]
    partition: Option<u32>,
    /// Look although somebody may be writing: what is shown may never have been so
    #[arg(long)]
    force_share: bool,
    /// Do not verify checksums: a damaged filesystem may still give something
    #[arg(long)]
    ignore_checksums: bool,
    #[command(flatten)]
    image: ImageArgs,
}

/// A disk that is looked into. As long as it is there, nobody may write to the disk.
pub(super) struct Opened {
    pub(super) filesystem: Filesystem,
    /// The partition that it is in, if it is in one.
    pub(super) partition: Option<u32>,
}

impl Access {
    /// The same partition of an image of the same format, to change what is in it.
    pub(super) fn changing(&self) -> Changing {
        Changing { partition: self.partition, image: self.image.clone() }
    }

    /// The same for an image of another format.
    pub(super) fn of_format(&self, format: Format) -> Access {
        let image = ImageArgs { format: Some(format), ..self.image.clone() };
        Access { image, ..self.clone() }
    }

    /// Opens a disk and takes the lease for reading.
    fn disk(&self, path: &Path) -> anyhow::Result<Disk> {
        let opening = Opening { mode: Mode::Read, share: self.force_share, wait: Duration::ZERO };
        device::open(&self.image, path, opening).map_err(|error| match device::is_in_use(&error) {
            true => anyhow!("{error}, or look at what may be changing with --force-share"),
            false => error,
        })
    }

    /// Opens the filesystem that is meant.
    pub(super) fn open(&self, path: &Path) -> anyhow::Result<Opened> {
        let disk = self.disk(path)?;
        let volume = volume(&disk, self.partition)?;
        let filesystem = self.filesystem(&disk, &volume).with_context(|| disk.name(&volume))?;
        for note in filesystem.notes() {
            eprintln!("vbd: {}: {note}", path.display());
        }
        Ok(Opened { filesystem, partition: volume.partition })
    }

    /// Every filesystem of a disk that can be read.
    pub(super) fn all(&self, path: &Path) -> anyhow::Result<Vec<Opened>> {
        if self.partition.is_some() {
            return Ok(vec![self.open(path)?]);
        }
        let disk = self.disk(path)?;
        let mut all = Vec::new();
        for volume in &disk.volumes {
            match self.filesystem(&disk, volume) {
                Ok(filesystem) => all.push(Opened { filesystem, partition: volume.partition }),
                Err(error) if volume.partition.is_some() => {
                    eprintln!("vbd: {}: {error}", disk.name(volume));
                }
                Err(error) => return Err(error).context(disk.name(volume)),
            }
        }
        if all.is_empty() {
            bail!("{}: {}", path.display(), nothing(&disk)?);
        }
        Ok(all)
    }

    fn filesystem(&self, disk: &Disk, volume: &Volume) -> read::Result<Filesystem> {
        let options = read::Options { verify: !self.ignore_checksums, ..read::Options::default() };
        Filesystem::open(disk.part(volume), options)
    }
}

impl Opened {
    /// What a path of it leads to.
    pub(super) fn find(&self, target: &Target, links: Links) -> anyhow::Result<Inode> {
        self.filesystem.lookup(&target.path, links).map_err(|error| match error {
            read::Error::NotFound(_) | read::Error::NotDirectory(_) | read::Error::Links(_) => {
                anyhow::anyhow!("{}:{error}", target.image.display())
            }
            other => anyhow::Error::from(other).context(target.shown()),
        })
    }
}

/// Where on a disk the filesystem is that is meant.
pub(super) fn volume(disk: &Disk, wanted: Option<u32>) -> anyhow::Result<Volume> {
    let name = disk.path.display();
    let numbers = |numbers: &mut dyn Iterator<Item = u32>| {
        numbers.map(|number| number.to_string()).collect::<Vec<_>>().join(", ")
    };
    if let Some(number) = wanted {
        let table = disk.table.as_ref();
        let table =
            table.with_context(|| format!("{name}: it has no partition table; leave --partition out"))?;
        let partition = table.partition(number).with_context(|| {
            let numbers = numbers(&mut table.partitions.iter().map(|partition| partition.number));
            format!("{name}: it has no partition {number}; it has {numbers}")
        })?;
        return Volume::of(partition, disk.size)
            .with_context(|| format!("{name}, partition {number}: {}", read::Error::NotExt));
    }
    match (&disk.table, &disk.volumes[..]) {
        (_, [volume]) => Ok(*volume),
        (None, []) => bail!("{name}: {}", nothing(disk)?),
        (Some(_), []) => bail!("{name}: none of its partitions has an ext2, ext3 or ext4 filesystem"),
        (_, several) => {
            let numbers = numbers(&mut several.iter().filter_map(|volume| volume.partition));
            bail!("{name}: it has several partitions; name one with --partition: {numbers}")
        }
    }
}

/// What there is instead of a filesystem that can be read.
fn nothing(disk: &Disk) -> anyhow::Result<String> {
    Ok(match disk.contents()?.filesystem {
        Some(found) => format!("it has {}, and only ext2, ext3 and ext4 can be read", found.kind),
        None => format!("no ext2, ext3 or ext4 filesystem is in its {}", Human(disk.size)),
    })
}
