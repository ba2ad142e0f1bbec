//! `vbd rm`.

use std::ffi::OsString;

use anyhow::bail;

use super::change::{self, Changed, Changing};

/// Remove files in a disk, and directories with all in them.
///
/// All that is named goes at once: when something stands in the way, nothing is removed.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to remove, as vm1disk:/etc/machine-id
    #[arg(value_name = "IMAGE:/PATH", required = true)]
    words: Vec<OsString>,
    /// Remove directories with all in them
    #[arg(long, short, short_alias = 'R')]
    recursive: bool,
    /// What is not there is no error
    #[arg(long, short)]
    force: bool,
    #[command(flatten)]
    changing: Changing,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (image, targets) = change::targets(args.words)?;
    let mut changed = args.changing.open(&image)?;
    for target in &targets {
        let place = changed.locate(target)?;
        let Some(found) = place.found else {
            if args.force {
                continue;
            }
            bail!("{}: there is no such file or directory in the disk", target.shown());
        };
        let directory =
            changed.editor.filesystem().inode(found)?.file_type() == vbd_ext4::read::FileType::Directory;
        if directory && !args.recursive {
            bail!("{}: is a directory; --recursive removes it with all in it", target.shown());
        }
        changed.editor.remove_all(place.directory, &place.name).map_err(Changed::failed(target))?;
    }
    changed.commit()
}
