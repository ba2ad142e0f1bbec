//! Connecting a device: opening its disk, mapping its rings, starting its queues. Runs on a thread of its own, which
//! may block.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use vbd_core::{Capabilities, Disk, Geometry, Session};
use vbd_ring::Handle;

use crate::intake::{Core, Limits};
use crate::keys::Offer;
use crate::memory::{Arena, Chunks, Memory, Pages, Persistent};
use crate::options::DeviceId;
use crate::placement::Policy;
use crate::queue::{Numbers, Remote, Setup};
use crate::record::{Log, Record};
use crate::ring::Ring;
use crate::sys::Platform;

/// Own pages of a queue, of which those are used that were needed at some time.
const ARENA: usize = 1024;

/// What to connect.
pub(crate) struct Plan {
    pub(crate) id: DeviceId,
    pub(crate) offer: Offer,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) read_only: bool,
    /// Offer discard, where the disk can.
    pub(crate) discard: bool,
    pub(crate) policy: Policy,
    pub(crate) indirect: u16,
    pub(crate) most_persistent: usize,
    pub(crate) platform: Platform,
    pub(crate) reactors: Vec<Handle>,
    /// The first of them to use.
    pub(crate) first_reactor: usize,
    pub(crate) record: Option<PathBuf>,
    /// Names the connection, in xenstore and in the record.
    pub(crate) name: u64,
    /// Another server was connected under this name.
    pub(crate) successor: Succession,
    /// Called when the front-end breaks the rules.
    pub(crate) broken: Arc<dyn Fn(String) + Send + Sync>,
}

/// Whether there may be requests in the rings that somebody else took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Succession {
    /// The front-end has just made them.
    Fresh,
    /// There may, and the record says which.
    Recorded,
    /// There may, and there is no record: only empty rings can be taken over.
    Unrecorded,
}

/// A connected device.
pub(crate) struct Connection {
    pub(crate) geometry: Geometry,
    pub(crate) capabilities: Capabilities,
    pub(crate) offer: Offer,
    pub(crate) pages: Arc<Pages>,
    pub(crate) numbers: Vec<Arc<Numbers>>,
    pub(crate) session: Option<Arc<dyn Session>>,
    /// For the last flush.
    reactor: Handle,
    queues: Vec<Remote>,
    policy: Policy,
    record: Arc<Record>,
}

/// Why a device is not connected.
#[derive(Debug)]
pub(crate) struct Failure {
    /// For people.
    pub(crate) problem: String,
    /// It may be otherwise soon: somebody else holds the disk.
    pub(crate) try_again: bool,
}

impl From<String> for Failure {
    fn from(problem: String) -> Failure {
        Failure { problem, try_again: false }
    }
}

impl Plan {
    /// Opens and maps everything. No request is taken before [`Connection::go`].
    ///
    /// # Errors
    /// What is in the way, for people.
    pub(crate) fn connect(self) -> Result<Connection, Failure> {
        let busy = |error: vbd_core::Error| Failure { problem: error.to_string(), try_again: true };
        let session = self.disk.open().map_err(busy)?;
        let (geometry, capabilities) = (session.geometry(), session.capabilities());
        let entries = self.offer.abi.entries(self.offer.pages());
        let count = u32::try_from(self.offer.queues.len()).unwrap_or(0);
        let record = self.record(count, entries)?;
        if !session.keeps_unflushed() {
            if self.successor == Succession::Recorded && record.is_lost() {
                return Err("the server before this one was killed, and writes that it had not flushed to this image are \
                            lost; the domain must be restarted"
                    .to_owned()
                    .into());
            }
            record.set_unflushed(true);
        }
        let mut connection = Connection {
            geometry,
            capabilities,
            offer: self.offer.clone(),
            pages: Arc::default(),
            numbers: Vec::new(),
            session: Some(session.clone()),
            reactor: self.reactors[self.first_reactor % self.reactors.len()].clone(),
            queues: Vec::new(),
            policy: self.policy,
            record,
        };
        for number in 0..self.offer.queues.len() {
            match self.queue(&connection, number, &session) {
                Ok((remote, numbers)) => {
                    connection.queues.push(remote);
                    connection.numbers.push(numbers);
                }
                Err(error) => {
                    // Nothing was taken: a record that was there before is as good as it was.
                    connection.end(true, Duration::from_secs(1));
                    return Err(error.into());
                }
            }
        }
        connection.record.complete();
        Ok(connection)
    }

    fn record(&self, queues: u32, entries: u32) -> Result<Arc<Record>, String> {
        match (self.successor, &self.record) {
            (Succession::Recorded, Some(path)) => {
                Record::open(path, self.name, queues, entries).map_err(|error| {
                    format!("cannot go on where another server has stopped: {}: {error}", path.display())
                })
            }
            (_, path) => Record::create(path.as_deref(), self.name, queues, entries).map_err(|error| {
                let place = path.as_ref().map_or_else(|| "memory".into(), |path| path.display().to_string());
                format!("cannot make a record of requests in flight: {place}: {error}")
            }),
        }
    }

    fn queue(
        &self,
        connection: &Connection,
        number: usize,
        session: &Arc<dyn Session>,
    ) -> Result<(Remote, Arc<Numbers>), String> {
        let keys = &self.offer.queues[number];
        let domid = self.id.domid;
        let grants =
            self.platform.grants.open(domid).map_err(|error| format!("no way to granted pages: {error}"))?;
        let needed = usize::from(self.indirect).next_power_of_two().max(ARENA);
        let arena = Arena::new(needed).map_err(|error| format!("no memory: {error}"))?;
        let memory = Memory::new(grants, arena, connection.pages.clone());
        let mapping = memory.map(&keys.references, true).map_err(|error| {
            format!("cannot map the domain's ring (grants {:?}): {error}", keys.references)
        })?;
        let event = self
            .platform
            .events
            .bind(domid, keys.port)
            .map_err(|error| format!("cannot bind the domain's event channel {}: {error}", keys.port))?;
        if let Err(error) = memory.grants.notify_on_unmap(&mapping, event.port()) {
            tracing::debug!("{}: the domain will not be notified should this process die: {error}", self.id);
        }

        let log = Log::new(connection.record.clone(), u32::try_from(number).unwrap_or(0));
        // SAFETY: mapped in `memory`, which the core holds as long as the ring.
        let mut ring = unsafe { Ring::new(mapping.start, mapping.pages, self.offer.abi, None) };
        let mut again = Vec::new();
        match self.successor {
            Succession::Recorded => {
                let (consumed, entries) = log.recover(ring.published())?;
                // SAFETY: as above.
                ring = unsafe { Ring::new(mapping.start, mapping.pages, self.offer.abi, Some(consumed)) };
                again = entries;
            }
            Succession::Unrecorded if !ring.is_empty() => {
                return Err("another server has left requests in flight, and no record of which; \
                            the domain must close the device, or be restarted"
                    .into());
            }
            Succession::Unrecorded | Succession::Fresh => log.start(ring.consumed()),
        }

        let read_only = self.read_only || connection.capabilities.read_only;
        let limits = Limits {
            indirect: self.indirect,
            read_only,
            discard: self.discard && connection.capabilities.discard && !read_only,
            most_discard: connection.geometry.max_discard.max(vbd_core::SECTOR) / vbd_core::SECTOR
                * vbd_core::SECTOR,
            durable: !connection.capabilities.write_cache,
            policy: self.policy,
        };
        let persistent = Persistent::new(self.most_persistent, random(), connection.pages.clone());
        let core = Core::new(ring, limits, memory, Chunks::new(needed), persistent, log, again);
        let numbers = Arc::<Numbers>::default();
        let broken = self.broken.clone();
        let setup = Setup {
            label: format!("{}: queue {number}", self.id),
            core,
            event,
            session: session.clone(),
            counters: self.disk.statistics().queue(&format!("xen/{}/{}/{number}", domid, self.id.devid)),
            numbers: numbers.clone(),
            broken: Box::new(move |reason| broken(format!("queue {number}: {reason}"))),
        };
        let reactor = &self.reactors[(self.first_reactor + number) % self.reactors.len()];
        Ok((Remote::start(reactor, setup)?, numbers))
    }
}

impl Connection {
    /// Features in use, by their names in xenstore.
    pub(crate) fn features(&self) -> Vec<&'static str> {
        let used = [
            (self.policy.persistent, "feature-persistent"),
            (self.capabilities.write_cache, "feature-flush-cache"),
            (self.capabilities.discard, "feature-discard"),
            (self.offer.queues.len() > 1, "multi-queue"),
            (self.offer.pages() > 1, "ring-page-order"),
        ];
        used.into_iter().filter(|(used, _)| *used).map(|(_, name)| name).collect()
    }

    /// Takes requests from now on.
    pub(crate) fn go(&self) {
        self.queues.iter().for_each(Remote::go);
    }

    /// Finishes what was taken, and gives everything back: the rings, the pages, the session. With `keep`, the record
    /// stays for a successor. What waits for a policy is given up after `within`, and what then still is in the kernel
    /// keeps its memory by itself.
    pub(crate) fn end(mut self, keep: bool, within: Duration) {
        let (sender, receiver) = sync_channel(self.queues.len().max(1));
        self.queues.iter().for_each(|queue| queue.stop(keep, sender.clone()));
        drop(sender);
        let mut left = self.queues.len();
        let mut wait = |until: Instant| {
            while left > 0 && receiver.recv_timeout(until.saturating_duration_since(Instant::now())).is_ok() {
                left -= 1;
            }
            left == 0
        };
        let start = Instant::now();
        if !wait(start + within) {
            self.queues.iter().for_each(Remote::cancel_waiting);
            if !wait(Instant::now() + within.max(Duration::from_secs(1))) {
                tracing::error!(
                    "the storage holds requests for longer than {within:?}; the device closes without them"
                );
            }
        }
        if let Some(session) = self.session.take().filter(|session| keep && !session.keeps_unflushed()) {
            match vbd_core::flush(&self.reactor, &session, within.max(Duration::from_secs(1))) {
                Ok(()) => self.record.set_unflushed(false),
                Err(reason) => tracing::error!("the last flush failed: {reason}"),
            }
        }
        if !keep {
            self.record.remove();
        }
    }
}

/// A number that nobody can guess.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
