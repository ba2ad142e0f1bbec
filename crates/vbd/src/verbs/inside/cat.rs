//! `vbd cat`.

use std::io::{self, Write};

use anyhow::{Context, bail};
use vbd_ext4::read::{FileType, Links};
use vbd_fs::inside::compare::kind_name;

use super::{Access, Target};

/// Bytes that are read at once.
const PIECE: usize = 1 << 20;

/// Print files of a disk.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The disk and a path in it, as vm1disk:/etc/fstab
    #[arg(value_name = "IMAGE:/PATH", required = true)]
    targets: Vec<Target>,
    #[command(flatten)]
    access: Access,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    for target in &args.targets {
        let opened = args.access.open(&target.image)?;
        let inode = opened.find(target, Links::Follow)?;
        if inode.file_type() != FileType::Regular {
            bail!("{}: is a {}, not a file", target.shown(), kind_name(inode.file_type()));
        }
        let mut out = io::stdout().lock();
        let length = usize::try_from(inode.size()).unwrap_or(PIECE).clamp(1, PIECE);
        let mut buffer = vec![0; length];
        let mut at = 0;
        loop {
            let read = opened.filesystem.read_at(&inode, at, &mut buffer).with_context(|| target.shown())?;
            if read == 0 {
                break;
            }
            match out.write_all(&buffer[..read]).and_then(|()| out.flush()) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                other => other.context("standard output")?,
            }
            at += read as u64;
        }
    }
    Ok(())
}
