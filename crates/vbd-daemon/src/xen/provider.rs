//! The disk for a device.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use vbd_core::Disk;
use vbd_xen::{BackendKind, DeviceId, DeviceRequest, Mode, Platform, Provided};

use crate::config::{Access, DiskConfig};
use crate::supervisor::{Disks, LEASE_WAIT, Served, open_disk};

use super::handover::{FileKey, HandedOver, Use, Uses};
use super::target::{self, Target};
use super::{Face, SCRIPT, Serves, blkback, storage};

/// xl's own block script, whose place vbd's takes where it serves files that name no script.
const DEFAULT_SCRIPT: &str = "block";

/// Finds disks for devices.
pub(crate) struct Provider {
    serves: Serves,
    platform: Platform,
    disks: Arc<Disks>,
    uses: Arc<Uses>,
}

impl Provider {
    /// A provider that notes what it serves in this list.
    pub(crate) fn new(serves: Serves, platform: Platform, disks: Arc<Disks>) -> Self {
        Provider { serves, platform, disks, uses: Arc::default() }
    }

    /// Whether the device is to be served by this process, without looking at its disk.
    fn is_ours(&self, device: &DeviceRequest) -> bool {
        let Serves::All { files, qdisk } = self.serves else { return false };
        match device.id.kind {
            BackendKind::Qdisk => qdisk,
            BackendKind::Vbd => match script_name(device) {
                Some(SCRIPT) => true,
                Some(DEFAULT_SCRIPT) if files => {
                    Path::new(&device.params).metadata().is_ok_and(|about| about.is_file())
                        && !self.has_host_device(&device.id)
                }
                _ => false,
            },
        }
    }

    /// Whether a block script has given the device to the kernel already.
    fn has_host_device(&self, id: &DeviceId) -> bool {
        let key = format!("backend/{id}/physical-device");
        let value = self.platform.stores.connect().and_then(|mut store| store.read(&key));
        value
            .unwrap_or_else(|error| {
                tracing::warn!("{key}: {error}");
                None
            })
            .is_some()
    }

    /// The disk of the configuration that is for this device.
    fn configured(&self, device: &DeviceRequest) -> Option<Arc<Served>> {
        let disks = self.disks.read().unwrap_or_else(PoisonError::into_inner);
        let is_for = |face: &Face| !face.transient && face.is_for(&device.id, device.domain.as_deref());
        disks.values().find(|disk| disk.xen().is_some_and(is_for)).cloned()
    }

    /// A disk as the toolstack describes it, in the list of those served.
    fn described(&self, device: &DeviceRequest) -> Result<Arc<Served>, String> {
        let Target { path, format, forced } = target::parse(&device.params)?;
        let domain = device.domain.clone().unwrap_or_else(|| device.id.domid.to_string());
        let vdev = if device.vdev.is_empty() { device.id.devid.to_string() } else { device.vdev.clone() };
        let access = match device.mode {
            _ if device.cdrom => Access::ReadOnly,
            Mode::ReadOnly => Access::ReadOnly,
            Mode::Write if !forced => Access::ReadWrite,
            Mode::Write | Mode::WriteForced => Access::ReadWriteForce,
        };
        let config = DiskConfig {
            format,
            access,
            cdrom: device.cdrom,
            vdev: vdev.parse().ok(),
            xen: Some(domain.clone()),
            discard: device.discard.unwrap_or(true),
            direct_io_safe: device.direct_io_safe,
            ..DiskConfig::new(self.free_name(&domain, &vdev, &device.id), path)
        };
        let face =
            Face { domain, vdev, devid: device.id.devid, device: Some(device.id).into(), transient: true };
        self.claim(device, &config)?;
        let made = || {
            // The lease is the older device's while a machine is handed over; this one takes it when it connects.
            let patience = (!self.is_handed_over(&device.id)).then(|| Instant::now() + LEASE_WAIT);
            let disk = open_disk(config, patience).map_err(|fault| fault.message)?;
            Ok(Arc::new(disk.for_domain(face)))
        };
        made().inspect_err(|_: &String| self.uses.leave(&device.id))
    }

    /// A name that no disk has: `vm1-xvda`; with the domain's number where that is taken, as during a migration.
    fn free_name(&self, domain: &str, vdev: &str, id: &DeviceId) -> String {
        let disks = self.disks.read().unwrap_or_else(PoisonError::into_inner);
        let name = format!("{domain}-{vdev}");
        let is_good = DiskConfig::check_name(&name).is_ok() && !disks.contains_key(&name);
        if is_good { name } else { format!("domain{}-{}", id.domid, id.devid) }
    }

    /// Notes that the device uses its file.
    ///
    /// # Errors
    /// Another domain does, and one of them writes.
    fn claim(&self, device: &DeviceRequest, config: &DiskConfig) -> Result<(), String> {
        let file = file_key(&config.path).map_err(|error| format!("{}: {error}", config.path.display()))?;
        let id = device.id;
        let domain = device.domain.as_deref().unwrap_or("?");
        let who = format!("domain {} ({domain}), {}", id.domid, device.vdev);
        let claims = config.access == Access::ReadWrite;
        let new = Use { id, file, claims, vm: device.vm.clone(), who };
        self.uses.enter(new).map_err(|other| {
            let does = if other.claims { "writes to" } else { "reads" };
            let path = config.path.display();
            if other.id.domid == id.domid {
                format!("{path}: {} {does} it already: give the domain each file once", other.who)
            } else {
                format!(
                    "{path}: in use by {}, which {does} it: end that first, share it for reading only (access=ro), or \
                     mean it with `target=w!:{path}` for every domain that writes",
                    other.who
                )
            }
        })
    }

    fn is_handed_over(&self, id: &DeviceId) -> bool {
        self.uses.has_older(id)
    }

    fn provide(&self, device: &DeviceRequest, served: &Served) -> Provided {
        let config = served.config();
        let disk = HandedOver { disk: served.disk().clone(), id: device.id, uses: self.uses.clone() };
        Provided {
            disk: Arc::new(disk) as Arc<dyn Disk>,
            read_only: !config.access.is_writable(),
            serial: Some(config.serial.clone()),
            direct: config.direct_io_safe || device.direct_io_safe || storage::is_local(&config.path),
        }
    }
}

impl vbd_xen::Provider for Provider {
    fn open(&self, device: &DeviceRequest) -> Result<Option<Provided>, String> {
        let served = if let Some(served) = self.configured(device) {
            self.claim(device, served.config())?;
            if let Some(face) = served.xen() {
                face.set_device(Some(device.id));
            }
            served
        } else if self.is_ours(device) {
            let served = self.described(device)?;
            let mut disks = self.disks.write().unwrap_or_else(PoisonError::into_inner);
            disks.insert(served.name().to_owned(), served.clone());
            served
        } else {
            return Ok(None);
        };
        if let Err(problem) = blkback::unbind(&device.id) {
            self.forget(&device.id);
            return Err(problem);
        }
        Ok(Some(self.provide(device, &served)))
    }

    fn closed(&self, id: &DeviceId) {
        self.forget(id);
    }
}

impl Provider {
    /// Takes a device out of every list.
    fn forget(&self, id: &DeviceId) {
        self.uses.leave(id);
        let mut disks = self.disks.write().unwrap_or_else(PoisonError::into_inner);
        disks.retain(|_, disk| {
            let Some(face) = disk.xen().filter(|face| face.device() == Some(*id)) else { return true };
            face.set_device(None);
            !face.transient
        });
    }
}

/// The name of a device's script, without its directory.
fn script_name(device: &DeviceRequest) -> Option<&str> {
    device.script.as_deref().and_then(|script| script.rsplit('/').next())
}

/// Which file a path leads to.
fn file_key(path: &Path) -> std::io::Result<FileKey> {
    let about = std::fs::metadata(path)?;
    Ok(if about.file_type().is_block_device() {
        (None, about.rdev())
    } else {
        (Some(about.dev()), about.ino())
    })
}
