//! `vbd tailor`.

use std::path::PathBuf;

use anyhow::Context;
use vbd_ext4::format::superblock::incompat;
use vbd_fs::Filesystem;
use vbd_fs::tailor::ImageRoot;

use super::change::{self, Changing};
use crate::UsageError;
use crate::verbs::build::TailorArgs;

/// Make a disk that is there one machine's: its name, users, keys, consoles, network, files.
///
/// All changes are made at once: when one of them does not fit, the disk stays as it was.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The disk
    image: PathBuf,
    #[command(flatten)]
    tailor: TailorArgs,
    #[command(flatten)]
    changing: Changing,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let tailor = args.tailor.tailor()?;
    if tailor == vbd_fs::Tailor::default() {
        return Err(UsageError(
            "say what is to be changed, as --hostname vm1; see vbd tailor --help".to_owned(),
        )
        .into());
    }
    tailor.check().map_err(|error| UsageError(error.to_string()))?;
    let mut changed = args.changing.open(&args.image)?;
    // What fstab says of the root.
    let extents = changed.editor.filesystem().superblock().has_incompat(incompat::EXTENTS);
    let filesystem = if extents { Filesystem::Ext4 } else { Filesystem::Ext3 };
    let mut root = ImageRoot::new(&mut changed.editor, change::now());
    tailor.apply(&mut root, filesystem).with_context(|| args.image.display().to_string())?;
    changed.commit()
}
