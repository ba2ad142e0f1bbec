//! Disks of Xen's domains: which device gets which disk, and one writer for each file.
//!
//! [`vbd_xen`] serves the devices; here are the [`Provider`](vbd_xen::Provider) that finds their disks, and what is the
//! host's: other users of a device (the kernel's blkback), of the domain (its toolstack), of Xen (another vbd).

mod blkback;
mod handover;
mod only;
mod provider;
mod storage;
pub(crate) mod target;
mod toolstack;

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vbd_xen::{BackendKind, DeviceId, DeviceStatus, Platform, Server};

use crate::control::XenDevice;
use crate::supervisor::{Disks, Served};
use crate::{Fault, FaultKind};

pub(crate) use only::OnlyOne;
pub(crate) use provider::Provider;
pub use toolstack::{SCRIPT, disk_spec};

/// Where everything of Xen is: one for a host, so not in a user's runtime directory.
pub const RUNTIME_DIR: &str = "/run/vbd";

/// What a process serves to domains.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which devices.
    pub serves: Serves,
    /// Most queues of a device.
    pub queues: u16,
    /// How long a device that closes may take.
    pub drain: Duration,
    /// Records of requests in flight, the lock, and what else concerns Xen.
    pub dir: PathBuf,
}

impl Options {
    /// The defaults, for these devices.
    pub fn new(serves: Serves) -> Self {
        let defaults = vbd_xen::Options::default();
        let dir = Path::new(RUNTIME_DIR).join("xen");
        Options { serves, queues: defaults.queues, drain: defaults.drain, dir }
    }
}

/// The devices that a process serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serves {
    /// Those of the configuration's disks alone.
    Configured {
        /// xl gives the domain its disks at the start, and takes them away at the end.
        attach: bool,
    },
    /// Whatever the toolstack makes for vbd.
    All {
        /// Disks that name a file and no script, too: the script `block` has to be vbd's (`vbd xen install --files`).
        files: bool,
        /// Raw disks of `backend/qdisk`, too: the device model of their domains has to be vbd's.
        qdisk: bool,
    },
}

/// Xen's side of a process. Every method may block.
pub(crate) struct Xen {
    server: Mutex<Option<Server>>,
    platform: Platform,
    options: Options,
    _only: OnlyOne,
}

impl Xen {
    /// Serves devices from now on.
    ///
    /// # Errors
    /// There is no Xen, no permission, or another process serves its domains.
    pub(crate) fn start(
        options: Options,
        reactors: Vec<vbd_ring::Handle>,
        disks: Arc<Disks>,
    ) -> Result<Xen, Fault> {
        let failed = |error: vbd_xen::Error| Fault::new(FaultKind::Failed, error.to_string());
        // First: without Xen nothing else matters.
        let platform = Platform::open().map_err(failed)?;
        let only = OnlyOne::take(&options.dir)?;
        let kinds: &[BackendKind] = match options.serves {
            Serves::All { qdisk: true, .. } => &[BackendKind::Vbd, BackendKind::Qdisk],
            _ => &[BackendKind::Vbd],
        };
        let records = options.dir.join("in-flight");
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&records);
        made.map_err(|error| Fault::failed(records.display(), error))?;
        mark_files(&options)?;
        let settings = vbd_xen::Options {
            queues: options.queues,
            drain: options.drain,
            records: Some(records),
            ..vbd_xen::Options::default()
        };
        let provider = Arc::new(Provider::new(options.serves, platform.clone(), disks));
        let server = Server::start(platform.clone(), kinds, reactors, settings, provider).map_err(failed)?;
        Ok(Xen { server: Mutex::new(Some(server)), platform, options, _only: only })
    }

    /// All devices.
    pub(crate) fn devices(&self) -> Vec<DeviceStatus> {
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        server.as_ref().map(Server::devices).unwrap_or_default()
    }

    /// Has xl give the domains their disks, where that was asked for.
    pub(crate) fn attach(&self, disks: &[Arc<Served>]) -> Result<(), Fault> {
        if self.options.serves != (Serves::Configured { attach: true }) {
            return Ok(());
        }
        for disk in disks {
            let Some(face) = disk.xen() else { continue };
            let Some(domid) = toolstack::domid(&face.domain)? else {
                let message =
                    format!("no domain called `{}` runs here: `xl list` shows those that do", face.domain);
                return Err(Fault::new(FaultKind::Unknown, message));
            };
            // A process that goes on for one that was killed finds the device there.
            let id = DeviceId { kind: BackendKind::Vbd, domid, devid: face.devid };
            let there =
                self.platform.stores.connect().and_then(|mut store| store.list(&format!("backend/{id}")));
            if there.map_err(|error| Fault::failed("xenstore", error))?.is_none() {
                toolstack::attach(&face.domain, disk.config())?;
            }
        }
        Ok(())
    }

    /// Takes a device from its domain.
    pub(crate) fn detach(&self, id: &DeviceId, force: bool) -> Result<(), Fault> {
        toolstack::detach(id, force)
    }

    /// Ends serving. Devices stay connected for the next process, except where xl was told to attach them.
    pub(crate) fn stop(&self) -> Result<(), Fault> {
        let mut result = Ok(());
        if self.options.serves == (Serves::Configured { attach: true }) {
            for device in self.devices() {
                result = result.and(toolstack::detach(&device.id, false));
            }
        }
        let server = self.server.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(server) = server {
            server.leave();
        }
        result
    }
}

/// Tells xl's block script whether files without a script are vbd's.
fn mark_files(options: &Options) -> Result<(), Fault> {
    let mark = options.dir.join("files");
    let done = if matches!(options.serves, Serves::All { files: true, .. }) {
        std::fs::write(&mark, "")
    } else {
        match std::fs::remove_file(&mark) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    };
    done.map_err(|error| Fault::failed(mark.display(), error))
}

/// A disk's place in a domain, from the configuration or from the device that asked for it.
#[derive(Debug)]
pub(crate) struct Face {
    /// The domain's name, or its number.
    pub(crate) domain: String,
    /// Its name for the device.
    pub(crate) vdev: String,
    /// The device's number.
    devid: u32,
    device: Mutex<Option<DeviceId>>,
    /// Made for a device, and gone with it.
    pub(crate) transient: bool,
}

impl Face {
    /// The place of a configured disk.
    pub(crate) fn configured(domain: &str, vdev: crate::config::Vdev) -> Self {
        Face {
            domain: domain.to_owned(),
            vdev: vdev.to_string(),
            devid: vdev.number(),
            device: Mutex::default(),
            transient: false,
        }
    }

    /// The device that has the disk now.
    pub(crate) fn device(&self) -> Option<DeviceId> {
        *self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_device(&self, id: Option<DeviceId>) {
        *self.device.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }

    /// Whether this is the place of that device.
    fn is_for(&self, id: &DeviceId, domain: Option<&str>) -> bool {
        let named = domain == Some(self.domain.as_str()) || self.domain == id.domid.to_string();
        named && self.devid == id.devid
    }
}

/// A device for the control socket.
pub(crate) fn describe(device: DeviceStatus) -> XenDevice {
    XenDevice {
        domain: device.domain,
        domid: device.id.domid,
        device: if device.vdev.is_empty() { device.id.devid.to_string() } else { device.vdev },
        backend: device.id.to_string(),
        vm: device.vm,
        disk: device.disk,
        params: device.params,
        read_only: device.read_only,
        connected: device.connected,
        state: device.state.to_string(),
        frontend: device.frontend.to_string(),
        abi: device.abi.to_owned(),
        features: device.features.into_iter().map(str::to_owned).collect(),
        queues: device.queues,
        ring_pages: device.ring_pages,
        grants_mapped: device.grants_mapped,
        grants_persistent: device.grants_persistent,
        requests: device.requests,
        errors: device.errors,
        in_flight: device.in_flight,
        problem: device.problem,
    }
}
