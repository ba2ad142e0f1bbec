//! `vbd up`.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::Context;
use vbd_daemon::config::{Config, DiskConfig};
use vbd_daemon::xen;
use vbd_fs::{BuildOptions, ImageSize};

use super::serving;
use crate::UsageError;
use crate::progress::{Bar, stop_on_signals};

/// Serve all disks of a configuration, in the foreground, until SIGTERM or Ctrl-C.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A TOML file (*.toml), or an xm/xl domain file as it is
    config: PathBuf,
    /// Serve them to the Xen domain that the file describes, which is to be created next or runs, instead of on sockets
    #[arg(long)]
    xen: bool,
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
    let xen = if args.xen { Some(for_xen(&mut config, &args.config)?) } else { None };
    serving::serve(args.serving, config, listeners, xen, false)
}

/// Gives the disks of a domain file to that domain alone.
fn for_xen(config: &mut Config, file: &Path) -> anyhow::Result<xen::Options> {
    let Some(domain) = config.domain.as_ref().map(|domain| domain.name.clone()) else {
        let message =
            format!("{}: --xen is for an xm/xl domain file: this one names no domain", file.display());
        return Err(UsageError(message).into());
    };
    config.nbd = None;
    for disk in &mut config.disks {
        (disk.vhost_user, disk.nbd, disk.xen) = (None, None, Some(domain.clone()));
    }
    Ok(xen::Options::new(xen::Serves::Configured { attach: false }))
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
            size: ImageSize::Fixed(image.size.bytes()),
            spec: spec.clone(),
            tailor: image.tailor.clone(),
            force: false,
            time: super::build::time()?,
            verify: false,
            threads: None,
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
