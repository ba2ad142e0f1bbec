//! The control socket: HTTP/JSON on a unix socket, the one way into a process that serves disks.
//!
//! `docs/control.md` describes it for those who write clients. Everything here is data; [`server`] answers, [`client`]
//! asks, and [`find`] finds the processes that there are.

pub mod client;
pub mod find;
mod jobs;
pub mod server;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, Serializer};

use crate::config::Ublk;

pub use client::Client;
pub use jobs::{BitmapChange, BitmapInfo, JobInfo, JobState, NewBackup, Upkeep};
pub use server::ControlSocket;

/// A serving process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Its number.
    pub pid: u32,
    /// The version of vbd.
    pub version: String,
    /// When it started to serve, in seconds since 1970.
    pub since: u64,
    /// Reactor threads.
    pub reactors: usize,
    /// Disks served now.
    pub disks: usize,
}

/// A disk that is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// Its name.
    pub name: String,
    /// Its file or block device. What is not UTF-8 in it is replaced on the way: JSON cannot carry it.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// The format of the file.
    pub format: String,
    /// Its capacity in bytes; none where the file cannot be looked at.
    pub size: Option<u64>,
    /// The smallest unit that a guest addresses, in bytes.
    pub block_size: Option<u32>,
    /// Whether guests can only read it.
    pub read_only: bool,
    /// `none`, `writeback` or `writethrough`.
    pub cache: String,
    /// Where guests reach it.
    pub front_ends: Vec<FrontEndInfo>,
    /// Why the file cannot be looked at, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

impl DiskInfo {
    /// How many guests and clients use the disk now.
    pub fn clients(&self) -> usize {
        self.front_ends.iter().map(|front_end| front_end.clients).sum()
    }
}

/// A way to a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontEndInfo {
    /// `vhost-user`, `nbd`, `xen` or `ublk`.
    pub kind: String,
    /// A socket's path, `unix:PATH`, `HOST:PORT`, `DOMAIN,DEVICE`, or a block device.
    pub address: String,
    /// The NBD export's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<String>,
    /// How many guests or clients use it now.
    pub clients: usize,
    /// What went wrong last, and has not gone right since: a guest that cannot have the lease, for example.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A device of a Xen domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct XenDevice {
    /// The domain's name, where known.
    pub domain: Option<String>,
    /// The domain's number.
    pub domid: u16,
    /// The domain's name for the device, or its number: `xvda`.
    pub device: String,
    /// Its directory below `backend` in xenstore: `vbd/1/51712`.
    pub backend: String,
    /// The toolstack's UUID of the domain, where known.
    pub vm: Option<String>,
    /// The name of its disk; empty where it has none.
    pub disk: String,
    /// What is to be served, as the toolstack wrote it.
    pub params: String,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether requests are served.
    pub connected: bool,
    /// The state of this end.
    pub state: String,
    /// The state of the domain's end.
    pub frontend: String,
    /// The layout of the ring; empty while not connected.
    pub abi: String,
    /// Features in use, by their names in xenstore.
    pub features: Vec<String>,
    /// Queues in use.
    pub queues: u16,
    /// Pages of each queue's ring.
    pub ring_pages: u32,
    /// Pages of the domain that are mapped now.
    pub grants_mapped: u64,
    /// Those of them that stay mapped between requests.
    pub grants_persistent: u64,
    /// Requests answered since it connected.
    pub requests: u64,
    /// Those answered with an error.
    pub errors: u64,
    /// Requests taken and not yet answered.
    pub in_flight: u64,
    /// Why it is not connected, where it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A disk and what its queues have counted since it was attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStat {
    /// The disk.
    #[serde(flatten)]
    pub disk: DiskInfo,
    /// One entry a queue that has been used.
    pub queues: Vec<QueueStat>,
}

/// What one queue has counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStat {
    /// Front-end and number, such as `vhost-user/0`.
    pub queue: String,
    /// One entry an operation.
    pub operations: Vec<OperationStat>,
}

/// Counts of one operation since the disk was attached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationStat {
    /// `read`, `write`, `flush`, `discard` or `zeroes`.
    pub operation: String,
    /// Requests that have been answered.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those answered with an error.
    pub errors: u64,
    /// Nanoseconds that all of them together waited before the storage was asked.
    pub queue_ns: u64,
    /// Nanoseconds that all of them together spent in the storage.
    pub service_ns: u64,
    /// Nanoseconds that the slowest of them took, both included.
    pub longest_ns: u64,
}

impl OperationStat {
    /// The mean time of one request in nanoseconds, waiting included.
    pub fn mean_ns(&self) -> u64 {
        self.queue_ns.saturating_add(self.service_ns).checked_div(self.count).unwrap_or(0)
    }

    /// Adds the counts of another queue.
    pub fn add(&mut self, other: &OperationStat) {
        self.count += other.count;
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.queue_ns = self.queue_ns.saturating_add(other.queue_ns);
        self.service_ns = self.service_ns.saturating_add(other.service_ns);
        self.longest_ns = self.longest_ns.max(other.longest_ns);
    }
}

impl DiskStat {
    /// The counts of all queues together, one entry an operation.
    pub fn total(&self) -> Vec<OperationStat> {
        let mut total: Vec<OperationStat> = Vec::new();
        for operation in self.queues.iter().flat_map(|queue| &queue.operations) {
            match total.iter_mut().find(|sum| sum.operation == operation.operation) {
                Some(sum) => sum.add(operation),
                None => total.push(operation.clone()),
            }
        }
        total
    }
}

/// How large a disk is to become. It never becomes smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Grow {
    /// This many bytes.
    To(u64),
    /// This many bytes more.
    By(u64),
}

impl Grow {
    /// The new size in bytes of what has `size` bytes now; none beyond what a file can have.
    pub fn of(self, size: u64) -> Option<u64> {
        let new = match self {
            Grow::To(new) => new,
            Grow::By(more) => size.checked_add(more)?,
        };
        i64::try_from(new).is_ok().then_some(new)
    }
}

/// What growing did. Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grown {
    /// The size before.
    pub before: u64,
    /// The size from now on.
    pub size: u64,
}

/// A snapshot that is kept inside an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Its number in the image.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was made, in seconds since 1970.
    pub date: u64,
    /// The disk's size then, in bytes.
    pub size: u64,
    /// The bytes of a machine's state in it; 0 for one of the disk alone.
    pub state: u64,
}

impl From<vbd_core::Snapshot> for SnapshotInfo {
    fn from(snapshot: vbd_core::Snapshot) -> Self {
        let date = snapshot.date.duration_since(std::time::UNIX_EPOCH);
        SnapshotInfo {
            id: snapshot.id,
            name: snapshot.name,
            date: date.map_or(0, |since| since.as_secs()),
            size: snapshot.size,
            state: snapshot.state,
        }
    }
}

/// Which snapshot: the name of a new one; the number or name of one that there is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotName {
    /// That.
    pub snapshot: String,
}

/// How a disk is taken away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Detach {
    /// Even while guests use it.
    #[serde(default)]
    pub force: bool,
}

/// A disk to serve from now on. What is left out is as in a configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewDisk {
    /// The file or block device: an absolute path.
    pub path: PathBuf,
    /// Its name; the file's if left out.
    pub name: Option<String>,
    /// `raw`, `qcow2` or another format's name.
    pub format: Option<String>,
    /// Directories, besides its own, where the image may name files: absolute paths.
    #[serde(default)]
    pub allow_dirs: Vec<PathBuf>,
    /// The file with the key of an encrypted image: an absolute path.
    pub key_file: Option<PathBuf>,
    /// `r`, `w` or `w!`.
    pub access: Option<String>,
    /// `none`, `writeback` or `writethrough`.
    pub cache: Option<String>,
    /// Queues offered.
    pub queues: Option<u16>,
    /// The serial number that the guest reads.
    pub serial: Option<String>,
    /// Whether the guest is offered discard.
    pub discard: Option<bool>,
    /// The path of a vhost-user socket to make.
    pub vhost_user: Option<PathBuf>,
    /// The name of an export on the process's NBD servers.
    pub nbd: Option<String>,
    /// The block device of the host itself: `true` for any, or its number.
    #[serde(default, deserialize_with = "Ublk::read")]
    pub ublk: Option<Ublk>,
}
