//! `vbd clone`.

use std::path::PathBuf;

use serde::Serialize;
use vbd_fs::Time;
use vbd_fs::upkeep::{self, CloneOptions};

use super::build::TailorArgs;
use crate::output::{print, print_json};
use crate::progress::{Bar, stop_on_signals};

/// Make another machine's disk of an image: a copy with its own UUIDs, name and keys.
///
/// Where the host's filesystem can share blocks (XFS, Btrfs) the copy takes milliseconds and no room. The new disk gets new
/// UUIDs for filesystems and partitions, which fstab and boot entries follow; machine-id, SSH host keys and random seed
/// are removed and made anew when it starts.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The image to make it of; nobody may be writing to it
    base: PathBuf,
    /// The file to make
    new: PathBuf,
    /// The label of the root filesystem
    #[arg(long, value_name = "NAME")]
    label: Option<String>,
    /// Leave machine-id, SSH host keys and random seed as they are in the base
    #[arg(long, conflicts_with = "reset_identity")]
    keep_identity: bool,
    /// Replace an existing file, unless it is in use
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    tailor: TailorArgs,
}

/// What was made, for programs.
#[derive(Serialize)]
struct Object {
    how: String,
    filesystems: Vec<FilesystemObject>,
}

#[derive(Serialize)]
struct FilesystemObject {
    partition: Option<u32>,
    uuid: String,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut tailor = args.tailor.tailor()?;
    tailor.reset_identity = !args.keep_identity;
    let options = CloneOptions { tailor, label: args.label, force: args.force };
    let mut bar = Bar::new(stop_on_signals());
    let cloned = upkeep::clone(&args.base, &args.new, &options, Time::now(), &mut bar);
    bar.clear();
    let cloned = cloned?;
    if args.json {
        let filesystems = cloned
            .uuids
            .iter()
            .map(|(volume, uuid)| FilesystemObject { partition: volume.partition, uuid: uuid.clone() })
            .collect();
        return print_json(&Object { how: cloned.how.to_string(), filesystems });
    }
    let mut text = format!("{}: {} of {}\n", args.new.display(), cloned.how, args.base.display());
    for (volume, uuid) in &cloned.uuids {
        match volume.partition {
            Some(number) => text += &format!("  partition {number}: UUID {uuid}\n"),
            None => text += &format!("  UUID {uuid}\n"),
        }
    }
    Ok(print(&text)?)
}
