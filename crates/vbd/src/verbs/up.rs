//! `vbd up`.

use std::path::PathBuf;

use super::serving;
use crate::UsageError;

/// Serve all disks of a configuration, in the foreground, until SIGTERM or Ctrl-C.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A TOML file (*.toml), or an xm/xl domain file as it is
    config: PathBuf,
    #[command(flatten)]
    serving: serving::Args,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let listeners = vbd_daemon::passed_listeners().map_err(UsageError)?;
    let config = vbd_daemon::config::load(&args.config)?;
    for warning in &config.warnings {
        eprintln!("vbd: {}:{warning}", args.config.display());
    }
    serving::serve(args.serving, config, listeners, false)
}
