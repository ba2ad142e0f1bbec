//! What `vbd attach` and `vbd up` have in common: options of a serving process, and its life.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use vbd_core::Disk;
use vbd_daemon::config::{Config, DiskConfig};
use vbd_daemon::control::DiskInfo;
use vbd_daemon::{Daemon, Listener, xen};

use crate::{output, paste};

/// The options of a process that serves.
#[derive(clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    /// Threads that move the data (default: one a processor, up to 4)
    #[arg(long, value_name = "N")]
    reactors: Option<NonZeroUsize>,
    /// How the kernel is asked for I/O
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    engine: Engine,
    /// The longest time to look for more work before sleeping, in microseconds; up to ten times as long for busy
    /// sockets, less where it finds nothing; 0 never spins
    #[arg(long, value_name = "US", default_value_t = 100)]
    spin: u32,
    /// The control socket to make (default: control-PID.sock in the runtime directory)
    #[arg(long, value_name = "SOCK")]
    control: Option<PathBuf>,
    /// Start although a file is in use now: its lease is waited for when the guest starts (migration)
    #[arg(long)]
    incoming: bool,
    /// How long a clean stop may take, in seconds; what is still waiting then fails
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    stop_within: u16,
    /// Say how to connect guests
    #[arg(long, short)]
    pub(crate) verbose: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Engine {
    /// io_uring, or threads where the kernel forbids it
    Auto,
    /// io_uring, or an error
    #[value(name = "io_uring")]
    IoUring,
    /// A pool of threads
    Threads,
}

impl From<Engine> for vbd_daemon::EngineKind {
    fn from(engine: Engine) -> Self {
        match engine {
            Engine::Auto => Self::Auto,
            Engine::IoUring => Self::Uring,
            Engine::Threads => Self::Threads,
        }
    }
}

/// Serves until a signal, or with `until_empty` until the last disk was detached.
pub(crate) fn serve(
    args: Args,
    config: Config,
    listeners: Vec<Listener>,
    xen: Option<xen::Options>,
    until_empty: bool,
) -> anyhow::Result<()> {
    serve_made(args, config, Vec::new(), listeners, xen, until_empty)
}

/// The same, and disks that are made already.
pub(crate) fn serve_made(
    args: Args,
    mut config: Config,
    made: Vec<(DiskConfig, Arc<dyn Disk>)>,
    listeners: Vec<Listener>,
    xen: Option<xen::Options>,
    until_empty: bool,
) -> anyhow::Result<()> {
    let serves_all = xen.as_ref().is_some_and(|xen| matches!(xen.serves, xen::Serves::All { .. }));
    config.reactors = args.reactors.or(config.reactors);
    let stop_within = Duration::from_secs(args.stop_within.into());
    let reactor = vbd_daemon::ReactorSettings {
        engine: args.engine.into(),
        spin: Duration::from_micros(args.spin.into()),
        stop_within,
    };
    let daemon = Daemon::start(vbd_daemon::Options {
        config,
        made,
        reactor,
        listeners,
        control: args.control,
        incoming: args.incoming,
        stop_within,
        xen: xen.map(|xen| xen::Options { drain: stop_within, ..xen }),
    })?;
    let mut text = String::new();
    if serves_all {
        text.push_str("serving Xen's domains\n");
    }
    for disk in daemon.ready() {
        text.push_str(&ready(disk));
    }
    if args.verbose {
        daemon.ready().iter().for_each(|disk| text.push_str(&paste::lines(disk)));
    }
    output::print(&text)?;
    Ok(daemon.run(until_empty)?)
}

/// A line for each way to the disk.
fn ready(disk: &DiskInfo) -> String {
    let line = |front_end: &vbd_daemon::control::FrontEndInfo| {
        let export = front_end.export.as_ref().map(|name| format!(" name {name}")).unwrap_or_default();
        format!("{}: {} {}{export}\n", disk.name, front_end.kind, front_end.address)
    };
    disk.front_ends.iter().map(line).collect()
}
