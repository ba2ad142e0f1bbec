//! `vbd ln`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use anyhow::bail;
use vbd_ext4::edit::{Attributes, New};
use vbd_ext4::read::{FileType, Links};

use super::Target;
use super::change::{self, Changed, Changing};

/// Make a link in a disk: a further name of a file, or a symbolic link.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// With --symbolic any text, which the link then holds; otherwise the file, as vm1disk:/etc/hostname
    #[arg(value_name = "TARGET")]
    target: OsString,
    /// The link to make, as vm1disk:/etc/localtime
    #[arg(value_name = "IMAGE:/PATH")]
    link: OsString,
    /// Make a symbolic link
    #[arg(long, short)]
    symbolic: bool,
    /// Replace what is there, unless it is a directory
    #[arg(long, short)]
    force: bool,
    #[command(flatten)]
    changing: Changing,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let words = if args.symbolic { vec![args.link] } else { vec![args.link, args.target.clone()] };
    let (image, targets) = change::targets(words)?;
    let mut changed = args.changing.open(&image)?;
    let link: &Target = &targets[0];
    let place = changed.locate(link)?;
    if let Some(found) = place.found {
        let directory = changed.editor.filesystem().inode(found)?.file_type() == FileType::Directory;
        if !args.force || directory {
            let remedy = if directory { "" } else { "; --force replaces it" };
            bail!("{}: is there already{remedy}", link.shown());
        }
    }
    let existing = match targets.get(1) {
        Some(target) => Some(changed.find(target, Links::Keep)?.number()),
        None => None,
    };
    if existing.is_some() && existing == place.found {
        return Ok(());
    }
    if place.found.is_some() {
        changed.editor.remove(place.directory, &place.name).map_err(Changed::failed(link))?;
    }
    match existing {
        Some(ino) => changed.editor.link(place.directory, &place.name, ino),
        None => {
            let now = changed.now;
            let root =
                Attributes { mode: 0o777, uid: 0, gid: 0, atime: now, ctime: now, mtime: now, crtime: now };
            let new = New::Symlink(args.target.as_bytes());
            changed.editor.create(place.directory, &place.name, new, &root, &[]).map(drop)
        }
    }
    .map_err(Changed::failed(link))?;
    changed.commit()
}
