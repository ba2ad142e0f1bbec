//! One disk that is served: its file, its front-ends, its end.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vbd_core::file::Cache;
use vbd_core::{Disk, SECTOR, Session};
use vbd_formats::{Gate, ImageSpec};
use vbd_image::host;
use vbd_image::lease::{self, Holder, Mode};
use vbd_image::{open, probe};
use vbd_luks::Secret;
use vbd_ublk::Ending;

use crate::config::{Access, CacheMode, DiskConfig, Format, Limits};
use crate::control::{DiskInfo, DiskStat, FrontEndInfo, Grow, Grown, NewDisk, OperationStat, QueueStat};
use crate::service::is_running;
use crate::xen::Face;
use crate::{Fault, FaultKind};

use super::Users;
use super::front::{Exports, Ublk, VhostUser};
use super::reactors::Reactors;

/// How long a file that somebody uses may take to become free: the kernel holds a killed process's files until its last
/// I/O has ended.
pub(crate) const LEASE_WAIT: Duration = Duration::from_secs(5);
/// How often it is looked whether it is free.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A disk that can be served and has no front-ends yet.
pub(crate) struct Opened {
    config: DiskConfig,
    /// How its image was opened; none where that was made by something else.
    spec: Option<ImageSpec>,
    disk: Arc<dyn Disk>,
    session: Option<Arc<dyn Session>>,
}

pub(crate) struct Served {
    config: DiskConfig,
    /// How its image was opened; none where that was made by something else.
    spec: Option<ImageSpec>,
    disk: Arc<dyn Disk>,
    vhost_user: Option<VhostUser>,
    xen: Option<Face>,
    ublk: Option<Ublk>,
    /// Keeps the lease of a disk that NBD clients may ask for at any time. Where there is a vhost-user device alone, its
    /// guest takes the lease when it starts, so that a migration's destination can wait for its source.
    session: Mutex<Option<Arc<dyn Session>>>,
}

/// Makes the disk of a configuration's entry, and looks whether it can be served: a file that is there, that is a disk,
/// and, if `patience` is given, that nobody uses then. The lease itself is taken when a guest starts.
pub(crate) fn open(config: DiskConfig, patience: Option<Instant>) -> Result<Opened, Fault> {
    let DiskConfig { vhost_user, nbd, ublk, xen, .. } = &config;
    if vhost_user.is_none() && nbd.is_none() && ublk.is_none() && xen.is_none() {
        let message = format!(
            "{}: no front-end: name a vhost-user socket, an NBD export or a ublk device",
            config.name
        );
        return Err(Fault::new(FaultKind::Invalid, message));
    }
    let failed = |error: &dyn Display| failed(&config, FaultKind::Failed, error);
    let image = open::open(&config.path).map_err(|error| failed(&error))?;
    if image.size == 0 {
        let path = config.path.display();
        return Err(failed(&format!(
            "{path}: is empty, so there is no disk in it: `vbd create --force` gives it a size"
        )));
    }
    if config.access.is_writable() {
        may_write(&config)?;
    }
    if let Some(patience) = patience.filter(|_| config.access != Access::ReadWriteForce) {
        wait_until_free(&config, patience)?;
        let used = host::usage(&image.file, &config.path).map_err(|error| failed(&error))?;
        if let Some(used) = used.filter(|_| config.access.is_writable()) {
            return Err(Fault { kind: FaultKind::Busy, ..failed(&used) });
        }
    }
    warn(&config, &image);
    // Closed before the disk is opened for good: a block device may be wanted alone.
    drop(image);
    let spec = spec(&config).map_err(|error| named(&config, error))?;
    let disk = vbd_formats::open_tracked(&spec).map_err(|error| named(&config, error))?;
    disk.inspect().map_err(|error| named(&config, error))?;
    let hold = config.nbd.is_some() && patience.is_some();
    let session = hold.then(|| disk.open().map_err(|error| named(&config, error))).transpose()?;
    Ok(Opened { config, spec: Some(spec), disk, session })
}

/// A disk that is made already.
pub(crate) fn made(config: DiskConfig, disk: Arc<dyn Disk>) -> Result<Opened, Fault> {
    let session = disk.open().map_err(|error| named(&config, error))?;
    Ok(Opened { config, spec: None, disk, session: Some(session) })
}

/// How the image of a configuration's entry is opened.
fn spec(config: &DiskConfig) -> vbd_core::Result<ImageSpec> {
    let secret = Secret::from_either(config.key_file.as_deref(), config.key_fd).map_err(|error| {
        vbd_core::Error::new(vbd_core::ErrorKind::Io, error.to_string()).of(config.path.display().to_string())
    })?;
    Ok(ImageSpec {
        name: config.name.clone(),
        read_only: !config.access.is_writable(),
        share: config.access == Access::ReadWriteForce,
        cache: match config.cache {
            CacheMode::None => Cache::None,
            CacheMode::Writeback => Cache::Writeback,
            CacheMode::Writethrough => Cache::Writethrough,
        },
        keep_space: !config.discard,
        lease_wait: LEASE_WAIT,
        gate: Gate::new(config.allow_dirs.clone()),
        secret,
        ..ImageSpec::new(&config.path, config.format)
    })
}

/// Says what whoever serves a raw image may want to know of what is in it.
fn warn(config: &DiskConfig, image: &open::Image) {
    if config.format != Format::Raw {
        return;
    }
    let contents = probe::contents(&image.file, image.size);
    if let Some(warning) = contents.ok().as_ref().and_then(probe::unclean_warning) {
        tracing::warn!("{}: {warning}", config.name);
    }
    if let Ok(Some(format)) = vbd_formats::identify(&image.file, image.size) {
        tracing::warn!(
            "{}: is served as raw and begins like a {format} image: say `format`, if it is one",
            config.name
        );
    }
}

/// Refuses a file that cannot be written to, before a guest finds out.
fn may_write(config: &DiskConfig) -> Result<(), Fault> {
    use rustix::fs::{AtFlags, CWD, accessat};
    accessat(CWD, &config.path, rustix::fs::Access::WRITE_OK, AtFlags::EACCESS).map_err(|error| {
        let path = config.path.display();
        let error = std::io::Error::from(error);
        let message = format!("{path}: cannot be written to ({error}): mend that, or serve it read-only");
        failed(config, FaultKind::Failed, &message)
    })
}

fn named(config: &DiskConfig, error: vbd_core::Error) -> Fault {
    let fault = Fault::from(error);
    failed(config, fault.kind, &fault.message)
}

/// A fault whose message begins with the disk's file, and before that its name, unless that is the file's.
fn failed(config: &DiskConfig, kind: FaultKind, error: &dyn Display) -> Fault {
    let same = DiskConfig::default_name(&config.path).as_ref() == Some(&config.name);
    let name = if same { String::new() } else { format!("{}: ", config.name) };
    Fault::new(kind, format!("{name}{error}"))
}

fn wait_until_free(config: &DiskConfig, patience: Instant) -> Result<(), Fault> {
    let writable = config.access.is_writable();
    loop {
        let holders = lease::holders(&config.path);
        let mut holders = holders.map_err(|error| failed(config, FaultKind::Failed, &error))?;
        holders.retain(|holder| writable || holder.mode == Mode::Write);
        if holders.is_empty() {
            return Ok(());
        }
        // One that runs does not go by itself.
        let runs = |holder: &Holder| holder.pid.is_some_and(is_running);
        if Instant::now() >= patience || holders.iter().any(runs) {
            let holders = holders.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let message = format!(
                "{}: in use by {holders}; end that first, or say --incoming where it is about to end",
                config.path.display(),
            );
            return Err(failed(config, FaultKind::Busy, &message));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

impl Opened {
    /// Makes the front-ends; those that could be made are gone again where one could not.
    pub(super) fn serve(
        self,
        exports: &Exports,
        reactors: &Reactors,
        limits: Limits,
        drain: Duration,
    ) -> Result<Served, Fault> {
        let Opened { config, spec, disk, session } = self;
        let bind = |socket: &PathBuf| VhostUser::bind(socket, &config, disk.clone(), reactors, limits, drain);
        let vhost_user = config.vhost_user.as_ref().map(bind).transpose()?;
        if let Some(export) = &config.nbd {
            exports.add(export, &disk, !config.access.is_writable())?;
        }
        // Last, since a device that others may use at once is not to go again because something else failed.
        let start = |ublk| Ublk::start(ublk, &config, &disk, reactors, limits);
        let ublk = config.ublk.map(start).transpose().inspect_err(|_| {
            if let Some(export) = &config.nbd {
                // It was added a moment ago.
                let _ = exports.remove(export, Duration::ZERO);
            }
        })?;
        let domain = config.xen.as_ref().zip(config.vdev);
        let xen = domain.map(|(domain, vdev)| Face::configured(domain, vdev));
        Ok(Served { config, spec, disk, vhost_user, xen, ublk, session: Mutex::new(session) })
    }

    /// Only for the device that has this place.
    pub(crate) fn for_domain(self, face: Face) -> Served {
        let Opened { config, spec, disk, session } = self;
        let session = Mutex::new(session);
        Served { config, spec, disk, vhost_user: None, xen: Some(face), ublk: None, session }
    }
}

impl Served {
    pub(crate) fn name(&self) -> &str {
        &self.config.name
    }

    pub(crate) fn config(&self) -> &DiskConfig {
        &self.config
    }

    /// How its image was opened.
    pub(super) fn spec(&self) -> Option<&ImageSpec> {
        self.spec.as_ref()
    }

    pub(crate) fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// Its place in a domain, where it has one.
    pub(crate) fn xen(&self) -> Option<&Face> {
        self.xen.as_ref()
    }

    fn front_ends(&self, users: &Users) -> Vec<FrontEndInfo> {
        let vhost_user = self.vhost_user.iter().filter_map(VhostUser::info);
        let xen = self.xen.iter().map(|face| {
            let device = face.device().and_then(|id| users.xen.iter().find(|device| device.id == id));
            FrontEndInfo {
                kind: "xen".to_owned(),
                address: format!("{},{}", face.domain, face.vdev),
                export: None,
                clients: device.is_some_and(|device| device.connected).into(),
                problem: device.and_then(|device| device.problem.clone()),
            }
        });
        vhost_user
            .chain(xen)
            .chain(self.config.nbd.iter().flat_map(|export| users.clients.of(export)))
            .chain(self.ublk.iter().filter_map(Ublk::info))
            .collect()
    }

    pub(super) fn info(&self, users: &Users) -> DiskInfo {
        let config = &self.config;
        let (geometry, problem) = match self.disk.inspect() {
            Ok((geometry, _)) => (Some(geometry), None),
            Err(error) => (None, Some(error.to_string())),
        };
        DiskInfo {
            name: config.name.clone(),
            path: absolute(&config.path),
            format: config.format.to_string(),
            size: geometry.map(|geometry| geometry.size),
            block_size: geometry.map(|geometry| geometry.block_size),
            read_only: !config.access.is_writable(),
            cache: config.cache.to_string(),
            front_ends: self.front_ends(users),
            problem,
        }
    }

    pub(super) fn stat(&self, users: &Users) -> DiskStat {
        let queues = self.disk.statistics().snapshot().into_iter().map(|queue| QueueStat {
            queue: queue.label,
            operations: queue.operations.iter().map(operation).collect(),
        });
        DiskStat { queues: queues.collect(), disk: self.info(users) }
    }

    pub(super) fn grow(&self, to: Grow) -> Result<Grown, Fault> {
        let failed = |error| named(&self.config, error);
        // The session that the guests have, or one for this alone, which takes the lease for a moment.
        let session = self.disk.open().map_err(failed)?;
        let before = session.geometry().size;
        let invalid = |why: &str| Fault::new(FaultKind::Invalid, format!("{}: {why}", self.config.name));
        let size = to.of(before).ok_or_else(|| invalid("no file can become that large"))?;
        let size =
            size.checked_next_multiple_of(SECTOR).ok_or_else(|| invalid("no file can become that large"))?;
        if size < before {
            return Err(invalid(&format!(
                "it has {before} bytes, and a disk in use never becomes smaller ({size})"
            )));
        }
        session.grow(size).map_err(failed)?;
        Ok(Grown { before, size })
    }

    /// Has the image's format do something, with the session that the guests have, or with one for this alone.
    pub(super) fn live<T>(
        &self,
        work: impl FnOnce(&dyn vbd_core::Live) -> vbd_core::Result<T>,
    ) -> Result<T, Fault> {
        let failed = |error| named(&self.config, error);
        let session = self.disk.open().map_err(failed)?;
        let live = session.live().ok_or_else(|| {
            let format = self.config.format;
            let message = format!("{}: a {format} image keeps no snapshots: qcow2 does", self.config.name);
            Fault::new(FaultKind::Invalid, message)
        })?;
        work(live).map_err(failed)
    }

    /// Ends the front-ends and gives the disk back.
    pub(super) fn stop(&self, exports: &Exports, how: Ending, within: Duration) -> Result<(), Fault> {
        let deadline = Instant::now() + within;
        let vhost_user = self.vhost_user.as_ref().map_or(Ok(()), |server| server.stop(within));
        let left = deadline.saturating_duration_since(Instant::now());
        let nbd = self.config.nbd.as_ref().map_or(Ok(()), |export| exports.remove(export, left));
        let left = deadline.saturating_duration_since(Instant::now());
        let ublk = self.ublk.as_ref().map_or(Ok(()), |ublk| ublk.stop(how, left));
        drop(self.session.lock().unwrap_or_else(PoisonError::into_inner).take());
        vhost_user.and(nbd).and(ublk)
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn operation(counts: &vbd_core::OperationCount) -> OperationStat {
    OperationStat {
        operation: counts.operation.to_owned(),
        count: counts.count,
        bytes: counts.bytes,
        errors: counts.errors,
        queue_ns: counts.queue_ns,
        service_ns: counts.service_ns,
        longest_ns: counts.longest_ns,
    }
}

/// What the API asks for, as a configuration's entry.
pub(super) fn config_of(disk: NewDisk) -> Result<DiskConfig, Fault> {
    let invalid = |message: String| Fault::new(FaultKind::Invalid, message);
    if !disk.path.is_absolute() {
        // The directory of the process that serves means nothing to the one that asks.
        return Err(invalid(format!("{}: name the file by its absolute path", disk.path.display())));
    }
    let name = disk.name.or_else(|| DiskConfig::default_name(&disk.path));
    let name = name.ok_or_else(|| invalid(format!("{}: give the disk a `name`", disk.path.display())))?;
    DiskConfig::check_name(&name).map_err(invalid)?;
    let mut config = DiskConfig::new(name, disk.path);
    let in_disk = |message: String| invalid(format!("{}: {message}", config.name));
    fn told<T: std::str::FromStr<Err: Display>>(text: Option<String>, default: T) -> Result<T, String> {
        text.map_or(Ok(default), |text| text.parse().map_err(|error: T::Err| error.to_string()))
    }
    let format = told(disk.format, config.format).map_err(in_disk)?;
    let access = told(disk.access, config.access).map_err(in_disk)?;
    let cache = told(disk.cache, config.cache).map_err(in_disk)?;
    if let Some(serial) = &disk.serial {
        DiskConfig::check_serial(serial).map_err(in_disk)?;
    }
    if disk.queues.is_some_and(|queues| !(1..=Limits::MAX_QUEUES).contains(&queues)) {
        return Err(in_disk(format!("`queues` is a number from 1 to {}", Limits::MAX_QUEUES)));
    }
    (config.format, config.access, config.cache) = (format, access, cache);
    if let Some(relative) = disk.allow_dirs.iter().find(|dir| !dir.is_absolute()) {
        return Err(in_disk(format!("{}: name the directory by its absolute path", relative.display())));
    }
    config.allow_dirs = disk.allow_dirs;
    if let Some(relative) = disk.key_file.as_ref().filter(|key| !key.is_absolute()) {
        return Err(in_disk(format!("{}: name the key file by its absolute path", relative.display())));
    }
    config.key_file = disk.key_file;
    config.queues = disk.queues;
    config.serial = disk.serial.unwrap_or(config.serial);
    config.discard = disk.discard.unwrap_or(config.discard);
    (config.vhost_user, config.nbd, config.ublk) = (disk.vhost_user, disk.nbd, disk.ublk);
    Ok(config)
}
