//! Control commands, each on a thread of its own and bounded in time.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::abi::{Command, ControlData, DeviceInfo, feature};
use crate::bounded;
use crate::error::Error;

const NODE: &str = "/dev/ublk-control";
/// Commands that only look at something.
const LOOK: Duration = Duration::from_secs(5);

/// A device, as commands name it.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) id: u32,
    /// The driver wants to see that we may use this node: the device is an unprivileged user's.
    by_path: bool,
}

impl Target {
    /// Before its flags are known.
    pub(crate) fn new(id: u32) -> Self {
        Target { id, by_path: false }
    }

    pub(crate) fn of(info: &DeviceInfo) -> Self {
        Target { id: info.id, by_path: info.has(feature::UNPRIVILEGED) }
    }

    /// Where its server talks to the driver.
    pub(crate) fn node(&self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkc{}", self.id))
    }

    /// The block device.
    pub(crate) fn block(&self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.id))
    }
}

/// The driver's control node.
pub(crate) struct Control {
    file: Arc<OwnedFd>,
    /// None before Linux 6.5, which does not tell.
    features: Option<u64>,
}

impl Control {
    pub(crate) fn open() -> Result<Self, Error> {
        Self::open_at(Path::new(NODE))
    }

    fn open_at(path: &Path) -> Result<Self, Error> {
        let file = File::options().read(true).write(true).open(path).map_err(|source| {
            match source.raw_os_error() {
                // A node without its driver, too.
                Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Error::NoDriver,
                _ => Error::Denied { path: path.to_owned(), source },
            }
        })?;
        let mut control = Control { file: Arc::new(file.into()), features: None };
        let answer = control.send(Command::GetFeatures, None, vec![0; 8], 0, LOOK, true);
        control.features = match answer {
            Ok(bytes) => crate::abi::get(&bytes, 0).map(u64::from_ne_bytes),
            // An older kernel does not know the command.
            Err(Error::Refused { .. }) => None,
            Err(error) => return Err(error),
        };
        Ok(control)
    }

    /// Whether commands are sent as ioctls are numbered.
    pub(crate) fn encoded(&self) -> bool {
        self.features.is_some()
    }

    pub(crate) fn has(&self, feature: u64) -> bool {
        self.features.is_some_and(|features| features & feature == feature)
    }

    /// What the driver knows of a device; none where there is none.
    pub(crate) fn info(&self, id: u32) -> Result<Option<DeviceInfo>, Error> {
        // The newer command is for devices of both kinds.
        let (command, by_path) = match self.encoded() {
            true => (Command::GetDeviceInfo2, true),
            false => (Command::GetDeviceInfo, false),
        };
        match self.run(command, &Target { id, by_path }, vec![0; DeviceInfo::LEN], 0, LOOK) {
            Ok(bytes) => Ok(DeviceInfo::from_bytes(&bytes)),
            Err(Error::Refused { source, .. })
                if matches!(source.raw_os_error(), Some(libc::ENODEV | libc::ENOENT)) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Adds a device; gives what the driver made of it.
    pub(crate) fn add(&self, wanted: &DeviceInfo, within: Duration) -> Result<DeviceInfo, Error> {
        let bytes = self.run(Command::Add, &Target::new(wanted.id), wanted.bytes(), 0, within)?;
        DeviceInfo::from_bytes(&bytes).ok_or(Error::Option("ublk: the driver's answer is too short"))
    }

    /// Deletes a device. Its number is free when the last user of it has let go.
    pub(crate) fn delete(&self, target: &Target, within: Duration) -> Result<(), Error> {
        if self.encoded() {
            match self.run(Command::DeleteAsync, target, Vec::new(), 0, within) {
                // Unknown before Linux 6.9; forgotten for unprivileged devices, which gives EINVAL.
                Err(Error::Refused { source, .. })
                    if matches!(source.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => {}
                other => return other.map(drop),
            }
        }
        self.run(Command::Delete, target, Vec::new(), 0, within).map(drop)
    }

    /// Sends a command and waits for the driver. Gives the bytes back, as the driver has changed them.
    pub(crate) fn run(
        &self,
        command: Command,
        target: &Target,
        bytes: Vec<u8>,
        data: u64,
        within: Duration,
    ) -> Result<Vec<u8>, Error> {
        self.send(command, Some(target), bytes, data, within, self.encoded())
    }

    fn send(
        &self,
        command: Command,
        target: Option<&Target>,
        bytes: Vec<u8>,
        data: u64,
        within: Duration,
        encoded: bool,
    ) -> Result<Vec<u8>, Error> {
        let device = target.map(|target| target.id).filter(|id| *id != crate::abi::ANY);
        let refused = |source| Error::Refused { command: command.name(), device, source };
        let mut payload = match target {
            Some(target) if target.by_path => {
                let mut path = target.node().into_os_string().into_encoded_bytes();
                path.push(0);
                path
            }
            _ => Vec::new(),
        };
        let path_len = payload.len();
        payload.extend(bytes);
        let too_long = |_| refused(io::Error::from_raw_os_error(libc::EINVAL));
        let mut head = ControlData {
            device: target.map_or(0, |target| target.id),
            len: u16::try_from(payload.len()).map_err(too_long)?,
            address: 0,
            data,
            path_len: u16::try_from(path_len).map_err(too_long)?,
        };
        let file = self.file.clone();
        let answer = bounded::within(within, move || {
            // On this thread, which outlives the command, whoever has stopped waiting for it.
            if !payload.is_empty() {
                head.address = payload.as_mut_ptr() as u64;
            }
            // SAFETY: the command points to the payload, as long as it says, until it has ended.
            let result =
                unsafe { vbd_ring::command::run(file.as_fd(), command.number(encoded), head.bytes()) };
            (result, payload)
        });
        let Some((result, payload)) = answer else {
            return Err(Error::Late { command: command.name(), device, within });
        };
        match result {
            Err(error) => Err(Error::NoUring(error.to_string())),
            Ok(result) if result < 0 => Err(refused(io::Error::from_raw_os_error(-result))),
            Ok(_) => Ok(payload[path_len..].to_vec()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_the_driver_is_told_from_one_that_denies_it() {
        let missing = Control::open_at(Path::new("/nonexistent/ublk-control"));
        let error = missing.err().expect("no driver");
        assert!(matches!(error, Error::NoDriver));
        assert!(error.to_string().contains("modprobe ublk_drv"), "{error}");
        // A directory cannot be opened for writing.
        assert!(matches!(Control::open_at(Path::new("/")), Err(Error::Denied { .. })));
    }

    #[test]
    fn a_driver_that_knows_no_commands_is_an_error_of_its_first() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let control = Control::open_at(file.path()).expect("it opens");
        assert!(!control.encoded() && !control.has(feature::UPDATE_SIZE));
        let added = control.add(&DeviceInfo { id: 3, ..DeviceInfo::default() }, LOOK);
        let error = added.expect_err("no such command");
        assert!(error.to_string().starts_with("ublk3: the driver refuses ADD_DEV"), "{error}");
    }
}
