//! The disks that a process serves: added, listed, grown, taken away, stopped.

mod backup;
mod front;
mod images;
mod jobs;
mod reactors;
mod served;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::Notify;
use vbd_core::Disk;

use crate::config::{Config, DiskConfig, Limits};
use crate::control::{
    Detach, DiskInfo, DiskStat, Grow, Grown, NewDisk, ProcessInfo, SnapshotInfo, XenDevice,
};
use crate::daemon::StartError;
use crate::service::Listener;
use crate::xen::{self, Face, Xen};
use crate::{Fault, FaultKind};

pub use backup::{back_up, bitmaps, change_bitmaps};
use front::{Clients, Exports};
use reactors::Reactors;
pub(crate) use served::{LEASE_WAIT, Served, open as open_disk};
use vbd_ublk::Ending;

/// How many disks are stopped at the same time.
const STOPPERS: usize = 16;

/// The disks that a process serves, by name.
pub(crate) type Disks = RwLock<BTreeMap<String, Arc<Served>>>;

/// All disks of one process. Every method may block, so none is to be called on a reactor.
pub struct Supervisor {
    disks: Arc<Disks>,
    /// Xen's domains, where they are served.
    xen: Option<Xen>,
    /// Held while a disk is added, so that a name or a socket is judged free once.
    adding: Mutex<()>,
    exports: Exports,
    jobs: jobs::Jobs,
    limits: Limits,
    stop_within: Duration,
    stopping: AtomicBool,
    changed: Notify,
    since: SystemTime,
    // Last, since all of the above work on them.
    reactors: Reactors,
}

impl Supervisor {
    /// Starts the reactors, the NBD servers and every disk, or nothing. Also gives the disks in the order of the
    /// configuration.
    ///
    /// # Errors
    /// All that is wrong.
    pub(crate) fn start(
        config: Config,
        made: Vec<(DiskConfig, Arc<dyn Disk>)>,
        settings: vbd_ring::Settings,
        listeners: Vec<Listener>,
        incoming: bool,
        stop_within: Duration,
        xen: Option<xen::Options>,
    ) -> Result<(Self, Vec<DiskInfo>), StartError> {
        let reactors = Reactors::start(config.reactors, &settings)?;
        let mut faults = Vec::new();
        // A file that its last user is still letting go of is waited for, once for all disks.
        let patience = Instant::now() + served::LEASE_WAIT;
        let mut disks = Vec::new();
        for disk in config.disks {
            match served::open(disk, (!incoming).then_some(patience)) {
                Ok(disk) => disks.push(disk),
                Err(fault) => faults.push(fault),
            }
        }
        for (config, disk) in made {
            match served::made(config, disk) {
                Ok(disk) => disks.push(disk),
                Err(fault) => faults.push(fault),
            }
        }
        let exports = Exports::bind(config.nbd, listeners, &reactors, &mut faults);
        let mut supervisor = Supervisor {
            disks: Arc::default(),
            xen: None,
            adding: Mutex::default(),
            exports,
            jobs: jobs::Jobs::default(),
            limits: config.limits,
            stop_within,
            stopping: AtomicBool::new(false),
            changed: Notify::new(),
            since: SystemTime::now(),
            reactors,
        };
        let mut ready = Vec::new();
        for disk in disks {
            match supervisor.serve(disk) {
                Ok(disk) => ready.push(disk),
                Err(fault) => faults.push(fault),
            }
        }
        if let Some(xen) = xen.filter(|_| faults.is_empty()) {
            match Xen::start(xen, supervisor.reactors.handles(), supervisor.disks.clone()) {
                Ok(xen) => {
                    faults.extend(xen.attach(&ready).err());
                    supervisor.xen = Some(xen);
                }
                Err(fault) => faults.push(fault),
            }
        }
        if faults.is_empty() {
            let users = supervisor.users();
            let ready = ready.iter().map(|disk| disk.info(&users)).collect();
            return Ok((supervisor, ready));
        }
        // What could not be stopped is of no interest beside why nothing was started.
        let _ = supervisor.stop(stop_within);
        Err(StartError(faults))
    }

    /// Gives an opened disk its front-ends and its place in the list.
    fn serve(&self, disk: served::Opened) -> Result<Arc<Served>, Fault> {
        let served = Arc::new(disk.serve(&self.exports, &self.reactors, self.limits, self.stop_within)?);
        self.write().insert(served.name().to_owned(), served.clone());
        Ok(served)
    }

    /// About this process.
    pub fn process(&self) -> ProcessInfo {
        ProcessInfo {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            since: self.since.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            reactors: self.reactors.count(),
            disks: self.read().len(),
        }
    }

    /// All disks, by name.
    pub fn list(&self) -> Vec<DiskInfo> {
        let disks: Vec<_> = self.read().values().cloned().collect();
        let users = self.users();
        disks.iter().map(|disk| disk.info(&users)).collect()
    }

    /// The devices of Xen's domains; none where they are not served.
    pub fn xen(&self) -> Option<Vec<XenDevice>> {
        self.xen.as_ref().map(|xen| xen.devices().into_iter().map(xen::describe).collect())
    }

    fn users(&self) -> Users {
        Users {
            clients: self.exports.clients(),
            xen: self.xen.as_ref().map(Xen::devices).unwrap_or_default(),
        }
    }

    /// A disk with its counters.
    ///
    /// # Errors
    /// No disk has this name.
    pub fn stat(&self, name: &str) -> Result<DiskStat, Fault> {
        Ok(self.get(name)?.stat(&self.users()))
    }

    /// Makes a disk larger and tells its guests.
    ///
    /// # Errors
    /// No disk has this name, it would become smaller, it cannot grow, or there is no room.
    pub fn grow(&self, name: &str, to: Grow) -> Result<Grown, Fault> {
        self.get(name)?.grow(to)
    }

    /// The snapshots inside a disk's image.
    ///
    /// # Errors
    /// No disk has this name, or its image keeps none; so for all that follow.
    pub fn snapshots(&self, name: &str) -> Result<Vec<SnapshotInfo>, Fault> {
        let list = self.get(name)?.live(|live| live.snapshots())?;
        Ok(list.into_iter().map(SnapshotInfo::from).collect())
    }

    /// Keeps a disk's content as it is now, while its guests go on.
    ///
    /// # Errors
    /// There is one of that name, or there is no room.
    pub fn create_snapshot(&self, name: &str, snapshot: &str) -> Result<SnapshotInfo, Fault> {
        Ok(self.get(name)?.live(|live| live.create_snapshot(snapshot))?.into())
    }

    /// Gives a disk the content that it had then. Its guests find other bytes than those they know: that is for whoever
    /// asks for it to mind.
    ///
    /// # Errors
    /// There is no such snapshot.
    pub fn apply_snapshot(&self, name: &str, snapshot: &str) -> Result<(), Fault> {
        self.get(name)?.live(|live| live.apply_snapshot(snapshot))
    }

    /// Forgets a snapshot.
    ///
    /// # Errors
    /// There is no such snapshot.
    pub fn delete_snapshot(&self, name: &str, snapshot: &str) -> Result<(), Fault> {
        self.get(name)?.live(|live| live.delete_snapshot(snapshot))
    }

    /// Serves one more disk.
    ///
    /// # Errors
    /// The name, a socket or the file is taken, there are as many disks as the configuration allows, the request makes
    /// no sense, or the disk cannot be opened.
    pub fn add(&self, disk: NewDisk) -> Result<DiskInfo, Fault> {
        let config = served::config_of(disk)?;
        let _one = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_room(&config)?;
        let opened = served::open(config, Some(Instant::now() + served::LEASE_WAIT))?;
        let served = self.serve(opened)?;
        if self.stopping.load(Ordering::SeqCst) {
            // The stop may have come by before the disk was in the list.
            if let Some(disk) = self.write().remove(served.name()) {
                disk.stop(&self.exports, Ending::Delete, self.stop_within)?;
            }
            return Err(stopping());
        }
        Ok(served.info(&self.users()))
    }

    fn check_room(&self, config: &DiskConfig) -> Result<(), Fault> {
        if self.stopping.load(Ordering::SeqCst) {
            return Err(stopping());
        }
        let disks = self.read();
        if disks.contains_key(&config.name) {
            let message = format!("another disk is called `{}`: choose another name", config.name);
            return Err(Fault::new(FaultKind::Exists, message));
        }
        if disks.len() >= self.limits.max_devices {
            let message = format!(
                "`{}` would be one disk more than `max-devices` allows ({}): raise it in [limits]",
                config.name, self.limits.max_devices
            );
            return Err(Fault::new(FaultKind::Limit, message));
        }
        Ok(())
    }

    /// Ends serving a disk: what it has in work is finished, within the bound of a clean stop.
    ///
    /// # Errors
    /// No disk has this name, guests use it and it was not forced, or it did not stop cleanly (it is gone all the same).
    pub fn detach(&self, name: &str, how: Detach) -> Result<(), Fault> {
        let users = self.users();
        let disk = {
            let mut disks = self.write();
            let disk = disks.get(name).ok_or_else(|| Fault::unknown(name))?;
            let clients = disk.info(&users).clients();
            if clients > 0 && !how.force {
                let message = format!(
                    "`{name}` is in use by {clients} {}: disconnect first, or take it away all the same with --force",
                    if clients == 1 { "guest or client" } else { "guests or clients" }
                );
                return Err(Fault::new(FaultKind::Busy, message));
            }
            // The toolstack takes the device away, and the disk goes with it.
            if let Some((xen, id)) = self.xen.as_ref().zip(disk.xen().and_then(Face::device)) {
                let transient = disk.xen().is_some_and(|face| face.transient);
                drop(disks);
                xen.detach(&id, how.force)?;
                if transient {
                    self.changed.notify_one();
                    return Ok(());
                }
                disks = self.write();
            }
            disks.remove(name)
        };
        self.jobs.end(Some(name), self.stop_within);
        let result = disk.map_or(Ok(()), |disk| disk.stop(&self.exports, Ending::Delete, self.stop_within));
        self.changed.notify_one();
        result
    }

    /// Waits until there is no disk any more.
    pub(crate) async fn empty(&self) {
        while !self.read().is_empty() {
            self.changed.notified().await;
        }
    }

    /// Ends serving everything: nothing new is taken, what is in work is finished, within this time.
    ///
    /// # Errors
    /// What did not stop cleanly. It is stopped all the same.
    pub(crate) fn stop(&self, within: Duration) -> Result<(), StartError> {
        let deadline = Instant::now() + within;
        self.stopping.store(true, Ordering::SeqCst);
        self.jobs.end(None, within);
        let left_domains = self.xen.as_ref().map_or(Ok(()), Xen::stop);
        let disks = std::mem::take(&mut *self.write());
        let faults = Mutex::new(Vec::new());
        let note = |result: Result<(), Fault>| {
            if let Err(fault) = result {
                faults.lock().unwrap_or_else(PoisonError::into_inner).push(fault);
            }
        };
        note(left_domains);
        let left = || deadline.saturating_duration_since(Instant::now());
        let threads = disks.len().min(STOPPERS);
        let waiting = Mutex::new(disks.into_values());
        let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some(disk) = next() {
                        note(disk.stop(&self.exports, Ending::KeepIfUsed, left()));
                    }
                });
            }
        });
        self.exports.stop(left()).into_iter().for_each(|fault| note(Err(fault)));
        let faults = faults.into_inner().unwrap_or_else(PoisonError::into_inner);
        if faults.is_empty() { Ok(()) } else { Err(StartError(faults)) }
    }

    fn get(&self, name: &str) -> Result<Arc<Served>, Fault> {
        self.read().get(name).cloned().ok_or_else(|| Fault::unknown(name))
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Arc<Served>>> {
        self.disks.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, Arc<Served>>> {
        self.disks.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who uses the disks now.
pub(crate) struct Users {
    clients: Clients,
    xen: Vec<vbd_xen::DeviceStatus>,
}

fn stopping() -> Fault {
    Fault::new(FaultKind::Stopping, "this process is stopping and takes no more disks")
}
