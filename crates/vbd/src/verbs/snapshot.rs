//! `vbd snapshot`.

use std::path::{Path, PathBuf};

use vbd_core::Live;
use vbd_daemon::control::SnapshotInfo;
use vbd_image::size::Human;
use vbd_jobs::Image;

use super::control::Found;
use super::target::{self, Target};
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

/// Keep the disk's content as it is now, while its guests go on.
#[derive(clap::Args)]
struct NamedArgs {
    #[command(flatten)]
    of: target::Args,
    /// The snapshot's name
    name: String,
}

/// List the snapshots of a disk.
#[derive(clap::Args)]
struct ListArgs {
    #[command(flatten)]
    of: target::Args,
    /// Print JSON, sizes in bytes, dates in seconds since 1970
    #[arg(long)]
    json: bool,
}

/// Give the disk the content that it had then. What it holds now is lost, unless it was kept too. A guest that has it
/// mounted would be surprised: unmount it there first.
#[derive(clap::Args)]
struct ApplyArgs {
    #[command(flatten)]
    of: target::Args,
    /// The snapshot's number or name
    snapshot: String,
}

/// Forget a snapshot, and give back the room that only it needed.
#[derive(clap::Args)]
struct DeleteArgs {
    #[command(flatten)]
    of: target::Args,
    /// The snapshot's number or name
    snapshot: String,
}

/// Where snapshots are kept.
enum Place {
    /// By the process that serves the disk.
    Served(Box<Found>),
    /// In a file that nobody serves.
    File(Image, PathBuf),
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Create(args) => {
            let made = match place(&args.of, false)? {
                Place::Served(found) => found.client.create_snapshot(&found.disk.name, &args.name)?,
                Place::File(image, file) => live(&image, &file)?.create_snapshot(&args.name)?.into(),
            };
            Ok(print(&format!("{}: snapshot {} \"{}\"\n", args.of.name(), made.id, shown(&made.name)))?)
        }
        What::List(args) => {
            let snapshots = match place(&args.of, true)? {
                Place::Served(found) => found.client.snapshots(&found.disk.name)?,
                Place::File(image, file) => {
                    live(&image, &file)?.snapshots()?.into_iter().map(SnapshotInfo::from).collect()
                }
            };
            list(&snapshots, args.json)
        }
        What::Apply(args) => match place(&args.of, false)? {
            Place::Served(found) => Ok(found.client.apply_snapshot(&found.disk.name, &args.snapshot)?),
            Place::File(image, file) => Ok(live(&image, &file)?.apply_snapshot(&args.snapshot)?),
        },
        What::Delete(args) => match place(&args.of, false)? {
            Place::Served(found) => Ok(found.client.delete_snapshot(&found.disk.name, &args.snapshot)?),
            Place::File(image, file) => Ok(live(&image, &file)?.delete_snapshot(&args.snapshot)?),
        },
    }
}

fn place(of: &target::Args, read_only: bool) -> anyhow::Result<Place> {
    let file = match of.find()? {
        Target::Served(found) => return Ok(Place::Served(found)),
        Target::File(file) => file,
    };
    let spec = of.spec(&file)?;
    let image = Image::open(&if read_only { spec.read_only() } else { spec })?;
    Ok(Place::File(image, file))
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
