//! A machine of plain memory: a hypervisor, a domain with a disk, and the server under test.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]
#![allow(clippy::cast_possible_truncation, reason = "sizes of tests are small")]

pub(crate) mod frontend;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vbd_ring::{Reactor, Settings};
use vbd_xen::fake::Hypervisor;
use vbd_xen::{BackendKind, DeviceId, DeviceRequest, DeviceStatus, Options, Provided, Provider, Server};

use vbd_testing::{Behaviour, MemDisk, eventually};

/// The domain of most tests, and its disk.
pub(crate) const DOMID: u16 = 3;
pub(crate) const DEVID: u32 = 51712;
pub(crate) const ID: DeviceId = DeviceId { kind: BackendKind::Vbd, domid: DOMID, devid: DEVID };

/// Gives every device the one disk, unless it is told otherwise.
pub(crate) struct Giver {
    pub(crate) disk: Arc<Behaviour>,
    pub(crate) answer: Mutex<Answer>,
    pub(crate) asked: Mutex<Vec<DeviceRequest>>,
    pub(crate) closed: Mutex<Vec<DeviceId>>,
    pub(crate) direct: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Disk,
    NotOurs,
    Refusal(String),
}

impl Provider for Giver {
    fn open(&self, device: &DeviceRequest) -> Result<Option<Provided>, String> {
        self.asked.lock().unwrap().push(device.clone());
        match self.answer.lock().unwrap().clone() {
            Answer::Disk => Ok(Some(Provided {
                disk: Arc::new(MemDisk(self.disk.clone())),
                read_only: false,
                serial: None,
                direct: self.direct,
            })),
            Answer::NotOurs => Ok(None),
            Answer::Refusal(text) => Err(text),
        }
    }

    fn closed(&self, id: &DeviceId) {
        self.closed.lock().unwrap().push(*id);
    }
}

/// Server first, so that it goes first.
pub(crate) struct Bench {
    pub(crate) server: Option<Server>,
    pub(crate) hypervisor: Arc<Hypervisor>,
    pub(crate) disk: Arc<Behaviour>,
    pub(crate) giver: Arc<Giver>,
    pub(crate) options: Options,
    pub(crate) reactors: Vec<Reactor>,
    pub(crate) dir: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new() -> Bench {
        Bench::with(1 << 20, true, |_| {})
    }

    /// A disk of so many bytes.
    pub(crate) fn with(size: usize, direct: bool, change: impl FnOnce(&mut Options)) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let reactors: Vec<_> = (0..2).map(|_| Reactor::spawn("test", Settings::default()).unwrap()).collect();
        let disk = MemDisk::new(size).0;
        let giver = Arc::new(Giver {
            disk: disk.clone(),
            answer: Mutex::new(Answer::Disk),
            asked: Mutex::default(),
            closed: Mutex::default(),
            direct,
        });
        let mut options = Options {
            drain: Duration::from_millis(300),
            records: Some(dir.path().to_owned()),
            ..Options::default()
        };
        change(&mut options);
        let mut bench = Bench {
            server: None,
            hypervisor: Hypervisor::new().unwrap(),
            disk,
            giver,
            options,
            reactors,
            dir,
        };
        bench.serve();
        bench
    }

    /// Starts a server, as after the one before has ended.
    pub(crate) fn serve(&mut self) {
        self.server = Some(self.another());
    }

    pub(crate) fn another(&self) -> Server {
        Server::start(
            self.hypervisor.platform(),
            &[BackendKind::Vbd, BackendKind::Qdisk],
            self.reactors.iter().map(Reactor::handle).collect(),
            self.options.clone(),
            self.giver.clone(),
        )
        .unwrap()
    }

    pub(crate) fn status(&self) -> DeviceStatus {
        // Xenstore may have the news before the shelf.
        eventually("the device is shown", || {
            self.server.as_ref().unwrap().devices().iter().any(|status| status.id == ID)
        });
        self.server.as_ref().unwrap().devices().into_iter().find(|status| status.id == ID).unwrap()
    }

    pub(crate) fn record(&self) -> std::path::PathBuf {
        let dir: &Path = self.dir.path();
        dir.join(format!("vbd-{DOMID}-{DEVID}.inflight"))
    }

    /// A key of the device's back-end directory.
    pub(crate) fn back(&self, key: &str) -> Option<String> {
        self.hypervisor.store.get(&format!("{}/{key}", frontend::back(ID)))
    }

    pub(crate) fn wait_back(&self, key: &str, value: &str) {
        let path = format!("{}/{key}", frontend::back(ID));
        assert_eq!(self.hypervisor.store.wait_for(&path, value).as_deref(), Some(value), "{path}");
    }
}
