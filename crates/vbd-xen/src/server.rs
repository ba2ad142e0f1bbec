//! The server: a control thread with one state machine for each device.

use std::sync::Arc;

use vbd_ring::Handle;

use crate::options::{BackendKind, DeviceId, Options, Provider};
use crate::status::DeviceStatus;
use crate::sys::Platform;

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This machine does not run under Xen, or what is needed of it is missing.
    #[error("{0}")]
    NoXen(String),
    /// There is no permission.
    #[error("{0}")]
    Permission(String),
    /// Xenstore does not answer as it should.
    #[error("xenstore: {0}")]
    Store(#[source] std::io::Error),
    /// No thread or descriptor could be had.
    #[error("cannot start the Xen server: {0}")]
    Start(#[source] std::io::Error),
}

/// Serves the devices of this domain's back-end directories. Dropping it leaves the devices as
/// [`leave`](Self::leave) does.
pub struct Server(());

impl Server {
    /// Watches the back-end directories of these kinds and serves what the provider knows.
    ///
    /// # Errors
    /// Xenstore cannot be reached.
    pub fn start(
        _platform: Platform,
        _kinds: &[BackendKind],
        _reactors: Vec<Handle>,
        _options: Options,
        _provider: Arc<dyn Provider>,
    ) -> Result<Server, Error> {
        Err(Error::NoXen("not there yet".into()))
    }

    /// Every device, with what it is doing.
    pub fn devices(&self) -> Vec<DeviceStatus> {
        Vec::new()
    }

    /// The disk of a device has become larger: its domain is told. Disks that tell their watchers need no such call.
    pub fn resized(&self, _id: &DeviceId) {}

    /// Closes all devices in order, within [`Options::drain`], and ends.
    pub fn stop(self) {}

    /// Finishes what was taken and ends, leaving every device connected for the next server, which takes requests from
    /// there on. Domains see a pause. Needs [`Options::records`]; without them, as [`stop`](Self::stop).
    pub fn leave(self) {}
}
