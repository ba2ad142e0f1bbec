//! `vbd grow`.

/// Make a disk larger, served or not; a running guest is told at once.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: Args) -> anyhow::Result<()> {
    anyhow::bail!("not built yet")
}
