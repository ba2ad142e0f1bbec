//! The control thread: looks at devices when xenstore or a job says that something has changed, and does what
//! [`decide`] says. What may block is a job on a thread of its own, so that no device waits for another.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use vbd_ring::Handle;

use crate::connect::{Connection, Failure, Plan, Succession, random};
use crate::device::{Action, Phase, View, decide};
use crate::jobs::{Jobs, Purpose};
use crate::keys::{self, Offer, Written};
use crate::mail::{Leaving, Mail, Message};
use crate::memory::Pages;
use crate::options::{BackendKind, DeviceId, Options, Provided, Provider};
use crate::placement::Policy;
use crate::server::{Shelf, Shown};
use crate::status::{DeviceStatus, State};
use crate::sys::{Platform, Store};
use crate::tell;

/// The longest ring has 2 to this many pages.
pub(crate) const MOST_ORDER: u8 = 4;
/// After a disk could not be opened, or xenstore was lost, the next attempt.
const RETRY: Duration = Duration::from_secs(1);
/// A front-end that connects more often than this has to wait ...
const CALM: Duration = Duration::from_secs(5);
/// ... so long, twice as long each time.
const FIRST_DELAY: Duration = Duration::from_millis(20);

struct Device {
    written: Option<Written>,
    provided: Option<Provided>,
    phase: Phase,
    frontend: State,
    own: State,
    problem: Option<String>,
    connection: Option<Box<Connection>>,
    /// What it is connected with, or is about to.
    offer: Option<Offer>,
    succession: Succession,
    /// Names its connection.
    name: u64,
    /// This end has written a state, so that "initialising" can only be another device's.
    spoke: bool,
    /// Its directory is gone: forget it as soon as nothing is under way.
    gone: bool,
    told_closed: bool,
    watch: Option<Arc<dyn Send + Sync>>,
    connect_after: Option<Instant>,
    connected_at: Option<Instant>,
    delay: Duration,
}

impl Device {
    fn new() -> Device {
        Device {
            written: None,
            provided: None,
            phase: Phase::Unwritten,
            frontend: State::Unknown,
            own: State::Unknown,
            problem: None,
            connection: None,
            offer: None,
            succession: Succession::Fresh,
            name: 0,
            spoke: false,
            gone: false,
            told_closed: false,
            watch: None,
            connect_after: None,
            connected_at: None,
            delay: Duration::ZERO,
        }
    }

    fn is_busy(&self) -> bool {
        matches!(self.phase, Phase::Providing | Phase::Connecting | Phase::Ending)
    }
}

pub(crate) struct Control {
    platform: Platform,
    kinds: Vec<BackendKind>,
    reactors: Vec<Handle>,
    options: Options,
    provider: Arc<dyn Provider>,
    mail: Arc<Mail>,
    jobs: Jobs,
    shelf: Shelf,
    store: Option<Box<dyn Store>>,
    /// `/local/domain/N/backend`
    root: String,
    retry_store: Option<Instant>,
    devices: BTreeMap<DeviceId, Device>,
    next_reactor: usize,
    leaving: Option<(Leaving, Instant)>,
}

/// The own domain's directory in xenstore.
fn home(store: &mut dyn Store) -> String {
    // A domain's own number is in its own directory; xenstored's socket knows no own directory, and is in domain 0.
    let number = store.read("domid").ok().flatten();
    let number = number.and_then(|number| keys::number(&number, 0, 0x7fef)).unwrap_or(0);
    format!("/local/domain/{number}")
}

impl Control {
    pub(crate) fn new(
        platform: Platform,
        kinds: &[BackendKind],
        reactors: Vec<Handle>,
        mut options: Options,
        provider: Arc<dyn Provider>,
        mail: Arc<Mail>,
        shelf: Shelf,
    ) -> Control {
        options.queues = options.queues.max(1);
        options.ring_page_order = options.ring_page_order.min(MOST_ORDER);
        options.indirect_segments = options.indirect_segments.min(crate::abi::MOST_INDIRECT);
        let jobs = Jobs::new(platform.threads.clone(), mail.clone());
        Control {
            platform,
            kinds: kinds.to_vec(),
            reactors,
            options,
            provider,
            mail,
            jobs,
            shelf,
            store: None,
            root: String::new(),
            retry_store: None,
            devices: BTreeMap::new(),
            next_reactor: 0,
            leaving: None,
        }
    }

    /// Connects to xenstore and watches.
    pub(crate) fn connect_store(&mut self) -> io::Result<()> {
        let mut store = self.platform.stores.connect()?;
        self.root = format!("{}/backend", home(&mut *store));
        for kind in &self.kinds {
            store.watch(&format!("{}/{}", self.root, kind.name()), kind.name())?;
        }
        for (id, device) in &self.devices {
            if let Some(written) = &device.written {
                store.watch(&format!("{}/state", written.frontend), &id.to_string())?;
            }
        }
        self.store = Some(store);
        self.retry_store = None;
        Ok(())
    }

    pub(crate) fn run(&mut self) {
        loop {
            for message in self.mail.take() {
                self.handle(message);
            }
            let due = self.due();
            let mut ids = self.events();
            ids.extend(due);
            for id in &ids {
                self.look(*id);
            }
            if self.may_end() {
                return;
            }
            // To look is to ask xenstore, and with its answers come events, which the descriptor then tells of no more:
            // only when there was nothing to look at are there none.
            if ids.is_empty() {
                self.sleep();
            }
        }
    }

    /// The devices that have something to do now because of the time.
    fn due(&mut self) -> Vec<DeviceId> {
        let now = Instant::now();
        if self.retry_store.is_some_and(|at| at <= now)
            && let Err(error) = self.connect_store()
        {
            tracing::debug!("xenstore does not answer yet: {error}");
            self.retry_store = Some(now + RETRY);
        }
        let mut ids = self.jobs.retry(now);
        for (id, device) in &mut self.devices {
            if device.connect_after.is_some_and(|at| at <= now) {
                device.connect_after = None;
                ids.push(*id);
            }
        }
        ids
    }

    fn sleep(&mut self) {
        let times = self.devices.values().filter_map(|device| device.connect_after);
        let leaving = self.leaving.map(|(_, until)| until.max(Instant::now() + Duration::from_millis(20)));
        let next = times.chain(self.retry_store).chain(self.jobs.next()).chain(leaving).min();
        let timeout = next.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|timeout| rustix::event::Timespec::try_from(timeout).ok());
        let mut fds = vec![rustix::event::PollFd::new(&*self.mail, rustix::event::PollFlags::IN)];
        if let Some(store) = &self.store {
            fds.push(rustix::event::PollFd::from_borrowed_fd(
                store.descriptor(),
                rustix::event::PollFlags::IN,
            ));
        }
        // An interruption is a reason to look around, no more.
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
    }

    /// Xenstore is gone: devices go on as they are until it is back.
    fn lost(&mut self, error: &io::Error) {
        if self.store.take().is_some() {
            tracing::error!("xenstore is lost, trying again: {error}");
        }
        self.retry_store = Some(Instant::now() + RETRY);
    }

    /// The devices that xenstore has news of.
    fn events(&mut self) -> BTreeSet<DeviceId> {
        let mut ids = BTreeSet::new();
        loop {
            let Some(store) = &mut self.store else { return ids };
            match store.event() {
                Ok(Some(event)) => {
                    let kind = self.kinds.iter().copied().find(|kind| kind.name() == event.token);
                    match kind {
                        Some(kind) => match keys::device_in(&event.path, &self.root, kind.name()) {
                            Some((domid, devid)) => {
                                ids.insert(DeviceId { kind, domid, devid });
                            }
                            // The whole, or a domain's part of it.
                            None => ids.extend(self.scan(kind)),
                        },
                        None => {
                            ids.extend(self.devices.keys().find(|id| id.to_string() == event.token));
                        }
                    }
                }
                Ok(None) => return ids,
                Err(error) => {
                    self.lost(&error);
                    return ids;
                }
            }
        }
    }

    /// Every device in a back-end directory, and every one that was there.
    fn scan(&mut self, kind: BackendKind) -> Vec<DeviceId> {
        let mut ids: Vec<_> = self.devices.keys().copied().filter(|id| id.kind == kind).collect();
        let Some(store) = &mut self.store else { return ids };
        let root = format!("{}/{}", self.root, kind.name());
        let mut list = || -> io::Result<()> {
            for domain in store.list(&root)?.unwrap_or_default() {
                for device in store.list(&format!("{root}/{domain}"))?.unwrap_or_default() {
                    let path = format!("{root}/{domain}/{device}");
                    if let Some((domid, devid)) = keys::device_in(&path, &self.root, kind.name()) {
                        ids.push(DeviceId { kind, domid, devid });
                    }
                }
            }
            Ok(())
        };
        if let Err(error) = list() {
            self.lost(&error);
        }
        ids
    }

    fn look(&mut self, id: DeviceId) {
        if self.store.is_none() {
            return;
        }
        if let Err(error) = self.try_look(id) {
            self.lost(&error);
        }
        self.show(id);
    }

    fn try_look(&mut self, id: DeviceId) -> io::Result<()> {
        let Some(store) = &mut self.store else { return Ok(()) };
        let base = format!("{}/{id}", self.root);
        let there = store.read(&format!("{base}/frontend"))?.is_some();
        if !there {
            return self.is_gone(id);
        }
        let device = self.devices.entry(id).or_insert_with(Device::new);
        if device.gone {
            // Made anew while the old one's end is under way: looked at again when that is done.
            return Ok(());
        }
        if device.phase == Phase::Unwritten {
            let Some(written) = keys::written(&mut **store, &base, id)? else { return Ok(()) };
            match written {
                Ok(written) => self.provide(id, written),
                Err(problem) => {
                    (device.phase, device.spoke) = (Phase::Refused, true);
                    device.problem = Some(problem.clone());
                    tell::refused(&mut **store, &base, &problem)?;
                }
            }
            return Ok(());
        }
        let state = |value: Option<Vec<u8>>| value.map_or(State::Unknown, |value| State::parse(&value));
        device.own = state(store.read(&format!("{base}/state"))?);
        let Some(written) = &device.written else { return Ok(()) };
        // Removed and made again before anybody looked.
        let other = match device.phase {
            Phase::Ignored => {
                keys::written(&mut **store, &base, id)?.is_some_and(|now| now.as_ref() != Ok(written))
            }
            _ => device.spoke && device.own == State::Initialising,
        };
        if other {
            return self.is_gone(id);
        }
        device.frontend = state(store.read(&format!("{}/state", written.frontend))?);
        if device.is_busy() || matches!(device.phase, Phase::Ignored) {
            return Ok(());
        }
        let online = store.read(&format!("{base}/online"))?.is_none_or(|value| value == b"1");
        let mut renewed = false;
        if device.phase == Phase::Connected && device.frontend == State::Initialised {
            renewed = self.offer(id)?.ok() != self.devices.get(&id).and_then(|device| device.offer.clone());
        }
        let Some(device) = self.devices.get_mut(&id) else { return Ok(()) };
        let view = View { phase: device.phase, frontend: device.frontend, own: device.own, online, renewed };
        self.act(id, decide(view))
    }

    fn act(&mut self, id: DeviceId, action: Action) -> io::Result<()> {
        let base = format!("{}/{id}", self.root);
        let (Some(store), Some(device)) = (&mut self.store, self.devices.get_mut(&id)) else { return Ok(()) };
        if action != Action::Nothing {
            tracing::debug!("{id}: {action:?} with the domain's end {}", device.frontend);
        }
        match action {
            Action::Nothing => {}
            Action::Say(state) => {
                (device.own, device.spoke) = (state, true);
                tell::state(&mut **store, &base, state)?;
            }
            Action::Wait if self.leaving.is_some() => {}
            Action::Wait => {
                (device.phase, device.own, device.spoke) = (Phase::Waiting, State::InitWait, true);
                device.succession = Succession::Fresh;
                let direct = device.provided.as_ref().is_some_and(|provided| provided.direct);
                tell::waiting(&mut **store, &base, &self.options, direct)?;
            }
            Action::Connect if self.leaving.is_some() => {}
            Action::Connect => self.connect(id)?,
            Action::End => self.end(id, false),
        }
        Ok(())
    }

    /// Asks the provider for the disk of a new device.
    fn provide(&mut self, id: DeviceId, written: Written) {
        let request = written.request.clone();
        if let Some(device) = self.devices.get_mut(&id) {
            (device.phase, device.written) = (Phase::Providing, Some(written));
        }
        let provider = self.provider.clone();
        self.jobs.start(id, Purpose::Open, move || Message::Provided(id, provider.open(&request)));
    }

    fn provided(&mut self, id: DeviceId, result: Result<Option<Provided>, String>) -> io::Result<()> {
        let (Some(store), Some(device)) = (&mut self.store, self.devices.get_mut(&id)) else { return Ok(()) };
        let base = format!("{}/{id}", self.root);
        // Removed, or made again as another, while the provider was asked.
        let now = keys::written(&mut **store, &base, id)?;
        let same = matches!((&now, &device.written), (Some(Ok(now)), Some(before)) if now == before);
        if !same {
            device.phase = Phase::Closed;
            device.provided = result.ok().flatten();
            return self.is_gone(id);
        }
        match result {
            Ok(None) => device.phase = Phase::Ignored,
            Err(problem) => {
                tracing::error!("{id}: {problem}");
                device.phase = Phase::Refused;
                device.problem = Some(problem.clone());
                let state = store.read(&format!("{base}/state"))?;
                if state.is_some_and(|state| State::parse(&state) == State::Connected) {
                    // Its domain waits for answers: the next server may be able to give them.
                    tell::stranded(&mut **store, &base, &problem)?;
                } else {
                    device.spoke = true;
                    tell::refused(&mut **store, &base, &problem)?;
                }
            }
            Ok(Some(provided)) => {
                device.phase = Phase::Waiting;
                device.provided = Some(provided);
                let state = store.read(&format!("{base}/state"))?;
                let name = store.read(&format!("{base}/{}", tell::CONNECTION))?;
                let name =
                    name.and_then(|name| u64::from_str_radix(std::str::from_utf8(&name).ok()?, 16).ok());
                let connected = state.is_some_and(|state| State::parse(&state) == State::Connected);
                device.succession = match name {
                    Some(name) if connected => {
                        device.name = name;
                        Succession::Recorded
                    }
                    None if connected => Succession::Unrecorded,
                    _ => Succession::Fresh,
                };
                if device.succession == Succession::Fresh {
                    // Even where somebody has said so already: the kernel's back-end is quick, and offers other things.
                    let direct = device.provided.as_ref().is_some_and(|provided| provided.direct);
                    tell::offers(&mut **store, &base, &self.options, direct)?;
                }
                tell::ready(&mut **store, &base, id.kind)?;
            }
        }
        if device.phase != Phase::Ignored
            && let Some(written) = &device.written
        {
            store.watch(&format!("{}/state", written.frontend), &id.to_string())?;
        }
        self.try_look(id)
    }

    /// What the front-end has written.
    fn offer(&mut self, id: DeviceId) -> io::Result<Result<Offer, String>> {
        let base = format!("{}/{id}", self.root);
        let gone = || io::Error::other("the device is gone");
        let (Some(store), Some(device)) = (&mut self.store, self.devices.get(&id)) else {
            return Err(gone());
        };
        let written = device.written.as_ref().ok_or_else(gone)?;
        let told = tell::told(&mut **store, &base, &self.options)?;
        keys::offer(|key| store.read(&format!("{}/{key}", written.frontend)), told.bounds)
    }

    /// Begins to connect, unless the front-end does that too often.
    fn connect(&mut self, id: DeviceId) -> io::Result<()> {
        let base = format!("{}/{id}", self.root);
        let now = Instant::now();
        {
            let Some(device) = self.devices.get_mut(&id) else { return Ok(()) };
            if device.connect_after.is_some_and(|at| at > now) {
                return Ok(());
            }
            if let Some(before) = device.connected_at {
                if now > before + CALM {
                    device.delay = Duration::ZERO;
                } else if now < before + device.delay {
                    device.connect_after = Some(before + device.delay);
                    return Ok(());
                } else {
                    device.delay = (device.delay * 2).clamp(FIRST_DELAY, CALM);
                }
            }
            device.connected_at = Some(now);
        }
        let offer = match self.offer(id)? {
            Ok(offer) => offer,
            Err(problem) => return self.failed(id, problem),
        };
        let (Some(store), Some(device)) = (&mut self.store, self.devices.get_mut(&id)) else { return Ok(()) };
        let told = tell::told(&mut **store, &base, &self.options)?;
        let (Some(provided), Some(written)) = (&device.provided, &device.written) else { return Ok(()) };
        let request = &written.request;
        if device.succession != Succession::Recorded {
            device.name = random();
        }
        let name = device.name;
        let mail = self.mail.clone();
        let plan = Plan {
            id,
            offer: offer.clone(),
            disk: provided.disk.clone(),
            read_only: provided.read_only || request.mode == crate::Mode::ReadOnly,
            discard: request.discard.unwrap_or(true),
            policy: Policy { persistent: told.persistent && offer.persistent, direct: provided.direct },
            indirect: told.indirect,
            most_persistent: self.options.persistent_grants as usize,
            platform: self.platform.clone(),
            reactors: self.reactors.clone(),
            first_reactor: self.next_reactor,
            record: self
                .options
                .records
                .as_ref()
                .map(|dir| dir.join(format!("{}-{}-{}.inflight", id.kind.name(), id.domid, id.devid))),
            name,
            successor: device.succession,
            broken: Arc::new(move |problem| mail.send(Message::Broken(id, name, problem))),
        };
        (device.phase, device.offer) = (Phase::Connecting, Some(offer));
        self.next_reactor = self.next_reactor.wrapping_add(plan.offer.queues.len()) % self.reactors.len();
        self.jobs.start(id, Purpose::Connect, move || Message::Connected(id, plan.connect().map(Box::new)));
        Ok(())
    }

    fn connected(&mut self, id: DeviceId, result: Result<Box<Connection>, Failure>) -> io::Result<()> {
        let base = format!("{}/{id}", self.root);
        let (Some(store), Some(device)) = (&mut self.store, self.devices.get_mut(&id)) else { return Ok(()) };
        let connection = match result {
            Ok(connection) => connection,
            Err(failure) if failure.try_again && !device.gone => {
                device.phase = Phase::Waiting;
                device.connect_after = Some(Instant::now() + RETRY);
                if device.problem.as_ref() != Some(&failure.problem) {
                    tracing::error!("{id}: {} (trying again)", failure.problem);
                    device.problem = Some(failure.problem);
                }
                return self.try_look(id);
            }
            Err(failure) => return self.failed(id, failure.problem),
        };
        device.connection = Some(connection);
        device.phase = Phase::Connected;
        device.problem = None;
        if device.gone {
            self.end(id, false);
            return Ok(());
        }
        let (Some(connection), Some(provided), Some(written)) =
            (&device.connection, &device.provided, &device.written)
        else {
            return Ok(());
        };
        let mail = self.mail.clone();
        device.watch = Some(provided.disk.watch(Box::new(move |_| mail.send(Message::Resized(id)))));
        let mut request = written.request.clone();
        request.discard.get_or_insert(true);
        if provided.read_only {
            request.mode = crate::Mode::ReadOnly;
        }
        if device.succession == Succession::Fresh {
            let there = tell::connected(&mut **store, &base, &request, connection, device.name)?;
            if !there {
                return self.is_gone(id);
            }
            (device.own, device.spoke) = (State::Connected, true);
        }
        device.succession = Succession::Fresh;
        connection.go();
        tracing::info!("{id}: connected, {} queues", connection.numbers.len());
        self.try_look(id)
    }

    /// The device cannot go on; its domain is told to close it.
    fn failed(&mut self, id: DeviceId, problem: String) -> io::Result<()> {
        let base = format!("{}/{id}", self.root);
        let (Some(store), Some(device)) = (&mut self.store, self.devices.get_mut(&id)) else { return Ok(()) };
        tracing::error!("{id}: {problem}");
        device.phase = Phase::Closed;
        (device.own, device.spoke) = (State::Closing, true);
        device.problem = Some(problem.clone());
        device.succession = Succession::Fresh;
        tell::failed(&mut **store, &base, &problem)?;
        if device.gone {
            return self.is_gone(id);
        }
        Ok(())
    }

    /// Ends the connection of a device, on a thread of its own.
    fn end(&mut self, id: DeviceId, keep: bool) {
        let Some(device) = self.devices.get_mut(&id) else { return };
        device.watch = None;
        device.phase = Phase::Ending;
        let connection = device.connection.take();
        let drain = self.options.drain;
        self.jobs.start(id, Purpose::End, move || {
            if let Some(connection) = connection {
                connection.end(keep, drain);
            }
            Message::Ended(id)
        });
    }

    fn ended(&mut self, id: DeviceId) -> io::Result<()> {
        let Some(device) = self.devices.get_mut(&id) else { return Ok(()) };
        device.offer = None;
        device.phase = Phase::Closed;
        if device.gone {
            return self.is_gone(id);
        }
        match self.leaving {
            Some((Leaving::Keep, _)) => Ok(()),
            Some((Leaving::Close, _)) => self.act(id, Action::Say(State::Closed)),
            None => {
                // Whoever has other rings already need not be told to begin anew.
                if device.frontend == State::Initialised && device.problem.is_none() {
                    device.phase = Phase::Waiting;
                }
                self.try_look(id)
            }
        }
    }

    /// The directory of a device is gone: it ends, and is forgotten.
    fn is_gone(&mut self, id: DeviceId) -> io::Result<()> {
        let Some(device) = self.devices.get_mut(&id) else { return Ok(()) };
        device.gone = true;
        if device.phase == Phase::Connecting && !std::mem::replace(&mut device.told_closed, true) {
            // Opening may wait for something that will not come any more.
            self.provider.closed(&id);
        }
        if device.is_busy() {
            return Ok(());
        }
        if device.connection.is_some() {
            self.end(id, false);
            return Ok(());
        }
        let Some(device) = self.devices.remove(&id) else { return Ok(()) };
        if let (Some(store), Some(written)) = (&mut self.store, &device.written) {
            // It may never have been watched.
            let _ = store.unwatch(&format!("{}/state", written.frontend), &id.to_string());
        }
        let known = device.provided.is_some();
        drop(device.provided);
        if known {
            tracing::info!("{id}: closed");
        }
        if known && !device.told_closed {
            self.provider.closed(&id);
        }
        // It may have been made anew meanwhile.
        if self.leaving.is_none() {
            return self.look_again(id);
        }
        Ok(())
    }

    fn look_again(&mut self, id: DeviceId) -> io::Result<()> {
        let Some(store) = &mut self.store else { return Ok(()) };
        if store.read(&format!("{}/{id}/frontend", self.root))?.is_some() {
            self.try_look(id)?;
        }
        Ok(())
    }

    fn handle(&mut self, message: Message) {
        let (id, result) = match message {
            Message::Provided(id, result) => (id, self.provided(id, result)),
            Message::Connected(id, result) => (id, self.connected(id, result)),
            Message::Ended(id) => (id, self.ended(id)),
            Message::Broken(id, name, problem) => {
                let current = self.devices.get(&id);
                if current.is_none_or(|device| device.name != name || device.phase != Phase::Connected) {
                    return;
                }
                let result = self.failed(id, problem);
                self.end(id, false);
                (id, result)
            }
            Message::Resized(id) => (id, self.resized(id)),
            Message::Leave(leaving) => return self.leave(leaving),
        };
        if let Err(error) = result {
            self.lost(&error);
        }
        self.show(id);
    }

    fn resized(&mut self, id: DeviceId) -> io::Result<()> {
        let base = format!("{}/{id}", self.root);
        let (Some(store), Some(device)) = (&mut self.store, self.devices.get_mut(&id)) else { return Ok(()) };
        let Some(connection) = &mut device.connection else { return Ok(()) };
        if let Some(session) = &connection.session {
            connection.geometry = session.geometry();
        }
        tell::resized(&mut **store, &base, connection.geometry.size)
    }

    fn leave(&mut self, leaving: Leaving) {
        let leaving = if self.options.records.is_none() { Leaving::Close } else { leaving };
        self.leaving = Some((leaving, Instant::now() + self.options.drain));
        let ids: Vec<_> = self.devices.keys().copied().collect();
        for id in ids {
            let connected = self.devices.get(&id).is_some_and(|device| device.phase == Phase::Connected);
            match leaving {
                Leaving::Keep if connected => self.end(id, true),
                Leaving::Close if connected => {
                    if let Err(error) = self.act(id, Action::Say(State::Closing)) {
                        self.lost(&error);
                    }
                }
                _ => {}
            }
        }
    }

    /// Whether a server that was asked to end can.
    fn may_end(&mut self) -> bool {
        let Some((leaving, until)) = self.leaving else { return false };
        let late = Instant::now() >= until;
        let connected = self.devices.iter().filter(|(_, device)| device.phase == Phase::Connected);
        let ids: Vec<_> = connected.map(|(id, _)| *id).collect();
        for id in ids {
            // A device that has connected just now, or a domain that does not close.
            if leaving == Leaving::Keep || late {
                self.end(id, leaving == Leaving::Keep);
            }
        }
        if late {
            self.jobs.end_here();
        }
        let mut left = self.devices.values().filter(|device| match device.phase {
            Phase::Connected | Phase::Ending => true,
            Phase::Connecting => !late,
            _ => false,
        });
        left.next().is_none()
    }

    /// Tells others what a device is doing.
    fn show(&self, id: DeviceId) {
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(device) = self.devices.get(&id) else {
            shelf.remove(&id);
            return;
        };
        let (Some(written), false) = (&device.written, device.phase == Phase::Ignored) else {
            shelf.remove(&id);
            return;
        };
        let request = written.request.clone();
        let connection = device.connection.as_deref();
        let provided = device.provided.as_ref();
        let offer = connection.and(device.offer.as_ref());
        let status = DeviceStatus {
            id,
            vdev: request.vdev,
            vm: request.vm,
            domain: request.domain,
            params: request.params,
            disk: provided.map_or_else(String::new, |provided| provided.disk.name().to_owned()),
            serial: provided.and_then(|provided| provided.serial.clone()),
            read_only: request.mode == crate::Mode::ReadOnly
                || provided.is_some_and(|provided| provided.read_only),
            state: device.own,
            frontend: device.frontend,
            connected: connection.is_some() && device.frontend == State::Connected,
            problem: device.problem.clone().or_else(|| self.jobs.problem(&id).map(str::to_owned)),
            features: connection.map(Connection::features).unwrap_or_default(),
            abi: offer.map_or("", |offer| offer.abi.name()),
            queues: offer.map_or(0, |offer| u16::try_from(offer.queues.len()).unwrap_or(u16::MAX)),
            ring_pages: offer.map_or(0, |offer| u32::try_from(offer.pages()).unwrap_or(0)),
            grants_mapped: 0,
            grants_persistent: 0,
            requests: 0,
            errors: 0,
            in_flight: 0,
        };
        let pages = connection.map_or_else(Arc::<Pages>::default, |connection| connection.pages.clone());
        let numbers = connection.map_or_else(Vec::new, |connection| connection.numbers.clone());
        shelf.insert(id, Shown { status, pages, numbers });
    }
}
