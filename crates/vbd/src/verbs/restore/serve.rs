//! `vbd restore --serve`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::bail;
use vbd_core::Disk;
use vbd_daemon::config::{Config, DiskConfig, NbdAddress, NbdConfig};
use vbd_image::size::Human;
use vbd_jobs::Progress;
use vbd_jobs::backup::{Manifest, Restored, Restoring, Store};

use crate::UsageError;
use crate::output::print;
use crate::verbs::serving;

#[derive(clap::Args)]
#[group(skip)]
pub(super) struct Args {
    /// Serve the disk while it is being restored, and after that, until SIGTERM or Ctrl-C
    #[arg(long)]
    serve: bool,
    /// Serve it as a vhost-user-blk device on this socket
    #[arg(long, value_name = "SOCK", requires = "serve")]
    vhost_user: Option<PathBuf>,
    /// Serve it as an NBD export at unix:SOCK or HOST:PORT; may be given several times
    #[arg(long, value_name = "ADDRESS", requires = "serve")]
    nbd: Vec<NbdAddress>,
    /// The disk's name, in messages and as NBD export (default: the file's name)
    #[arg(long, requires = "serve")]
    name: Option<String>,
    /// Begin anew where a restore was interrupted: what guests have written to it goes
    #[arg(long, requires = "serve")]
    restart: bool,
    #[command(flatten)]
    serving: serving::Args,
}

impl Args {
    pub(super) fn is_wanted(&self) -> bool {
        self.serve
    }
}

/// Stops when the disk is not served any more.
struct Stop(AtomicBool);

impl Progress for Stop {
    fn step(&self, _: &str, _: u64) {}

    fn advance(&self, _: u64) {}

    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

pub(super) fn run(
    args: Args,
    store: Store,
    manifest: Manifest,
    file: &Path,
    replace: bool,
) -> anyhow::Result<()> {
    let exported = !args.nbd.is_empty();
    if args.vhost_user.is_none() && !exported {
        let message =
            "nothing to serve the disk on: say --vhost-user SOCK, --nbd unix:SOCK or --nbd HOST:PORT";
        return Err(UsageError(message.to_owned()).into());
    }
    let name = args.name.or_else(|| DiskConfig::default_name(file));
    let name = name.ok_or_else(|| UsageError(format!("{}: say --name NAME", file.display())))?;
    DiskConfig::check_name(&name).map_err(|message| UsageError(format!("--name: {message}")))?;
    let restoring = Restoring::begin(store, manifest, file, &name, replace, args.restart)?;
    let mut disk = DiskConfig::new(&name, file.to_owned());
    disk.vhost_user = args.vhost_user;
    disk.nbd = exported.then_some(name);
    let nbd = exported.then(|| NbdConfig::new(args.nbd));
    let config = Config { nbd, ..Config::default() };
    let made: (_, Arc<dyn Disk>) = (disk, restoring.clone());
    let stop = Stop(AtomicBool::new(false));
    let (served, restored) = std::thread::scope(|scope| {
        let job = scope.spawn(|| restoring.fill(&stop).inspect(|restored| tell(file, restored)));
        let served = serving::serve_made(args.serving, config, vec![made], Vec::new(), None, true);
        stop.0.store(true, Ordering::SeqCst);
        (served, job.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    served?;
    if !restoring.is_complete() {
        let why = match restored {
            Ok(_) | Err(vbd_jobs::Error::Cancelled) => "it was stopped".to_owned(),
            Err(error) => error.to_string(),
        };
        bail!("{}: is not whole yet ({why}): the same command goes on with it", file.display());
    }
    Ok(())
}

fn tell(file: &Path, restored: &Restored) {
    let file = file.display();
    if restored.damaged.is_empty() {
        // Nobody may be reading.
        let _ = print(&format!("{file}: whole, the store is not needed any more\n"));
    }
    for (offset, why) in &restored.damaged {
        eprintln!("vbd: {file}: what begins at byte {offset} ({}) cannot be restored: {why}", Human(*offset));
    }
}
