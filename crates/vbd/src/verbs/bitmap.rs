//! `vbd bitmap`.

use vbd_daemon::control::{BitmapChange, BitmapInfo};
use vbd_formats::Format;
use vbd_image::sidecar;
use vbd_image::size::{Human, Size};

use super::bitmap_qcow2;
use super::target::{self, Target};
use crate::UsageError;
use crate::output::{Table, print, print_json};

/// Dirty bitmaps: which blocks of a disk change. Live where it is served, else in the file.
///
/// Those of a raw image are kept beside it, in IMAGE.vbd-bitmaps; those of a qcow2 image in it.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Show the bitmaps of a disk
    List {
        #[command(flatten)]
        target: target::Args,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a bitmap; from now on it marks what changes
    Add {
        #[command(flatten)]
        target: target::Args,
        /// Its name
        name: String,
        /// The bytes that each bit stands for: a power of two from 512 to 2G
        #[arg(long, value_name = "SIZE", default_value = "64K")]
        granularity: Size,
        /// It goes when the disk is closed
        #[arg(long)]
        temporary: bool,
    },
    /// Take a bitmap away
    Remove(One),
    /// Have a bitmap mark what changes from now on
    Enable(One),
    /// Leave a bitmap as it is from now on
    Disable(One),
    /// Take every mark of a bitmap away
    Clear(One),
    /// Mark in one bitmap what is marked in others
    Merge {
        #[command(flatten)]
        target: target::Args,
        /// Where to
        name: String,
        /// The others
        #[arg(required = true)]
        from: Vec<String>,
    },
    /// Make bitmaps that do not fit their image any more of use again: everything is marked
    Reset {
        #[command(flatten)]
        target: target::Args,
    },
}

#[derive(clap::Args)]
#[group(skip)]
struct One {
    #[command(flatten)]
    target: target::Args,
    /// Its name
    name: String,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (target, change) = match args.action {
        Action::List { target, json } => return list(&target, json),
        Action::Reset { target } => return reset(&target),
        Action::Add { target, name, granularity, temporary } => {
            let granularity = Some(granularity.bytes());
            (target, BitmapChange::Add { name, granularity, temporary })
        }
        Action::Remove(One { target, name }) => (target, BitmapChange::Remove { name }),
        Action::Enable(One { target, name }) => (target, BitmapChange::Enable { name }),
        Action::Disable(One { target, name }) => (target, BitmapChange::Disable { name }),
        Action::Clear(One { target, name }) => (target, BitmapChange::Clear { name }),
        Action::Merge { target, name, from } => (target, BitmapChange::Merge { name, from }),
    };
    match target.find()? {
        Target::Served(found) => {
            found.client.change_bitmaps(&found.disk.name, &change)?;
        }
        Target::File(file) => {
            if matches!(change, BitmapChange::Add { temporary: true, .. }) {
                let message = "a temporary bitmap of a file that nobody serves would be gone at once";
                return Err(UsageError(message.into()).into());
            }
            let spec = target.spec(&file)?;
            if spec.format == Format::Qcow2 {
                return bitmap_qcow2::change(&spec, &change);
            }
            let open = target.open(&file, false)?;
            vbd_daemon::change_bitmaps(&open.session, &change)?;
        }
    }
    Ok(())
}

fn list(target: &target::Args, json: bool) -> anyhow::Result<()> {
    let found = target.find()?;
    if let Target::File(file) = &found {
        let spec = target.spec(file)?;
        if spec.format == Format::Qcow2 {
            return bitmap_qcow2::list(&spec, json);
        }
    }
    let bitmaps = match found {
        Target::Served(found) => found.client.bitmaps(&found.disk.name)?,
        Target::File(file) => match sidecar::list(&file, size(target, &file)?) {
            Ok(contents) => contents.bitmaps.into_iter().map(|named| describe(&named)).collect(),
            Err(sidecar::SidecarError::None(_)) => Vec::new(),
            Err(error) => return Err(error.into()),
        },
    };
    if json {
        return print_json(&bitmaps);
    }
    let mut table = Table::new(&["BITMAP", ">BLOCK", ">MARKED", "STATE"]);
    for bitmap in bitmaps {
        let mut state = String::from(if bitmap.enabled { "enabled" } else { "disabled" });
        if !bitmap.persistent {
            state.push_str(", temporary");
        }
        let (block, marked) = (Human(bitmap.granularity).to_string(), Human(bitmap.marked).to_string());
        table.row([bitmap.name, block, marked, state]);
    }
    Ok(print(&table.render(0))?)
}

fn describe(named: &vbd_core::track::Named) -> BitmapInfo {
    BitmapInfo {
        name: named.name.clone(),
        granularity: named.bitmap.granularity(),
        enabled: named.enabled,
        marked: named.bitmap.marked_bytes(),
        persistent: named.persistent,
    }
}

/// The disk's size, while nobody writes to the file.
fn size(target: &target::Args, file: &std::path::Path) -> anyhow::Result<u64> {
    Ok(target.open(file, true)?.session.geometry().size)
}

fn reset(target: &target::Args) -> anyhow::Result<()> {
    match target.find()? {
        Target::Served(found) => {
            let message = format!("{}: is served: detach it first", found.disk.name);
            Err(UsageError(message).into())
        }
        Target::File(file) => {
            let open = target.open(&file, true)?;
            Ok(sidecar::reset(&file, open.session.geometry().size)?)
        }
    }
}
