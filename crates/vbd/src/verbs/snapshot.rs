//! `vbd snapshot`.

use std::path::{Path, PathBuf};

use vbd_core::Live;
use vbd_daemon::control::SnapshotInfo;
use vbd_image::size::Human;
use vbd_jobs::Image;

use super::control::{self, Found, unknown};
use super::image::ImageArgs;
use crate::output::{Table, print, print_json};

/// Keep a disk as it is now, inside its image, and go back to that later.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    Create(NamedArgs),
    List(ListArgs),
    Apply(ApplyArgs),
    Delete(DeleteArgs),
}

/// Which disk.
#[derive(clap::Args)]
struct DiskArgs {
    /// The name of a disk that is served, or a file
    #[arg(value_name = "DISK")]
    target: String,
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    control: control::Args,
}

/// Keep the disk's content as it is now, while its guests go on.
#[derive(clap::Args)]
struct NamedArgs {
    #[command(flatten)]
    of: DiskArgs,
    /// The snapshot's name
    name: String,
}

/// List the snapshots of a disk.
#[derive(clap::Args)]
struct ListArgs {
    #[command(flatten)]
    of: DiskArgs,
    /// Print JSON, sizes in bytes, dates in seconds since 1970
    #[arg(long)]
    json: bool,
}

/// Give the disk the content that it had then. What it holds now is lost, unless it was kept too. A guest that has it
/// mounted would be surprised: unmount it there first.
#[derive(clap::Args)]
struct ApplyArgs {
    #[command(flatten)]
    of: DiskArgs,
    /// The snapshot's number or name
    snapshot: String,
}

/// Forget a snapshot, and give back the room that only it needed.
#[derive(clap::Args)]
struct DeleteArgs {
    #[command(flatten)]
    of: DiskArgs,
    /// The snapshot's number or name
    snapshot: String,
}

/// Where snapshots are kept.
enum Place {
    /// By the process that serves the disk.
    Served(Found),
    /// In a file that nobody serves.
    File(Image, PathBuf),
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Create(args) => {
            let made = match args.of.place(false)? {
                Place::Served(found) => found.client.create_snapshot(&found.disk.name, &args.name)?,
                Place::File(image, file) => live(&image, &file)?.create_snapshot(&args.name)?.into(),
            };
            Ok(print(&format!("{}: snapshot {} \"{}\"\n", args.of.target, made.id, shown(&made.name)))?)
        }
        What::List(args) => {
            let snapshots = match args.of.place(true)? {
                Place::Served(found) => found.client.snapshots(&found.disk.name)?,
                Place::File(image, file) => {
                    live(&image, &file)?.snapshots()?.into_iter().map(SnapshotInfo::from).collect()
                }
            };
            list(&snapshots, args.json)
        }
        What::Apply(args) => match args.of.place(false)? {
            Place::Served(found) => Ok(found.client.apply_snapshot(&found.disk.name, &args.snapshot)?),
            Place::File(image, file) => Ok(live(&image, &file)?.apply_snapshot(&args.snapshot)?),
        },
        What::Delete(args) => match args.of.place(false)? {
            Place::Served(found) => Ok(found.client.delete_snapshot(&found.disk.name, &args.snapshot)?),
            Place::File(image, file) => Ok(live(&image, &file)?.delete_snapshot(&args.snapshot)?),
        },
    }
}

impl DiskArgs {
    fn place(&self, read_only: bool) -> anyhow::Result<Place> {
        let file = Path::new(&self.target);
        // A name has no slash in it; what has none is a name first.
        let served = if self.target.contains('/') { None } else { self.control.find(&self.target)? };
        let served = match served {
            None if file.exists() => self.control.find_file(file)?,
            other => other,
        };
        if let Some(found) = served {
            return Ok(Place::Served(found));
        }
        if !file.exists() && !self.target.contains('/') {
            return Err(unknown(&self.target).context(format!("{}: there is no such file", file.display())));
        }
        let spec = self.image.spec(file)?;
        let image = Image::open(&if read_only { spec.read_only() } else { spec })?;
        Ok(Place::File(image, file.to_owned()))
    }
}

fn live<'a>(image: &'a Image, file: &Path) -> anyhow::Result<&'a dyn Live> {
    let live = image.session().live();
    live.ok_or_else(|| {
        anyhow::anyhow!("{}: images of its format keep no snapshots: qcow2 does", file.display())
    })
}

fn shown(text: &str) -> String {
    text.replace(char::is_control, "?")
}

fn list(snapshots: &[SnapshotInfo], json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(&snapshots);
    }
    let mut table = Table::new(&[">ID", "NAME", "DATE", ">SIZE"]);
    for snapshot in snapshots {
        table.row([
            snapshot.id.clone(),
            snapshot.name.clone(),
            vbd_image::clock::rfc3339(i64::try_from(snapshot.date).unwrap_or(i64::MAX)),
            Human(snapshot.size).to_string(),
        ]);
    }
    Ok(print(&table.render(0))?)
}
