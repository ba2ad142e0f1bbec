//! Taking a device from the kernel's blkback, which binds every device in `backend/vbd` as long as it is loaded.
//!
//! It binds a device when xenstored tells the kernel of it, and does nothing with it before a block script names a device
//! of the host (`physical-device`), which `block-vbd` never does. So it is enough to unbind it before the domain's end
//! connects, and both can serve in one domain 0.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use vbd_xen::{BackendKind, DeviceId};

/// Where the kernel shows its back-ends.
const BUS: &str = "/sys/bus/xen-backend";
/// How long the kernel may take to bind a device that it has been told of.
const BINDS_WITHIN: Duration = Duration::from_secs(2);
/// How often it is looked.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Waits until blkback has the device, and takes it away. Nothing where blkback is not loaded.
///
/// # Errors
/// The text for people.
pub(super) fn unbind(id: &DeviceId) -> Result<(), String> {
    if id.kind == BackendKind::Vbd { unbind_in(Path::new(BUS), id, BINDS_WITHIN) } else { Ok(()) }
}

fn unbind_in(bus: &Path, id: &DeviceId, within: Duration) -> Result<(), String> {
    let driver = bus.join("drivers/vbd");
    if !driver.exists() {
        return Ok(());
    }
    // xenbus' name of the device; the kernel writes its numbers in decimal.
    let name = format!("vbd-{}-{}", id.domid, id.devid);
    let bound = driver.join(&name);
    let deadline = Instant::now() + within;
    while !bound.exists() {
        if Instant::now() >= deadline {
            // Not bound: the device was unbound before this process started, or somebody else's driver has it.
            return Ok(());
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    match fs::write(driver.join("unbind"), &name) {
        Ok(()) => Ok(()),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) =>
        {
            Ok(())
        }
        Err(error) => Err(format!(
            "the kernel's blkback has the device {name} and does not give it up ({error}): `modprobe -r xen-blkback` \
             keeps it out of the way"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: DeviceId = DeviceId { kind: BackendKind::Vbd, domid: 3, devid: 51712 };

    #[test]
    fn a_device_is_waited_for_and_unbound() {
        let bus = tempfile::tempdir().unwrap();
        unbind_in(bus.path(), &ID, Duration::ZERO).unwrap();
        let driver = bus.path().join("drivers/vbd");
        fs::create_dir_all(&driver).unwrap();
        unbind_in(bus.path(), &ID, Duration::ZERO).unwrap();
        assert!(!driver.join("unbind").exists(), "what blkback does not have is left alone");

        let binding = std::thread::spawn({
            let driver = driver.clone();
            move || {
                std::thread::sleep(Duration::from_millis(30));
                fs::create_dir(driver.join("vbd-3-51712")).unwrap();
            }
        });
        unbind_in(bus.path(), &ID, Duration::from_secs(20)).unwrap();
        binding.join().unwrap();
        assert_eq!(fs::read_to_string(driver.join("unbind")).unwrap(), "vbd-3-51712");
    }
}
