//! `vbd mv`.

use std::ffi::OsString;

use anyhow::bail;
use vbd_ext4::read::{FileType, Links};

use super::change::{self, Changed, Changing};

/// Rename files and directories of a disk, within it.
///
/// What has the new name is replaced, unless it is a directory: into that it goes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to rename, as vm1disk:/etc/motd; then, last, the new name, or the directory that it goes into
    #[arg(value_name = "IMAGE:/PATH", required = true, num_args = 2..)]
    words: Vec<OsString>,
    #[command(flatten)]
    changing: Changing,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (image, mut targets) = change::targets(args.words)?;
    let Some(to) = targets.pop() else { bail!("name what to rename, and its new name") };
    let mut changed = args.changing.open(&image)?;
    let into = changed.look(&to, Links::Follow)?.filter(|inode| inode.file_type() == FileType::Directory);
    if targets.len() > 1 && into.is_none() {
        bail!("{}: is no directory, and several things are to go there", to.shown());
    }
    for target in &targets {
        let from = changed.locate(target)?;
        let (directory, name) = match &into {
            Some(directory) => (directory.number(), from.name.clone()),
            None => {
                let place = changed.locate(&to)?;
                (place.directory, place.name)
            }
        };
        changed
            .editor
            .rename((from.directory, &from.name), (directory, &name))
            .map_err(Changed::failed(target))?;
    }
    changed.commit()
}
