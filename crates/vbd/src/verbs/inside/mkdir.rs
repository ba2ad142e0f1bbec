//! `vbd mkdir`.

use std::ffi::OsString;

use anyhow::bail;
use vbd_ext4::edit::{Attributes, New};
use vbd_ext4::read::{FileType, Links};

use super::Target;
use super::change::{self, Changed, Changing};
use super::chmod::Mode;
use super::chown::Owner;

/// Make directories in a disk.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to make, as vm1disk:/srv/data
    #[arg(value_name = "IMAGE:/PATH", required = true)]
    words: Vec<OsString>,
    /// Make those above as well, and take one that is there for made
    #[arg(long, short)]
    parents: bool,
    /// Its mode; those above get 755
    #[arg(long, short, value_name = "MODE", default_value = "755")]
    mode: Mode,
    /// The owner and group, as numbers or as the disk's own names
    #[arg(long, value_name = "OWNER[:GROUP]", default_value = "0:0")]
    owner: Owner,
    #[command(flatten)]
    changing: Changing,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (image, targets) = change::targets(args.words)?;
    let mut changed = args.changing.open(&image)?;
    let (uid, gid) = args.owner.in_disk(&changed.editor)?;
    let now = changed.now;
    let root = Attributes { mode: 0o755, uid: 0, gid: 0, atime: now, ctime: now, mtime: now, crtime: now };
    let own = Attributes {
        mode: args.mode.apply(0o777, true),
        uid: uid.unwrap_or(0),
        gid: gid.unwrap_or(0),
        ..root
    };
    for target in &targets {
        let slashes: Vec<usize> = (1..target.path.len()).filter(|at| target.path[*at] == b'/').collect();
        let prefixes = slashes.iter().map(|at| &target.path[..*at]).filter(|_| args.parents);
        for path in prefixes {
            let above = Target { path: path.to_vec(), ..target.clone() };
            if changed.look(&above, Links::Follow)?.is_none() {
                make(&mut changed, &above, &root)?;
            }
        }
        match changed.look(target, Links::Follow)? {
            Some(inode) if args.parents && inode.file_type() == FileType::Directory => {}
            Some(_) => bail!("{}: is there already", target.shown()),
            None => make(&mut changed, target, &own)?,
        }
    }
    changed.commit()
}

fn make(changed: &mut Changed, target: &Target, attributes: &Attributes) -> anyhow::Result<()> {
    let place = changed.locate(target)?;
    let made = changed.editor.create(place.directory, &place.name, New::Directory, attributes, &[]);
    made.map(drop).map_err(Changed::failed(target))
}
