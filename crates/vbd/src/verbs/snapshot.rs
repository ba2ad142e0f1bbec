//! `vbd snapshot`.

use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::Serialize;
use vbd_core::{Live, Snapshot};
use vbd_image::size::Human;
use vbd_jobs::Image;

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

/// Keep the disk's content as it is now.
#[derive(clap::Args)]
struct NamedArgs {
    /// The image
    file: PathBuf,
    /// The snapshot's name
    name: String,
    #[command(flatten)]
    image: ImageArgs,
}

/// List the snapshots of an image.
#[derive(clap::Args)]
struct ListArgs {
    /// The image
    file: PathBuf,
    /// Print JSON, sizes in bytes, dates in seconds since 1970
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    image: ImageArgs,
}

/// Give the disk the content that it had then. What it holds now is lost, unless it was kept too.
#[derive(clap::Args)]
struct ApplyArgs {
    /// The image
    file: PathBuf,
    /// The snapshot's number or name
    snapshot: String,
    #[command(flatten)]
    image: ImageArgs,
}

/// Forget a snapshot, and give back the room that only it needed.
#[derive(clap::Args)]
struct DeleteArgs {
    /// The image
    file: PathBuf,
    /// The snapshot's number or name
    snapshot: String,
    #[command(flatten)]
    image: ImageArgs,
}

/// A snapshot for programs.
#[derive(Serialize)]
struct Object {
    id: String,
    name: String,
    date: u64,
    size: u64,
    state: u64,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Create(args) => {
            let image = open(&args.image, &args.file, false)?;
            let made = live(&image, &args.file)?.create_snapshot(&args.name)?;
            Ok(print(&format!("{}: snapshot {} \"{}\"\n", args.file.display(), made.id, shown(&made.name)))?)
        }
        What::List(args) => {
            let image = open(&args.image, &args.file, true)?;
            list(&live(&image, &args.file)?.snapshots()?, args.json)
        }
        What::Apply(args) => {
            let image = open(&args.image, &args.file, false)?;
            Ok(live(&image, &args.file)?.apply_snapshot(&args.snapshot)?)
        }
        What::Delete(args) => {
            let image = open(&args.image, &args.file, false)?;
            Ok(live(&image, &args.file)?.delete_snapshot(&args.snapshot)?)
        }
    }
}

fn open(image: &ImageArgs, file: &Path, read_only: bool) -> anyhow::Result<Image> {
    let spec = image.spec(file)?;
    Ok(Image::open(&if read_only { spec.read_only() } else { spec })?)
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

fn list(snapshots: &[Snapshot], json: bool) -> anyhow::Result<()> {
    let seconds =
        |snapshot: &Snapshot| snapshot.date.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    if json {
        let objects: Vec<_> = snapshots
            .iter()
            .map(|snapshot| Object {
                id: snapshot.id.clone(),
                name: snapshot.name.clone(),
                date: seconds(snapshot),
                size: snapshot.size,
                state: snapshot.state,
            })
            .collect();
        return print_json(&objects);
    }
    let mut table = Table::new(&[">ID", "NAME", "DATE", ">SIZE"]);
    for snapshot in snapshots {
        table.row([
            snapshot.id.clone(),
            snapshot.name.clone(),
            vbd_image::clock::rfc3339(i64::try_from(seconds(snapshot)).unwrap_or(i64::MAX)),
            Human(snapshot.size).to_string(),
        ]);
    }
    Ok(print(&table.render(0))?)
}
