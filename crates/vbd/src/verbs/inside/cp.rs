//! `vbd cp`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use vbd_ext4::read::{FileType, Links};
use vbd_fs::inside::export::{self, Options, Report};
use vbd_fs::inside::import;
use vbd_image::size::Human;

use super::chown::Owner;
use super::{Access, Target};
use crate::progress::stop_on_signals;
use crate::{UsageError, output};

/// Copy files and directories, with all in them, out of a disk or into one.
///
/// Permissions, times, links, holes and attributes are kept; owners, devices and attributes of the system where root runs
/// it. What is in the way is replaced, but for directories, which are filled. Into a disk all of it is copied at once: when
/// something stands in the way, the disk stays as it was.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to copy, as vm1disk:/etc; then, last, where to: a directory that is there, or the name of the copy. One side is in
    /// a disk
    #[arg(value_name = "[IMAGE:/]PATH", required = true, num_args = 2..)]
    words: Vec<OsString>,
    /// Copy what links lead to, where IMAGE:/PATH is one; in directories they stay links
    #[arg(long, short = 'L')]
    dereference: bool,
    /// Into a disk: the owner and group of all that is copied, as numbers or as the disk's own names
    #[arg(long, value_name = "OWNER:GROUP")]
    owner: Option<Owner>,
    /// Leave out devices, which only root may make
    #[arg(long)]
    no_devices: bool,
    /// Directories are copied anyway; for those who are used to it
    #[arg(long, short, short_alias = 'a', hide = true)]
    recursive: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    access: Access,
}

pub(crate) fn run(mut args: Args) -> anyhow::Result<()> {
    let last = args.words.pop().unwrap_or_default();
    let target = Target::from(last.clone());
    if target.said && !args.words.iter().any(|word| Target::from(word.clone()).said) {
        return copy_in(args, &target);
    }
    if target.said && target.image.is_file() {
        let text = "nothing is copied from one disk to another at once; copy it out first";
        return Err(UsageError(format!("{}: {text}", target.shown())).into());
    }
    let to = PathBuf::from(last);
    let targets: Vec<Target> = args.words.into_iter().map(Target::from).collect();
    if let Some(target) = targets.iter().find(|target| !target.said) {
        let text = "is no place in a disk; write IMAGE:/PATH, and last where to";
        return Err(UsageError(format!("{}: {text}", target.image.display())).into());
    }
    let into = to.is_dir();
    if targets.len() > 1 && !into {
        bail!("{}: is no directory, and several things are to be copied there", to.display());
    }
    let options = Options { no_devices: args.no_devices, cancel: stop_on_signals() };
    let links = if args.dereference { Links::Follow } else { Links::Keep };
    let mut sum = Report::default();
    for target in &targets {
        let opened = args.access.open(&target.image)?;
        let inode = opened.find(target, links)?;
        let place = place(&to, into, target);
        let mut told = |text: &str| eprintln!("vbd: {text}");
        let report = export::export(&opened.filesystem, inode, &place, &options, &mut told)?;
        sum.entries += report.entries;
        sum.bytes += report.bytes;
        sum.failed += report.failed;
        sum.attributes_lost += report.attributes_lost;
        sum.devices_left_out += report.devices_left_out;
    }
    if args.json {
        output::print_json(&sum)?;
    }
    if sum.attributes_lost > 0 {
        eprintln!(
            "vbd: {} attributes are not kept: only root may set them, or they cannot be there",
            sum.attributes_lost
        );
    }
    if sum.failed > 0 {
        bail!("{} entries were not copied; {} with {} were", sum.failed, sum.entries, Human(sum.bytes));
    }
    Ok(())
}

/// Copies into a disk.
fn copy_in(args: Args, to: &Target) -> anyhow::Result<()> {
    let mut changed = args.access.changing().open(&to.image)?;
    let owner = match &args.owner {
        Some(owner) => match owner.in_disk(&changed.editor)? {
            (Some(uid), Some(gid)) => Some((uid, gid)),
            _ => return Err(UsageError("--owner needs an owner and a group, as 0:0".to_owned()).into()),
        },
        None => None,
    };
    let options = import::Options { owner, cancel: stop_on_signals() };
    let into = changed.look(to, Links::Follow)?.filter(|inode| inode.file_type() == FileType::Directory);
    if args.words.len() > 1 && into.is_none() {
        bail!("{}: is no directory, and several things are to be copied there", to.shown());
    }
    let mut sum = import::Report::default();
    let now = changed.now;
    for word in &args.words {
        let mut from = PathBuf::from(word);
        if args.dereference {
            from = from.canonicalize().with_context(|| from.display().to_string())?;
        }
        let name = Path::new(word).file_name().map(OsStr::as_bytes);
        let report = match (&into, name) {
            (Some(directory), Some(name)) => {
                import::import(&mut changed.editor, &from, directory.number(), name, now, &options)
            }
            // `.` and `/` have no name: what is in them goes there.
            (Some(directory), None) => {
                import::import_into(&mut changed.editor, &from, directory.number(), now, &options)
            }
            (None, _) => {
                let place = changed.locate(to)?;
                import::import(&mut changed.editor, &from, place.directory, &place.name, now, &options)
            }
        }?;
        sum.entries += report.entries;
        sum.bytes += report.bytes;
    }
    changed.commit()?;
    if args.json {
        output::print_json(&sum)?;
    }
    Ok(())
}

/// Where a thing goes: by its name into a directory that is there; the root has no name, and what is in it goes there.
fn place(to: &Path, into: bool, target: &Target) -> PathBuf {
    match target.name().filter(|_| into) {
        Some(name) => to.join(OsStr::from_bytes(name)),
        None => to.to_owned(),
    }
}
