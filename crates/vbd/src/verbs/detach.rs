//! `vbd detach`.

use vbd_daemon::control::Detach;

use super::control::{self, unknown};

/// Stop serving a disk: what it has in work is finished and made durable.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The disk
    name: String,
    /// Even while guests or clients use it
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    control: control::Args,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let found = args.control.find(&args.name)?.ok_or_else(|| unknown(&args.name))?;
    Ok(found.client.detach(&args.name, Detach { force: args.force })?)
}
