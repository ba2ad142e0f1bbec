//! `vbd build`.

/// Make a disk file with a filesystem in it, filled from a tree, an archive or a suite.
#[derive(clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: Args) -> anyhow::Result<()> {
    anyhow::bail!("not built yet")
}
