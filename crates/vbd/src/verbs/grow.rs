//! `vbd grow`.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use vbd_core::SECTOR;
use vbd_daemon::control::{Grow, Grown};
use vbd_formats::Format;
use vbd_fs::Time;
use vbd_fs::upkeep::{self, Larger};
use vbd_image::lease::{self, Lease};
use vbd_image::open::{self, Kind};
use vbd_image::size::{Human, Size, SizeError};

use super::control;
use super::device::{self, Opening};
use super::image::ImageArgs;
use super::target::{self, Target};
use crate::output::print;

/// Make a disk larger: one that is served, whose guest sees it at once, or a file.
///
/// In a file that nobody serves, of whatever format (--format), the last partition and the ext3 or ext4 filesystem in it
/// grow with it.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The name of a disk that is served, or a file
    target: String,
    /// The new size (4G), or what is to be added (+2G)
    #[arg(long, short, value_name = "SIZE", required_unless_present = "to")]
    size: Option<Amount>,
    /// The new size, without the option's name
    #[arg(value_name = "SIZE", conflicts_with = "size")]
    to: Option<Amount>,
    /// Leave partitions and filesystems in a file as they are
    #[arg(long)]
    file_only: bool,
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    control: control::Args,
}

/// A size, or one with a plus before it.
#[derive(Clone, Copy)]
struct Amount(Grow);

impl FromStr for Amount {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let grow = match text.strip_prefix('+') {
            Some(more) => Grow::By(more.parse::<Size>()?.bytes()),
            None => Grow::To(text.parse::<Size>()?.bytes()),
        };
        Ok(Amount(grow))
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let Some(Amount(to)) = args.size.or(args.to) else { bail!("no size") };
    let (name, grown) = match target::find(&args.target, &args.control)? {
        Target::Served(found) => (found.disk.name.clone(), found.client.grow(&found.disk.name, to)?),
        Target::File(file) if args.file_only => (args.target.clone(), offline(&args.image, &file, to)?),
        Target::File(file) => return inside(&args.image, &file, to),
    };
    Ok(print(&format!("{name}: {} -> {}\n", Human(grown.before), Human(grown.size)))?)
}

/// Makes a file larger that nobody serves, with what is in it.
fn inside(image: &ImageArgs, path: &Path, to: Grow) -> anyhow::Result<()> {
    not_a_device(path)?;
    let open = || device::open(image, path, Opening::patient(lease::Mode::Write));
    let mut disk = open()?;
    let Some(mut size) = to.of(disk.size) else { bail!("{}: no file can become that large", path.display()) };
    if disk.device.plain().is_none() {
        size = size.next_multiple_of(SECTOR);
    }
    if size < disk.size {
        bail!(
            "{}: it has {} ({} bytes), and a disk does not become smaller this way: `vbd shrink` does that",
            path.display(),
            Human(disk.size),
            disk.size
        );
    }
    let before = disk.size;
    if image.format(path)? == Format::Vhd && size > before {
        // The tables of such an image move, which is not done while it is open.
        upkeep::may_grow(&disk, size, Time::now())?;
        drop(disk);
        vbd_jobs::resize(&image.spec(path)?, |_| Some(size), false)?;
        disk = open()?;
    }
    let larger = Larger { before, ..upkeep::grow(&disk, size, Time::now())? };
    let name = path.display();
    let mut text = format!("{name}: {} -> {}\n", Human(larger.before), Human(larger.size));
    if let Some((volume, before, after)) = larger.filesystem {
        let partition = volume.partition.map(|number| format!(" of partition {number}")).unwrap_or_default();
        text += &format!("{name}: filesystem{partition}: {} -> {}\n", Human(before), Human(after));
    }
    Ok(print(&text)?)
}

fn not_a_device(path: &Path) -> anyhow::Result<()> {
    if open::open(path)?.kind == Kind::Block {
        bail!("{}: a block device is made larger by what made it (lvextend, for example)", path.display());
    }
    Ok(())
}

/// Makes a file larger that nobody serves, and nothing in it, and keeps others from it meanwhile.
fn offline(image: &ImageArgs, path: &Path, to: Grow) -> anyhow::Result<Grown> {
    not_a_device(path)?;
    if image.format(path)? != Format::Raw {
        let (before, size) = vbd_jobs::resize(&image.spec(path)?, |before| to.of(before), false)?;
        return Ok(Grown { before, size });
    }
    let failed = |doing| move || format!("{}: {doing}", path.display());
    let file =
        File::options().read(true).write(true).open(path).with_context(failed("opening it for writing"))?;
    let options = lease::Options { wait: Duration::from_secs(2), ..lease::Options::default() };
    let _lease = Lease::acquire(file.as_fd(), path, lease::Mode::Write, options)?;
    let before = file.metadata()?.len();
    let Some(size) = to.of(before) else { bail!("{}: no file can become that large", path.display()) };
    if size < before {
        bail!(
            "{}: it has {} ({before} bytes), and a disk does not become smaller: a filesystem in it would be cut off",
            path.display(),
            Human(before)
        );
    }
    let grow = || file.set_len(size).and_then(|()| file.sync_all());
    grow().with_context(failed("making it larger"))?;
    Ok(Grown { before, size })
}
