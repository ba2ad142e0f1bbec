//! `vbd up`.

use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::Context;
use vbd_daemon::config::DiskConfig;
use vbd_fs::BuildOptions;

use super::serving;
use crate::UsageError;
use crate::progress::{Bar, stop_on_signals};

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
    let mut config = vbd_daemon::config::load(&args.config)?;
    for warning in &config.warnings {
        eprintln!("vbd: {}:{warning}", args.config.display());
    }
    if config.nbd.is_none() && !listeners.is_empty() {
        config.disks.iter_mut().for_each(|disk| disk.nbd = Some(disk.name.clone()));
    }
    make_missing(&config.disks)?;
    serving::serve(args.serving, config, listeners, false)
}

/// Makes the images that are not there and of which the configuration says how.
fn make_missing(disks: &[DiskConfig]) -> anyhow::Result<()> {
    let missing =
        |disk: &&DiskConfig| disk.path.symlink_metadata().is_err_and(|e| e.kind() == ErrorKind::NotFound);
    let wanted = disks.iter().filter_map(|disk| Some((disk, disk.create.as_ref()?)));
    let mut wanted = wanted.filter(|(disk, _)| missing(disk)).peekable();
    if wanted.peek().is_none() {
        return Ok(());
    }
    let cancel = stop_on_signals();
    for (disk, image) in wanted {
        let Some(spec) = &image.build else {
            vbd_image::create::create(&disk.path, image.size, false, false)?;
            continue;
        };
        eprintln!("vbd: {}: making {} from {}", disk.name, disk.path.display(), spec.from);
        let mut bar = Bar::new(cancel.clone());
        let options = BuildOptions {
            size: image.size.bytes(),
            spec: spec.clone(),
            tailor: image.tailor.clone(),
            force: false,
            helper: super::build::helper()?,
        };
        let built = vbd_fs::build(&disk.path, &options, &mut bar);
        bar.clear();
        for warning in built.with_context(|| disk.name.clone())?.warnings {
            eprintln!("vbd: {}: {warning}", disk.name);
        }
    }
    Ok(())
}
