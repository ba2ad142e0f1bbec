//! `vbd tar`.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::PathBuf;

use anyhow::Context;
use vbd_ext4::read::Links;
use vbd_fs::inside::archive::archive;

use super::{Access, Target};
use crate::UsageError;
use crate::progress::stop_on_signals;

/// Write what is in a disk, or a part of it, as a tar archive.
///
/// The archive is in pax format with owners, times to the nanosecond, attributes, ACLs, links and holes; the same disk gives
/// the same bytes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The disk and a path in it, as vm1disk:/etc; without a path its root
    #[arg(value_name = "IMAGE:/PATH")]
    target: Target,
    /// Where to write it; standard output by default
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    access: Access,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let opened = args.access.open(&args.target.image)?;
    let inode = opened.find(&args.target, Links::Follow)?;
    let out: Box<dyn Write> = match &args.output {
        Some(path) => {
            Box::new(File::create(path).with_context(|| format!("cannot make {}", path.display()))?)
        }
        None if io::stdout().is_terminal() => {
            return Err(UsageError(
                "an archive is nothing for a terminal; redirect it, or use --output".to_owned(),
            )
            .into());
        }
        None => Box::new(io::stdout().lock()),
    };
    let mut out = BufWriter::with_capacity(1 << 20, out);
    let name = args.target.name().unwrap_or(b"file").to_vec();
    let cancel = stop_on_signals();
    let mut told = |text: &str| eprintln!("vbd: {}:{text}", args.target.image.display());
    let written = archive(&opened.filesystem, inode, &name, &mut out, &cancel, &mut told);
    if written.is_err()
        && let Some(path) = &args.output
    {
        // Half an archive looks like one. That it cannot be removed says no more than why it failed.
        let _ = std::fs::remove_file(path);
    }
    written.with_context(|| args.target.shown())?;
    Ok(())
}
