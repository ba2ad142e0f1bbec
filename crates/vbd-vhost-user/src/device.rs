//! The device behind one connection: what each message of the front-end does.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use vbd_core::{Capabilities, Geometry, Session};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use crate::backchannel::Backchannel;
use crate::config::{self, Space, feature};
use crate::dirty::DirtyLog;
use crate::inflight::{self, Inflight, Tracker};
use crate::lost::Lost;
use crate::memory::{MOST_REGIONS, Mapping, Memory, Region};
use crate::notify;
use crate::queue::{Logging, Queue, Remote, Setup, TrackerSetup};
use crate::request::Limits;
use crate::ring::{Addresses, MOST_ENTRIES};
use crate::server::Shared;
use crate::sigbus::Owner;
use vbd_core::flush;

/// After waiting requests were cancelled, how long they may take to come back.
const CANCELLED_WITHIN: Duration = Duration::from_secs(1);
/// How often opening the disk is tried again, at first and later on.
const OPEN_SOON: Duration = Duration::from_millis(500);
const OPEN_LATER: Duration = Duration::from_secs(5);

/// A virtqueue as the front-end has described it so far.
#[derive(Default)]
struct Vring {
    size: u16,
    addresses: Option<Addresses>,
    /// Guest address of the used ring, for the log.
    used_log: Option<u64>,
    base: u16,
    kick: Option<Arc<OwnedFd>>,
    call: Option<Arc<OwnedFd>>,
    error: Option<Arc<OwnedFd>>,
    enabled: bool,
    running: Option<Remote>,
}

impl Vring {
    fn is_ready(&self) -> bool {
        self.enabled && self.size > 0 && self.addresses.is_some() && self.kick.is_some()
    }
}

/// Waiting for the disk to be free.
#[derive(Clone, Copy)]
struct Opening {
    /// Until then it is tried often.
    soon: Instant,
    next: Instant,
}

pub(crate) struct Device {
    shared: Arc<Shared>,
    owner: Arc<Owner>,
    backchannel: Arc<Backchannel>,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    memory: Arc<Memory>,
    vrings: Vec<Vring>,
    session: Option<Arc<dyn Session>>,
    opening: Option<Opening>,
    writeback: Arc<AtomicBool>,
    inflight: Option<Arc<Inflight>>,
    log: Option<Arc<DirtyLog>>,
    /// The last message was refused, and the connection goes on.
    refused: bool,
}

impl Device {
    pub(crate) fn new(shared: Arc<Shared>, owner: Arc<Owner>, backchannel: Arc<Backchannel>) -> Self {
        let writeback = shared.disk().inspect().is_ok_and(|(_, capabilities)| capabilities.write_cache);
        Device {
            shared,
            owner,
            backchannel,
            features: 0,
            protocol: VhostUserProtocolFeatures::empty(),
            memory: Arc::default(),
            vrings: Vec::new(),
            session: None,
            opening: None,
            writeback: Arc::new(AtomicBool::new(writeback)),
            inflight: None,
            log: None,
            refused: false,
        }
    }

    /// Whether the last message was refused without being the end of the connection.
    pub(crate) fn take_refused(&mut self) -> bool {
        std::mem::take(&mut self.refused)
    }

    /// When to call [`retry`](Self::retry), if ever.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        self.opening.map(|opening| opening.next)
    }

    /// Tries again to start what could not be started.
    pub(crate) fn retry(&mut self) {
        if self.opening.is_some_and(|opening| opening.next <= Instant::now()) {
            self.start_ready();
        }
    }

    fn fail(&self, what: &str) -> Error {
        self.shared.complain(what);
        Error::InvalidParam
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        if index >= usize::from(self.shared.options().queues) {
            return Err(self.fail(&format!("the front-end names queue {index}, which is not there")));
        }
        if index >= self.vrings.len() {
            // Without protocol features there is no message to enable a queue.
            let enabled = self.features & feature::PROTOCOL == 0;
            self.vrings.resize_with(index + 1, || Vring { enabled, ..Vring::default() });
        }
        Ok(&mut self.vrings[index])
    }

    /// A queue that has not started: its layout may change.
    fn idle_vring(&mut self, index: u32) -> Result<&mut Vring> {
        if self.vring(index)?.running.is_some() {
            return Err(self.fail(&format!("the front-end changes queue {index} while it runs")));
        }
        self.vring(index)
    }

    fn look(&self) -> Result<(Geometry, Capabilities)> {
        if let Some(session) = &self.session {
            return Ok((session.geometry(), session.capabilities()));
        }
        self.shared.disk().inspect().map_err(|error| self.fail(&error.to_string()))
    }

    fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::SeqCst);
        if let Some(inflight) = &self.inflight {
            inflight.keep_writeback(on);
        }
    }

    fn logging(&self, vring: &Vring) -> Option<Logging> {
        let log = self.log.clone().filter(|_| self.features & feature::LOG_ALL != 0)?;
        Some(Logging { log, used: vring.used_log })
    }

    /// Tells every running queue where to log. Returns when they do.
    fn spread_logging(&self) {
        for vring in &self.vrings {
            let logging = self.logging(vring);
            if let Some(queue) = &vring.running {
                queue.with(move |queue| queue.set_logging(logging));
            }
        }
    }

    /// Uses another memory table, in every running queue. Returns when they do.
    fn spread_memory(&mut self, memory: Memory) {
        self.memory = Arc::new(memory);
        for vring in &self.vrings {
            if let (Some(queue), Some(addresses)) = (&vring.running, vring.addresses) {
                let memory = self.memory.clone();
                queue.with(move |queue| queue.set_memory(&memory, addresses));
            }
        }
    }

    fn map(&self, region: &VhostUserMemoryRegion, file: &File) -> Result<Region> {
        let (guest, len, user, offset) =
            (region.guest_phys_addr, region.memory_size, region.user_addr, region.mmap_offset);
        if user.checked_add(len).is_none() || len == 0 {
            return Err(self.fail("a memory region wraps around"));
        }
        let mapping = Mapping::new(file, offset, len, &self.owner)
            .map_err(|error| self.fail(&format!("guest memory cannot be mapped: {error}")))?;
        Ok(Region { guest, len, user, mapping })
    }

    /// Starts every queue that is ready, opening the disk first.
    fn start_ready(&mut self) {
        let ready = |vring: &Vring| vring.is_ready() && vring.running.is_none();
        if !self.vrings.iter().any(ready) {
            self.opening = None;
            return;
        }
        let Some(session) = self.open() else { return };
        for index in 0..self.vrings.len() {
            if ready(&self.vrings[index])
                && let Err(reason) = self.start(index, &session)
            {
                self.shared.complain(&format!("queue {index} cannot start: {reason}"));
                // Not tried again before the front-end has set it up anew.
                self.vrings[index].kick = None;
            }
        }
        self.release_if_idle();
        self.shared.set_started(self.session.is_some());
    }

    fn open(&mut self) -> Option<Arc<dyn Session>> {
        if let Some(session) = &self.session {
            return Some(session.clone());
        }
        match self.shared.open() {
            Ok(session) => {
                self.opening = None;
                let session = self.going_on(session);
                self.session = Some(session.clone());
                Some(session)
            }
            Err(error) => {
                let now = Instant::now();
                let soon = self.opening.map_or(now + self.shared.options().open_within, |o| o.soon);
                let message = format!("the disk cannot be opened: {error}");
                if self.opening.is_none() {
                    self.shared.complain(&message);
                }
                self.shared.set_error(Some(message));
                let pause = if now < soon { OPEN_SOON } else { OPEN_LATER };
                self.opening = Some(Opening { soon, next: now + pause });
                None
            }
        }
    }

    /// What the guest gets of a disk that it may have used before, under a process that was killed: errors, where writes that
    /// it holds for done are lost. It would go on as if they were not.
    fn going_on(&self, session: Arc<dyn Session>) -> Arc<dyn Session> {
        let volatile = !session.keeps_unflushed();
        let Some(inflight) = self.inflight.as_ref().filter(|_| volatile) else {
            self.shared.set_error(None);
            return session;
        };
        if inflight.is_lost() && self.writeback.load(Ordering::SeqCst) {
            let message = "the server was killed, and writes that it had not flushed to this image are lost: every request \
                           fails until the guest is reset";
            self.shared.complain(message);
            self.shared.set_error(Some(message.into()));
            return Arc::new(Lost(session));
        }
        inflight.set_unflushed(true);
        self.shared.set_error(None);
        session
    }

    fn start(&mut self, index: usize, session: &Arc<dyn Session>) -> std::result::Result<(), String> {
        let vring = &self.vrings[index];
        let (Some(addresses), Some(kick)) = (vring.addresses, vring.kick.clone()) else {
            return Err("it is not set up".into());
        };
        let number = u16::try_from(index).map_err(|_| "there are too many queues")?;
        let (geometry, capabilities) = (session.geometry(), session.capabilities());
        let tracker = match &self.inflight {
            Some(all) => {
                let tracker = Tracker::new(all.clone(), number, vring.size);
                Some(TrackerSetup(tracker.ok_or("the in-flight region has no room for it")?))
            }
            None => None,
        };
        let features = match capabilities.write_cache {
            true => self.features,
            false => self.features & !feature::FLUSH,
        };
        let setup = Setup {
            server: self.shared.clone(),
            number: index,
            addresses,
            size: vring.size,
            base: vring.base,
            features,
            memory: self.memory.clone(),
            owner: self.owner.clone(),
            kick,
            call: vring.call.clone(),
            error: vring.error.clone(),
            session: session.clone(),
            counters: self.shared.disk().statistics().queue(&format!("vhost-user/{index}")),
            limits: Limits {
                discard: geometry.max_discard,
                zeroes: geometry.max_zeroes,
                serial: self.shared.serial(),
            },
            writeback: self.writeback.clone(),
            tracker,
            log: self.logging(vring),
        };
        let queue = Queue::start(self.shared.reactor(index), setup)?;
        self.vrings[index].running = Some(queue);
        Ok(())
    }

    /// Stops these queues: nothing new is taken, and what is out may take until `until`. After that, what waits for
    /// something other than the storage is cancelled. Says which queues have stopped, and where in their rings.
    fn stop(&mut self, indices: &[usize], until: Instant, detach: bool) -> Vec<(usize, Option<u16>)> {
        let mut waiting = Vec::new();
        for &index in indices {
            let Some(queue) = self.vrings[index].running.take() else { continue };
            let (sender, receiver) = sync_channel(1);
            queue.post(move |queue| queue.stop(detach, sender));
            waiting.push((index, queue, receiver));
        }
        let mut stopped = Vec::new();
        let mut late = Vec::new();
        for (index, queue, receiver) in waiting {
            match receiver.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(next) => stopped.push((index, Some(next))),
                Err(_) => late.push((index, queue, receiver)),
            }
        }
        late.iter().for_each(|(_, queue, _)| queue.post(|queue| queue.cancel_waiting()));
        let until = Instant::now() + CANCELLED_WITHIN;
        for (index, _, receiver) in late {
            let next = receiver.recv_timeout(until.saturating_duration_since(Instant::now())).ok();
            if next.is_none() {
                let what =
                    "has requests that the storage does not give back; the disk stays open until it does";
                self.shared.complain(&format!("queue {index} {what}"));
                self.shared.abandon(receiver);
            }
            stopped.push((index, next));
        }
        for (index, next) in &stopped {
            let vring = &mut self.vrings[*index];
            vring.kick = None;
            vring.base = next.unwrap_or(vring.base);
        }
        stopped
    }

    fn stop_all(&mut self, until: Instant, detach: bool) {
        let all: Vec<usize> = (0..self.vrings.len()).collect();
        self.stop(&all, until, detach);
        self.opening = None;
        self.release_if_idle();
    }

    /// Gives the disk back when no queue runs: flushes what it holds, and lets go of the lease.
    fn release_if_idle(&mut self) {
        if self.vrings.iter().any(|vring| vring.running.is_some()) {
            return;
        }
        if let Some(session) = self.session.take() {
            let drain = self.shared.options().drain;
            let stop = self.shared.stop_until().map(|until| until.saturating_duration_since(Instant::now()));
            let within = stop.map_or(drain, |left| left.min(drain));
            if !session.capabilities().read_only {
                match flush(self.shared.reactor(0), &session, within) {
                    Err(reason) => self.shared.complain(&format!("the last flush failed: {reason}")),
                    Ok(()) => self.inflight.iter().for_each(|inflight| inflight.set_unflushed(false)),
                }
            }
            drop(session);
            self.shared.set_started(false);
        }
    }

    /// The end of the connection. The front-end is gone, so nobody waits for what waits; when it comes back, the
    /// in-flight region tells what was left.
    fn shut_down(&mut self) {
        let stop = self.shared.stop_until();
        let drain = Instant::now() + self.shared.options().drain;
        if stop.is_none() {
            for queue in self.vrings.iter().filter_map(|vring| vring.running.as_ref()) {
                queue.post(|queue| queue.detach());
            }
        }
        self.stop_all(stop.map_or(drain, |stop| stop.min(drain)), true);
        self.vrings.clear();
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// A descriptor for a queue's events.
fn event(file: Option<File>) -> Result<Option<Arc<OwnedFd>>> {
    let Some(fd) = file.map(OwnedFd::from) else { return Ok(None) };
    notify::check(&fd).map_err(Error::ReqHandlerError)?;
    Ok(Some(Arc::new(fd)))
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated, and to be read as: disable all rings.
        self.stop_all(Instant::now() + self.shared.options().drain, false);
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        let until = Instant::now() + self.shared.options().drain;
        self.stop_all(until, false);
        for vring in &mut self.vrings {
            // Memory and interrupts stay: front-ends do not send them again.
            *vring = Vring { call: vring.call.take(), error: vring.error.take(), ..Vring::default() };
        }
        self.features = 0;
        let (_, capabilities) = self.look()?;
        self.set_writeback(capabilities.write_cache);
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        let (_, capabilities) = self.look()?;
        Ok(config::features(&capabilities))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(self.fail("the front-end wants features that were not offered"));
        }
        let changed = (self.features ^ features) & !feature::LOG_ALL;
        if changed != 0 && self.vrings.iter().any(|vring| vring.running.is_some()) {
            return Err(self.fail("the front-end changes features while queues run"));
        }
        self.features = features;
        self.shared.set_features(features);
        if features & feature::PROTOCOL == 0 {
            self.vrings.iter_mut().for_each(|vring| vring.enabled = true);
        }
        self.spread_logging();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let regions: Result<Vec<Region>> =
            regions.iter().zip(&files).map(|(region, file)| self.map(region, file)).collect();
        let memory = Memory::new(regions?).map_err(|reason| self.fail(reason))?;
        self.spread_memory(memory);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        match u16::try_from(num) {
            Ok(size) if size.is_power_of_two() && size <= MOST_ENTRIES => {
                self.idle_vring(index)?.size = size;
                Ok(())
            }
            _ => Err(self.fail(&format!("a queue of {num} entries: a power of two up to 4096 is possible"))),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let addresses = Addresses { descriptors, available, used };
        // Logging may be switched while a queue runs; the ring cannot move.
        let same = self.vring(index)?.addresses == Some(addresses);
        let vring = if same { self.vring(index)? } else { self.idle_vring(index)? };
        vring.addresses = Some(addresses);
        vring.used_log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        self.spread_logging();
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base =
            u16::try_from(base).map_err(|_| self.fail("a ring index that a split ring does not have"))?;
        self.idle_vring(index)?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        let number = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        let until = Instant::now() + self.shared.options().drain;
        let stopped = self.stop(&[number], until, false);
        if stopped.iter().any(|(_, next)| next.is_none()) {
            // To answer would say that nothing is written any more.
            return Err(self.fail(&format!("queue {index} cannot be stopped")));
        }
        self.vrings[number].kick = None;
        self.release_if_idle();
        Ok(VhostUserVringState::new(index, self.vrings[number].base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let Some(fd) = event(fd)? else {
            return Err(self.fail("a queue without kicks would have to be polled for ever"));
        };
        let vring = self.vring(index.into())?;
        vring.kick = Some(fd.clone());
        match &vring.running {
            Some(queue) => {
                queue.with(move |queue| queue.set_kick(fd));
            }
            None => self.start_ready(),
        }
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = event(fd)?;
        let vring = self.vring(index.into())?;
        vring.call = fd.clone();
        if let Some(queue) = &vring.running {
            queue.with(move |queue| queue.set_call(fd));
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = event(fd)?;
        let vring = self.vring(index.into())?;
        vring.error = fd.clone();
        if let Some(queue) = &vring.running {
            queue.with(move |queue| queue.set_error(fd));
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        use VhostUserProtocolFeatures as Feature;
        Ok(Feature::MQ
            | Feature::CONFIG
            | Feature::REPLY_ACK
            | Feature::RESET_DEVICE
            | Feature::CONFIGURE_MEM_SLOTS
            | Feature::BACKEND_REQ
            | Feature::LOG_SHMFD
            | Feature::INFLIGHT_SHMFD)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_protocol_features()?;
        match VhostUserProtocolFeatures::from_bits(features) {
            Some(features) if offered.contains(features) => {
                self.protocol = features;
                Ok(())
            }
            _ => Err(self.fail("the front-end wants protocol features that were not offered")),
        }
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.shared.options().queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let vring = self.vring(index)?;
        vring.enabled = enable;
        match &vring.running {
            Some(queue) => {
                queue.with(move |queue| queue.set_enabled(enable));
            }
            None => self.start_ready(),
        }
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let (geometry, capabilities) = self.look()?;
        let sizes = self.vrings.iter().map(|vring| vring.size).filter(|size| *size > 0);
        let space = Space {
            geometry,
            capabilities,
            writeback: self.writeback.load(Ordering::SeqCst),
            queues: self.shared.options().queues,
            queue_size: sizes.min(),
        };
        let bytes = space.encode();
        let wanted = bytes.into_iter().chain(std::iter::repeat(0));
        let (offset, size) = (usize::try_from(offset), usize::try_from(size));
        let (Ok(offset), Ok(size)) = (offset, size) else { return Err(Error::InvalidParam) };
        Ok(wanted.skip(offset).take(size).collect())
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let (_, capabilities) = self.look()?;
        match (usize::try_from(offset), bytes) {
            (Ok(config::WRITEBACK), [on @ (0 | 1)]) if capabilities.write_cache => {
                self.set_writeback(*on == 1);
                Ok(())
            }
            _ => {
                self.refused = true;
                Err(self.fail("the front-end writes to read-only configuration"))
            }
        }
    }

    fn set_backend_req_fd(&mut self, _backend: Backend) {
        // The message layer's own type cannot tell of changed configuration; see `Backchannel`.
        self.backchannel.install();
    }

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("this is no GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("there are no shared objects"))
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, entries) = (wanted.num_queues, wanted.queue_size);
        if queues > self.shared.options().queues || entries > MOST_ENTRIES {
            return Err(self.fail("the front-end wants an in-flight region that is too large"));
        }
        let size = inflight::file_size(queues, entries);
        let file = rustix::fs::memfd_create("vbd-inflight", rustix::fs::MemfdFlags::CLOEXEC)
            .and_then(|file| rustix::fs::ftruncate(&file, size).map(|()| file))
            .map_err(|error| Error::ReqHandlerError(error.into()))?;
        Ok((VhostUserInflight::new(size, 0, queues, entries), File::from(file)))
    }

    fn set_inflight_fd(&mut self, region: &VhostUserInflight, file: File) -> Result<()> {
        if self.vrings.iter().any(|vring| vring.running.is_some()) {
            return Err(self.fail("the front-end changes the in-flight region while queues run"));
        }
        let mapping = Mapping::new(&file, region.mmap_offset, region.mmap_size, &self.owner)
            .map_err(|error| self.fail(&format!("the in-flight region cannot be mapped: {error}")))?;
        let inflight = Inflight::new(mapping, region.mmap_size, region.num_queues, region.queue_size)
            .map_err(|reason| self.fail(reason))?;
        // A guest that has switched its cache off must not find it on because the back-end was restarted.
        match inflight.writeback() {
            Some(on) => self.writeback.store(on, Ordering::SeqCst),
            None => inflight.keep_writeback(self.writeback.load(Ordering::SeqCst)),
        }
        self.inflight = Some(Arc::new(inflight));
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MOST_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let region = self.map(region, &file)?;
        let memory = self.memory.with(region).map_err(|reason| self.fail(reason))?;
        self.spread_memory(memory);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (guest, user, len) = (region.guest_phys_addr, region.user_addr, region.memory_size);
        let memory = self.memory.without(guest, user, len).map_err(|reason| self.fail(reason))?;
        self.spread_memory(memory);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("the device has no state of its own"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("the device has no state of its own"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("the device shares no memory"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let mapping = Mapping::new(&file, log.mmap_offset, log.mmap_size, &self.owner)
            .map_err(|error| self.fail(&format!("the log of dirty pages cannot be mapped: {error}")))?;
        self.log = Some(Arc::new(DirtyLog::new(mapping, log.mmap_size)));
        self.spread_logging();
        Ok(())
    }
}
