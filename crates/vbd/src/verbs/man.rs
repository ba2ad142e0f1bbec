//! `vbd man`.

use std::path::PathBuf;

use anyhow::Context;
use clap::CommandFactory;

/// Write the manual pages: vbd(1), and one for each verb.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The directory to write them to; it is made if it is missing
    directory: PathBuf,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let failed = || format!("{}: writing the manual pages", args.directory.display());
    std::fs::create_dir_all(&args.directory).with_context(failed)?;
    clap_mangen::generate_to(crate::Cli::command(), &args.directory).with_context(failed)
}
