//! What the embedding program says: settings, and which disk a device of the toolstack gets.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vbd_core::Disk;

/// Bounds on what front-ends may use, and times.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most queues of a device (`multi-queue-max-queues`); at least 1.
    pub queues: u16,
    /// A ring has at most 2 to this many pages (`max-ring-page-order`); at most 4.
    pub ring_page_order: u8,
    /// Most segments in an indirect request (`feature-max-indirect-segments`); 0 offers none, at most 4096.
    pub indirect_segments: u16,
    /// Most pages of a queue that stay mapped between requests; 0 offers no persistent grants.
    pub persistent_grants: u32,
    /// How long a device that closes may take to finish what it has taken; after that what waits for a policy fails.
    pub drain: Duration,
    /// Directory for the records of requests in flight, one small file a device, best in memory (`/run`). With it, a
    /// server that was killed finds its devices again, and the domains see a pause. Without it they lose their disk.
    pub records: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            queues: 4,
            ring_page_order: 4,
            indirect_segments: 256,
            persistent_grants: 1056,
            drain: Duration::from_secs(10),
            records: None,
        }
    }
}

/// Which back-end directory of xenstore a device is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackendKind {
    /// `backend/vbd`: `backendtype=phy`, with a block script.
    Vbd,
    /// `backend/qdisk`: what xl writes for files, served by a device model otherwise.
    Qdisk,
}

impl BackendKind {
    /// The directory's name.
    pub fn name(self) -> &'static str {
        match self {
            BackendKind::Vbd => "vbd",
            BackendKind::Qdisk => "qdisk",
        }
    }
}

/// Names a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId {
    /// Its back-end directory.
    pub kind: BackendKind,
    /// The domain that has it.
    pub domid: u16,
    /// Its number within the domain (51712 is xvda).
    pub devid: u32,
}

impl fmt::Display for DeviceId {
    /// The directory in xenstore, without its beginning: `vbd/1/51712`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind.name(), self.domid, self.devid)
    }
}

/// How the domain may use the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// `r`
    ReadOnly,
    /// `w`
    Write,
    /// `w!`: although others may be writing.
    WriteForced,
}

/// What the toolstack wrote about a device: checked for shape, not to be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRequest {
    /// Its name.
    pub id: DeviceId,
    /// The name in the domain (`dev`): `xvda`; empty where none was written.
    pub vdev: String,
    /// UUID of the domain (`/vm/UUID`), where it could be found: the same before and after a migration.
    pub vm: Option<String>,
    /// The domain's name, where it could be found.
    pub domain: Option<String>,
    /// What to serve, as written: `/path`, `aio:/path`, `raw:/path`.
    pub params: String,
    /// The block script, as written.
    pub script: Option<String>,
    /// How.
    pub mode: Mode,
    /// Shown as a CD-ROM.
    pub cdrom: bool,
    /// Shown as removable.
    pub removable: bool,
    /// Whether to offer discard (`discard-enable`), where that was said.
    pub discard: Option<bool>,
    /// The storage needs no page after its answer, even over a network (`direct-io-safe`).
    pub direct_io_safe: bool,
}

/// A disk for a device.
pub struct Provided {
    /// The disk. It is opened, and its lease taken, when the device connects.
    pub disk: Arc<dyn Disk>,
    /// Refuse writes, whatever the disk can do.
    pub read_only: bool,
    /// For status displays.
    pub serial: Option<String>,
    /// Storage may read and write the domain's own pages: right where it is local, or
    /// [`direct_io_safe`](DeviceRequest::direct_io_safe). Else data is copied to and from pages of this process.
    pub direct: bool,
}

/// Finds disks for devices.
pub trait Provider: Send + Sync {
    /// The disk for a device that the toolstack has made; none if the device is not for this server, which then leaves
    /// it alone. Called once for each device, on a thread that may block. Does not open the disk: that happens when the
    /// device connects, on a thread of its own, and may take minutes.
    ///
    /// # Errors
    /// A text for people, written to the device's `hotplug-error`; the device is not connected.
    fn open(&self, device: &DeviceRequest) -> Result<Option<Provided>, String>;

    /// The device is gone, and holds no session any more. If its disk is just being opened, that should end now.
    fn closed(&self, id: &DeviceId);
}
