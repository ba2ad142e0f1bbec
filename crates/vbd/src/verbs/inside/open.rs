//! Opening a disk to look into it.

use std::os::fd::AsFd;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use vbd_ext4::read::{self, Filesystem, Inode, Links, Part};
use vbd_image::lease::{self, Lease, LeaseError};
use vbd_image::open::{self, Image};
use vbd_image::partition::{self, Partition, Table};
use vbd_image::probe;
use vbd_image::size::Human;

use super::Target;

/// How a disk is looked into.
#[derive(clap::Args, Clone, Copy)]
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
}

/// A disk that is looked into. As long as it is there, nobody may write to the disk.
pub(super) struct Opened {
    pub(super) filesystem: Filesystem,
    /// The partition that it is in, if it is in one.
    pub(super) partition: Option<u32>,
    _lease: Option<Lease>,
}

/// A disk file under a lease.
pub(super) struct Disk {
    image: Image,
    lease: Lease,
}

impl Access {
    /// As a reader that takes nothing for granted.
    pub(super) fn for_partition(partition: Option<u32>) -> Access {
        Access { partition, force_share: false, ignore_checksums: false }
    }

    /// The same partition, to change what is in it.
    pub(super) fn changing(&self) -> super::change::Changing {
        super::change::Changing { partition: self.partition }
    }

    /// Where in a file the filesystem is that is meant: the first byte, and how many.
    pub(super) fn place(&self, image: &Image, path: &Path) -> anyhow::Result<(u64, u64)> {
        let Some(number) = self.filesystem(image, path)?.1 else { return Ok((0, image.size)) };
        let table = partitions(image, path)?;
        let partition = table.as_ref().and_then(|table| table.partition(number));
        let partition =
            partition.with_context(|| format!("{}: its partition table changed", path.display()))?;
        Ok((partition.start, partition.size.min(image.size - partition.start)))
    }

    /// Opens a disk file and takes the lease for reading.
    pub(super) fn disk(&self, path: &Path) -> anyhow::Result<Disk> {
        let image = open::open(path)?;
        let options = lease::Options { override_: self.force_share, ..lease::Options::default() };
        let lease = Lease::acquire(image.file.as_fd(), path, lease::Mode::Read, options);
        let lease = lease.map_err(|error| match error {
            LeaseError::InUse { .. } => {
                anyhow!("{error}, or look at what may be changing with --force-share")
            }
            other => other.into(),
        });
        Ok(Disk { image, lease: lease? })
    }

    /// Opens the filesystem that is meant.
    pub(super) fn open(&self, path: &Path) -> anyhow::Result<Opened> {
        let disk = self.disk(path)?;
        let Disk { image, lease } = disk;
        let opened = self.filesystem(&image, path)?;
        for note in opened.0.notes() {
            eprintln!("vbd: {}: {note}", path.display());
        }
        Ok(Opened { filesystem: opened.0, partition: opened.1, _lease: Some(lease) })
    }

    /// Every filesystem of a disk that can be read.
    pub(super) fn all(&self, path: &Path) -> anyhow::Result<Vec<Opened>> {
        if self.partition.is_some() {
            return Ok(vec![self.open(path)?]);
        }
        let Disk { image, lease } = self.disk(path)?;
        let mut all = Vec::new();
        match self.part(&image, 0, image.size) {
            Ok(filesystem) => all.push(Opened { filesystem, partition: None, _lease: None }),
            Err(read::Error::NotExt) => {
                for partition in partitions(&image, path)?.map(|table| table.partitions).unwrap_or_default() {
                    match self.partition(&image, &partition) {
                        Ok(filesystem) => {
                            all.push(Opened { filesystem, partition: Some(partition.number), _lease: None });
                        }
                        Err(read::Error::NotExt) => {}
                        Err(error) => eprintln!("vbd: {}: {error}", named(path, partition.number)),
                    }
                }
            }
            Err(error) => return Err(error).context(path.display().to_string()),
        }
        match all.last_mut() {
            Some(last) => last._lease = Some(lease),
            None => bail!("{}: {}", path.display(), nothing(&image)?),
        }
        Ok(all)
    }

    fn filesystem(&self, image: &Image, path: &Path) -> anyhow::Result<(Filesystem, Option<u32>)> {
        if let Some(number) = self.partition {
            let table = partitions(image, path)?.with_context(|| {
                format!("{}: it has no partition table; leave --partition out", path.display())
            })?;
            let partition = table.partition(number).with_context(|| {
                let numbers = table.partitions.iter().map(|partition| partition.number.to_string());
                let numbers = numbers.collect::<Vec<_>>().join(", ");
                format!("{}: it has no partition {number}; it has {numbers}", path.display())
            })?;
            let filesystem = self.partition(image, partition).with_context(|| named(path, number))?;
            return Ok((filesystem, Some(number)));
        }
        match self.part(image, 0, image.size) {
            Err(read::Error::NotExt) => {}
            other => return Ok((other.with_context(|| path.display().to_string())?, None)),
        }
        let Some(table) = partitions(image, path)? else {
            bail!("{}: {}", path.display(), nothing(image)?);
        };
        let mut found = Vec::new();
        for partition in &table.partitions {
            match self.partition(image, partition) {
                Err(read::Error::NotExt) => {}
                other => found.push((partition.number, other)),
            }
        }
        match found.len() {
            0 => bail!("{}: none of its partitions has an ext2, ext3 or ext4 filesystem", path.display()),
            1 => {}
            _ => {
                let numbers =
                    found.iter().map(|(number, _)| number.to_string()).collect::<Vec<_>>().join(", ");
                bail!("{}: it has several partitions; name one with --partition: {numbers}", path.display());
            }
        }
        let (number, filesystem) = found.remove(0);
        Ok((filesystem.with_context(|| named(path, number))?, Some(number)))
    }

    fn partition(&self, image: &Image, partition: &Partition) -> read::Result<Filesystem> {
        if partition.kind.is_extended() || partition.start >= image.size {
            return Err(read::Error::NotExt);
        }
        // One that ends beyond the disk has what is there, and the filesystem says whether that is enough.
        self.part(image, partition.start, partition.size.min(image.size - partition.start))
    }

    fn part(&self, image: &Image, start: u64, size: u64) -> read::Result<Filesystem> {
        let file = image.file.try_clone().map_err(|error| read::Error::Io { offset: 0, length: 0, error })?;
        let options = read::Options { verify: !self.ignore_checksums, ..read::Options::default() };
        Filesystem::open(Part::new(file, start, size), options)
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

fn named(path: &Path, partition: u32) -> String {
    format!("{}, partition {partition}", path.display())
}

fn partitions(image: &Image, path: &Path) -> anyhow::Result<Option<Table>> {
    partition::read(&image.file, image.size)
        .with_context(|| format!("{}: cannot read its partition table", path.display()))
}

/// What there is instead of a filesystem that can be read.
fn nothing(image: &Image) -> anyhow::Result<String> {
    let contents = probe::contents(&image.file, image.size)?;
    Ok(match contents.filesystem {
        Some(found) => format!("it has {}, and only ext2, ext3 and ext4 can be read", found.kind),
        None => format!("no ext2, ext3 or ext4 filesystem is in its {}", Human(image.size)),
    })
}
