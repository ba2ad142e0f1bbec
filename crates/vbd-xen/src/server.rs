//! The server as other threads see it.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use vbd_ring::Handle;

use crate::control::Control;
use crate::mail::{Leaving, Mail, Message};
use crate::memory::Pages;
use crate::options::{BackendKind, DeviceId, Options, Provider};
use crate::queue::Numbers;
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

/// A device's status, and what it is filled up from when somebody asks.
pub(crate) struct Shown {
    pub(crate) status: DeviceStatus,
    pub(crate) pages: Arc<Pages>,
    pub(crate) numbers: Vec<Arc<Numbers>>,
}

/// What the control thread tells of its devices.
pub(crate) type Shelf = Arc<Mutex<BTreeMap<DeviceId, Shown>>>;

/// Serves the devices of this domain's back-end directories. Dropping it leaves the devices as
/// [`leave`](Self::leave) does.
pub struct Server {
    mail: Arc<Mail>,
    shelf: Shelf,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Watches the back-end directories of these kinds and serves what the provider knows.
    ///
    /// # Errors
    /// Xenstore cannot be reached.
    ///
    /// # Panics
    /// There are no reactors.
    pub fn start(
        platform: Platform,
        kinds: &[BackendKind],
        reactors: Vec<Handle>,
        options: Options,
        provider: Arc<dyn Provider>,
    ) -> Result<Server, Error> {
        assert!(!reactors.is_empty(), "a server needs a reactor");
        let mail = Arc::new(Mail::new().map_err(Error::Start)?);
        let shelf = Shelf::default();
        let mut control =
            Control::new(platform, kinds, reactors, options, provider, mail.clone(), shelf.clone());
        control.connect_store().map_err(Error::Store)?;
        let thread = std::thread::Builder::new().name("vbd-xen".into()).spawn(move || control.run());
        Ok(Server { mail, shelf, thread: Some(thread.map_err(Error::Start)?) })
    }

    /// Every device, with what it is doing.
    pub fn devices(&self) -> Vec<DeviceStatus> {
        let shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        let filled = shelf.values().map(|shown| {
            let sum = |of: fn(&Numbers) -> u64| shown.numbers.iter().map(|numbers| of(numbers)).sum();
            DeviceStatus {
                grants_mapped: shown.pages.mapped.load(Relaxed),
                grants_persistent: shown.pages.persistent.load(Relaxed),
                requests: sum(|numbers| numbers.requests.load(Relaxed)),
                errors: sum(|numbers| numbers.errors.load(Relaxed)),
                in_flight: sum(|numbers| numbers.in_flight.load(Relaxed)),
                ..shown.status.clone()
            }
        });
        filled.collect()
    }

    /// The disk of a device has become larger: its domain is told. Disks that tell their watchers need no such call.
    pub fn resized(&self, id: &DeviceId) {
        self.mail.send(Message::Resized(*id));
    }

    /// Closes all devices in order, within [`Options::drain`], and ends.
    pub fn stop(mut self) {
        self.end(Leaving::Close);
    }

    /// Finishes what was taken and ends, leaving every device connected for the next server, which takes requests from
    /// there on. Domains see a pause. Needs [`Options::records`]; without them, as [`stop`](Self::stop).
    pub fn leave(mut self) {
        self.end(Leaving::Keep);
    }

    fn end(&mut self, leaving: Leaving) {
        self.mail.send(Message::Leave(leaving));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.end(Leaving::Keep);
        }
    }
}
