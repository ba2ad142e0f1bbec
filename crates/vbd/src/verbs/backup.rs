//! `vbd backup`.

use std::path::PathBuf;

use anyhow::Context;
use vbd_daemon::control::NewBackup;
use vbd_image::size::{Human, Size};
use vbd_jobs::backup::Done;

use super::job;
use super::target::{self, Target};
use crate::output::{print, print_json};
use crate::progress::{Bar, stop_on_signals};

/// Back a disk up, as it is at one instant, into a store that many backups share; while guests write, if it is served.
///
/// With --chain each backup is an image: the first a full one, those with --incremental qcow2 images over the one before.
///
/// With --checkpoint a bitmap begins, so that the next backup with --incremental reads only what has changed.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: target::Args,
    /// The store, or the chains: a directory, which is made if it is not there
    store: PathBuf,
    /// Make an image of each backup, which other programs use as it is: a full one in this format, qcow2 (the default) or
    /// raw. What a directory holds has to be said once
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "qcow2", value_parser = ["qcow2", "raw"])]
    chain: Option<String>,
    /// The disk's name in the store (default: its own)
    #[arg(long, value_name = "NAME")]
    disk_name: Option<String>,
    /// The backup's name (default: the time)
    #[arg(long)]
    name: Option<String>,
    /// Read only what has changed since the disk's last backup in the store; a checkpoint begins for the next
    #[arg(long, short)]
    incremental: bool,
    /// Read only what has changed since this backup
    #[arg(long, value_name = "NAME", conflicts_with = "incremental")]
    since: Option<String>,
    /// Begin a checkpoint, for the next backup to be incremental
    #[arg(long)]
    checkpoint: bool,
    /// The level of compression, 1 to 22
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..=22))]
    level: Option<i32>,
    /// The longest that a write of a guest may be held up, in milliseconds; past that the backup fails
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    max_delay: u64,
    /// The most that guests may overwrite before it was read; past that the backup fails (default: no bound)
    #[arg(long, value_name = "SIZE")]
    max_kept: Option<Size>,
    /// Threads that read and compress
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let store = std::path::absolute(&args.store).with_context(|| args.store.display().to_string())?;
    let asked = NewBackup {
        store,
        disk: args.disk_name,
        name: args.name,
        incremental: args.incremental,
        checkpoint: args.checkpoint || args.incremental,
        since: args.since,
        level: args.level,
        max_delay_ms: Some(args.max_delay),
        max_kept: args.max_kept.map(Size::bytes),
        threads: args.threads,
        chain: args.chain,
    };
    let bar = Bar::new(stop_on_signals());
    let done = match args.target.find()? {
        Target::Served(found) => {
            let job = found.client.backup(&found.disk.name, &asked)?;
            job::wait(&found.client, job, &bar)
        }
        Target::File(file) => {
            let reads = !asked.checkpoint && asked.since.is_none();
            let open = args.target.open(&file, reads)?;
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            vbd_daemon::back_up(&open.session, &name, &asked, &bar).map_err(anyhow::Error::from)
        }
    };
    bar.clear();
    let done: Done = done?;
    if args.json {
        return print_json(&done);
    }
    let Done { name, size, read, stored, parent } = done;
    let (size, read, stored) = (Human(size), Human(read), Human(stored));
    let since = parent.map(|parent| format!(" since {parent}")).unwrap_or_default();
    Ok(print(&format!("{name}: {size}, of which {read} were read{since} and {stored} stored\n"))?)
}
