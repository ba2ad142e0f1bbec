//! `vbd xen serve`.

use std::path::Path;

use vbd_daemon::config::Config;
use vbd_daemon::xen::{Options, RUNTIME_DIR, Serves};

use super::super::serving;

/// Serve what the toolstack makes for vbd (script=block-vbd), in the foreground, until SIGTERM or Ctrl-C.
///
/// Domains whose disks are in use wait until the next `vbd xen serve` goes on with them.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Serve files that name no script, too (file:/path,sda1,w), once `vbd xen install --files` has made that possible
    #[arg(long)]
    files: bool,
    /// Serve raw disks of backendtype=qdisk, too: for domains whose device model is vbd's
    #[arg(long)]
    qdisk: bool,
    /// Queues offered to a domain
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    #[command(flatten)]
    serving: serving::Args,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let config = Config { runtime_dir: Path::new(RUNTIME_DIR).to_owned(), ..Config::default() };
    let serves = Serves::All { files: args.files, qdisk: args.qdisk };
    let xen = Options { queues: args.queues, ..Options::new(serves) };
    serving::serve(args.serving, config, Vec::new(), Some(xen), false)
}
